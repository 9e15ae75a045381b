"""Files: atomic writes, hashes and fingerprints, JSON lines. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def fsync_folder(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Writes `content` to `path`, which holds the old file or the new one, never a part. OSError: disk full, no permission."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a writer that wants a file name; renamed on success, removed on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`; renamed to `path` on success (an old one is replaced), removed on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(path.parent)


def open_regular(path: Path | str) -> BinaryIO:
    """Opens a regular file for reading. OSError: it isn't one; a FIFO or a device could block or never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return Path(path).open("rb")


def read_text(path: Path | str, limit: int) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes. OSError: larger, or not readable; UnicodeDecodeError."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than the {limit:,} bytes allowed", str(path))
    return content.decode("utf-8")


class FolderLock:
    """Advisory lock on FOLDER/.lock, held by one process or shared by those of one run.

    The kernel releases it with the last holder's death. Where the file system has no locks it does nothing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / ".lock").open("a+")

    def acquire(self, wait_s: float = 0.0, waiting: Callable[[str], None] = lambda owner: None) -> None:
        """Takes the lock for this process alone, waiting up to `wait_s`; `waiting` is called once with the owner.

        BlockingIOError, with the owner as its message: it is still taken.
        """
        until, told = time.monotonic() + wait_s, False
        while not self._lock(fcntl.LOCK_EX):
            self._file.seek(0)
            owner = self._file.read().strip()
            if time.monotonic() >= until:
                raise BlockingIOError(owner)
            if not told:
                waiting(owner)
                told = True
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def share(self) -> None:
        """Shares the lock with other processes that call this. BlockingIOError: one holds it alone."""
        if not self._lock(fcntl.LOCK_SH):
            raise BlockingIOError

    def release(self) -> None:
        """Releases this process's hold."""
        self._file.close()

    def _lock(self, kind: int) -> bool:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        return True


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Of a large file, the fingerprint reads this much.
_BLOCK_BYTES = 16 * 1024
_BLOCKS = 64


def fingerprint_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's size and content: all of it up to 1 MiB, beyond that 64 blocks of 16 KiB spread evenly.

    For telling whether weights or media are the same ones, in milliseconds; first and last block are among those read.
    OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= _BLOCK_BYTES * _BLOCKS:
            digest.update(file.read())
        else:
            for block in range(_BLOCKS):
                file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


def fingerprint_files(files: Iterable[Path], digest: Callable[[Path], str] = fingerprint_file) -> str:
    """Hex SHA-256 over the names (without folders) and digests of `files`, in their order.

    Independent of folder and times, so that it holds on another machine. digest: `sha256` where every byte must count.
    OSError: a file cannot be read.
    """
    listing = "".join(f"{path.name}\0{digest(path)}\n" for path in files)
    return hashlib.sha256(listing.encode()).hexdigest()


# ------------------------------------------------------------------------------------------ JSON lines


def parse_jsonl(lines: str | Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, its object or what is wrong with it) for every line that is not blank. lines: or a text of them.

    Strict: a repeated key, NaN and infinity, or a value that is no object are errors.
    """
    for number, line in enumerate(lines.split("\n") if isinstance(lines, str) else lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys, parse_constant=_no_nan)
        except json.JSONDecodeError as error:
            yield number, f"not valid JSON ({error.msg} at column {error.colno})"
        except (ValueError, RecursionError) as error:
            yield number, f"not a usable row ({error})"
        else:
            yield number, row if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSONL file. ValueError: it cannot be read; the first line that holds no object, with its number."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, row in parse_jsonl(text):
        if isinstance(row, str):
            raise ValueError(f"{path}:{number}: {row}")
        rows.append(row)
    return rows


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"key {repeated[0]!r} is given twice")
    return dict(pairs)


def _no_nan(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
