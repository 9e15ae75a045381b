"""Laws of files that are whole or not there."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from stdit.console import MAX_WORD, printable
from stdit.errors import CheckpointError, NotRegularError, SaveError, WorkFailed, exit_code
from stdit.files import (
    FolderLock,
    atomic_folder,
    atomic_path,
    atomic_write,
    check_writable,
    describe_failed_write,
    fingerprint_file,
    fingerprint_files,
    open_regular,
    read_json,
    read_jsonl,
    seal,
    sha256,
)


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


def test_an_owner_that_has_not_written_its_name_yet_is_told_as_such(tmp_path: Path) -> None:
    first, second = FolderLock(tmp_path), FolderLock(tmp_path)
    first.acquire()
    (tmp_path / ".lock").write_text("")
    for take in (second.acquire, second.share):
        with pytest.raises(BlockingIOError, match="^a process that has just begun$"):
            take()


@pytest.mark.parametrize("how", ["write", "path", "folder"])
def test_an_error_of_writing_names_the_file(how: str, tmp_path: Path) -> None:
    target = tmp_path / "done.json"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # as a full disk: the error of the system names no file
    try:
        with pytest.raises(OSError, match=r"File too large: '.*done\.json'"):
            if how == "write":
                atomic_write(target, "x" * 100)
            elif how == "path":
                with atomic_path(target) as path, path.open("wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 100)
            else:
                with atomic_folder(target) as folder, (folder / "a").open("wb", buffering=0) as file:
                    while True:
                        file.write(b"x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(tmp_path) == []


@pytest.mark.parametrize("prefix", [[], ["unshare", "--fork", "--pid", "--kill-child"]], ids=["", "namespace"])
def test_a_dead_owners_lock_is_free(prefix: list[str], tmp_path: Path) -> None:
    if prefix and (shutil.which("unshare") is None or subprocess.run([*prefix, "true"]).returncode):
        pytest.skip("needs unshare --pid")
    program = "import sys; from pathlib import Path; from stdit.files import FolderLock\n"
    program += "lock = FolderLock(Path(sys.argv[1])); lock.acquire(); print('locked', flush=True); sys.stdin.read()"
    owner = subprocess.Popen(
        [*prefix, sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    assert owner.stdout.readline() == "locked\n"
    lock = FolderLock(tmp_path)
    with pytest.raises(BlockingIOError):
        lock.acquire()
    owner.kill()
    owner.wait()
    lock.acquire(10)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives_whatever_their_writer_does(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with atomic_path(tmp_path / "one.safetensors") as path:
            save_file({"x": np.zeros(3)}, path)  # safetensors makes it 0600
        with atomic_folder(tmp_path / "folder") as folder:
            save_file({"x": np.zeros(3)}, folder / "two.safetensors")
        atomic_write(tmp_path / "three", "text")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert len(files) == 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x07", "a\\x1b[31mred\\x07"),
        ("a\rb\x9bc", "a\\rb\\x9bc"),
        ("gpj.\u202efdp", "gpj.\\u202efdp"),
        ("left\ud800", "left\\ud800"),
        ("左へ\u3000動く 👩\u200d🚀 süß\n\tnext", "左へ\u3000動く 👩\u200d🚀 süß\n\tnext"),
    ],
)
def test_what_would_steer_a_terminal_is_shown_instead(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_long_words_and_texts_are_cut_in_the_middle() -> None:
    path = "/" + "x" * 10_000_000 + "/clip.mp4"
    assert len(printable(f"{path}: no such file")) < 2 * MAX_WORD + 20
    assert printable(f"{path}: no such file").endswith("/clip.mp4: no such file")
    assert len(printable("word " * 10_000_000)) < 100_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b"[1]", "expected a JSON object, found list"),
        (b"[" * 10_000, "nested more than 100 deep"),
        (b'{"a": ' + b"[" * 200 + b"]" * 200 + b"}", "nested more than 100 deep"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "1e999 is beyond the largest number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number of 5000 digits"),
        (b"\xff\xfe{}", "not UTF-8"),
    ],
)
def test_json_that_is_none_is_one_line_with_the_path(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a\.json: .*{message}") as caught:
        read_json(file)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_json(tmp_path)


def test_a_seal_holds_for_any_order_of_keys_and_for_no_other_content() -> None:
    sealed = seal({"b": [1, 2.5, None], "a": {"c": "d"}})
    assert seal(dict(reversed(sealed.items()))) == sealed
    assert seal({**sealed, "a": {"c": "e"}})["sha256"] != sealed["sha256"]


def test_a_place_that_cannot_be_written_is_named_before_anything_is(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "folder")
    assert names(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/folder: cannot be written to .*is not a folder"):
        check_writable(tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="cannot be written to"):
        check_writable(Path("/proc/stdit"))


@pytest.mark.timeout(20)
def test_only_regular_files_are_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        for digest in (sha256, fingerprint_file):
            with pytest.raises(NotRegularError, match=rf"not a regular file: '{tmp_path / name}'"):
                digest(tmp_path / name)


def test_exit_codes_tell_unusable_input_from_failed_work(tmp_path: Path) -> None:
    with pytest.raises(OSError) as too_long:
        os.stat(tmp_path / ("a" * 300))
    with pytest.raises(NotRegularError) as a_folder:
        open_regular(tmp_path)
    for error in (
        ValueError("a"),
        CheckpointError("damaged"),
        FileNotFoundError(2, "none"),
        NotADirectoryError(20, "file"),
        too_long.value,
        a_folder.value,
    ):
        assert exit_code(error) == 2
    for error in (
        WorkFailed("too many bad clips"),
        SaveError("no space"),
        OSError(28, "No space left on device"),
        RuntimeError("a rank died"),
    ):
        assert exit_code(error) == 1


def test_a_failed_write_names_the_file_systems_own_error(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device")
    assert "No space left on device" in describe_failed_write(full, tmp_path)
    assert "make room" in describe_failed_write(full, tmp_path)
    assert describe_failed_write(RuntimeError("odd"), tmp_path / "new") == "RuntimeError: odd"
    assert names(tmp_path) == []
