"""Laws of files that are whole or not there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stdit.files import FolderLock, atomic_folder, atomic_path, atomic_write, fingerprint_files, read_jsonl, sha256


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_write_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "x.txt", "one")
    atomic_write(tmp_path / "a" / "x.txt", b"two")
    assert (tmp_path / "a" / "x.txt").read_text() == "two"
    assert names(tmp_path / "a") == ["x.txt"]


def test_an_interrupted_file_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "x.bin"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError("killed")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["x.bin"]


def test_an_interrupted_folder_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "out") as path:
        (path / "a").write_text("half")
        raise RuntimeError("killed")
    assert names(tmp_path) == []


def test_a_folder_replaces_the_old_one(tmp_path: Path) -> None:
    for content in ("one", "two"):
        with atomic_folder(tmp_path / "out") as path:
            (path / content).write_text(content)
    assert names(tmp_path / "out") == ["two"]


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_fingerprint_of_files_is_of_names_and_content_in_order(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        for name in ("a", "b"):
            (tmp_path / place / name).write_text(name)
    one, two = ([tmp_path / place / name for name in ("a", "b")] for place in ("one", "two"))
    first = fingerprint_files(one)
    assert first == fingerprint_files(two)
    assert len({first, fingerprint_files(one[::-1]), fingerprint_files(one, sha256), fingerprint_files(one[:1])}) == 4
    two[1].write_text("c")
    assert fingerprint_files(two) != first
    two[1].rename(two[1].with_name("c"))
    with pytest.raises(OSError, match="No such file"):
        fingerprint_files(two)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1, "a": 2}', "2: not a usable row .key 'a' is given twice"),
        ('{"a": NaN}', "2: not a usable row .NaN is not a JSON number"),
        ("[1]", "2: expected an object, found list"),
        ("{", "2: not valid JSON"),
    ],
)
def test_a_line_that_holds_no_object_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n')
    assert read_jsonl(path) == [{"a": 1}]
    path.write_text(f'{{"a": 1}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl:{message}"):
        read_jsonl(path)


def test_a_lock_is_held_by_one_or_shared_and_free_once_all_have_left(tmp_path: Path) -> None:
    first, second, third = (FolderLock(tmp_path / "run") for _ in range(3))
    first.acquire()
    owners: list[str] = []
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "):
        second.acquire(0.3, owners.append)
    assert len(owners) == 1
    with pytest.raises(BlockingIOError):
        second.share()
    first.share()
    second.share()
    first.release()
    with pytest.raises(BlockingIOError):
        third.acquire()
    second.release()
    third.acquire()


def test_a_dead_owners_lock_is_free(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from stdit.files import FolderLock\n"
    program += "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print('locked', flush=True); sys.stdin.read()"
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "locked\n"
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock.acquire()
    owner.kill()
    owner.wait()
    lock.acquire(10)
