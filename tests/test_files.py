"""Laws of files that are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from stdit.files import atomic_folder, atomic_path, atomic_write, sha256


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
