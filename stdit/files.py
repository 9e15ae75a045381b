"""Files: atomic writes, hashes and fingerprints, JSON, text for terminals. Standard library only."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, Self

from stdit.errors import NotRegularError


def fsync_folder(path: Path) -> None:
    """Makes a rename inside `path` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path | str, content: bytes | str) -> None:
    """Writes `content` to `path`, which holds the old file or the new one, never a part. OSError, with the path: disk
    full, no permission."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    fsync_folder(path.parent)


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`, for a writer that wants a file name; renamed on success, removed on error.

    The file has the mode of any new one, whatever the writer gave it (safetensors: 0600).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.part.{path.name}")
    try:
        mode = _new_file_mode(temporary)
        yield temporary
        os.chmod(temporary, mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _name(error, path)
        raise
    fsync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`; renamed to `path` on success (an old one is replaced), removed on
    error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        apply_umask(temporary)
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        _name(error, path)
        raise
    fsync_folder(path.parent)


def _name(error: BaseException, path: Path) -> None:
    """Has an error of writing name `path`: that of a full disk names none."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = str(path)


def _new_file_mode(path: Path) -> int:
    """Mode of a new file as the umask has it. Creates `path`; the umask itself cannot be read without changing it for
    all threads."""
    path.touch()
    return stat.S_IMODE(path.stat().st_mode)


def apply_umask(folder: Path, *patterns: str) -> None:
    """Gives files of `folder` the mode of new ones: safetensors and Hugging Face's writers make them 0600.

    patterns: of those that were written; without any, all files below a folder of our own.
    """
    probe = folder / f".{os.getpid()}.mode"
    try:
        mode = _new_file_mode(probe)
    finally:
        probe.unlink(missing_ok=True)
    for file in (file for pattern in patterns or ("**/*",) for file in folder.glob(pattern)):
        if file.is_file() and not file.is_symlink() and stat.S_IMODE(file.stat().st_mode) != mode:
            os.chmod(file, mode)


def check_writable(folder: Path) -> None:
    """ValueError, naming it: no file could be created in `folder`, which need not exist yet. Nothing is left behind."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.exists() or p.is_symlink())
    probe = nearest / f".{os.getpid()}.probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "is not a folder" if not nearest.is_dir() else error.strerror
        place = "" if nearest == folder else f"{nearest}: "
        raise ValueError(f"{folder}: cannot be written to ({place}{reason})") from error


# Libraries report a failed write without its cause; a file of this size, written to the same place, tells.
_PROBE_BYTES = 2**20


def describe_failed_write(error: Exception, folder: Path) -> str:
    """Cause of a failed write into `folder`, on one line: the file system's own error if writing there fails, else what
    `error` says, with the free space."""
    nearest = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    free = f"{shutil.disk_usage(nearest).free / 2**20:,.0f} MiB are free"
    probe = nearest / f".{os.getpid()}.probe"
    try:
        atomic_write(probe, bytes(_PROBE_BYTES))
        probe.unlink()
    except OSError as failed:
        full = failed.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{failed.strerror}; {free}: make room" if full else str(failed.strerror)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # the file was larger than the probe
        return f"{error.strerror}; {free}: make room"
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
    return f"{text}; {free}" if isinstance(error, OSError) or "writ" in text.lower() else text


def open_regular(path: Path | str) -> BufferedReader:
    """Opens a regular file for reading. NotRegularError: a FIFO or a device could block or never end; OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise NotRegularError(errno.EINVAL, "not a regular file", str(path))
    return Path(path).open("rb")


def check_regular(folder: Path) -> None:
    """For folders that a library opens: ValueError if a file directly in `folder` is a FIFO or a device, which could
    block or never end, or a JSON file above MAX_JSON_BYTES. Other places than folders pass."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            found = path.stat()
        except OSError:  # a link to nothing: missing, for whoever opens it
            continue
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise ValueError(f"{path}: not a regular file")
        if path.suffix == ".json" and found.st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path}: {found.st_size:,} bytes, more than the {MAX_JSON_BYTES:,} allowed")


def read_text(path: Path | str, limit: int) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes. OSError: larger, or not readable;
    UnicodeDecodeError."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than the {limit:,} bytes allowed", str(path))
    return content.decode("utf-8")


class Closable(ABC):
    """A context manager that calls `close` at its end."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
        until, announced = time.monotonic() + wait_s, False
        while not flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            owner = self._owner()
            if time.monotonic() >= until:
                raise BlockingIOError(owner)
            if not announced:
                waiting(owner)
                announced = True
            time.sleep(0.2)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}")
        self._file.flush()

    def share(self) -> None:
        """Shares the lock with other processes that call this. BlockingIOError, as of `acquire`: one holds it alone,
        which it may have taken in this moment."""
        if not flock(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB):
            raise BlockingIOError(self._owner())

    def _owner(self) -> str:
        """Who has the lock; it is written just after it is taken."""
        self._file.seek(0)
        return self._file.read().strip() or "a process that has just begun"

    def release(self) -> None:
        """Releases this process's hold."""
        self._file.close()


def user_cache() -> Path:
    """What was fetched and may be removed at any time: $XDG_CACHE_HOME/stdit, or ~/.cache/stdit."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stdit"


def flock(file: IO[Any], kind: int) -> bool:
    """Whether the lock was got, without waiting if `kind` has LOCK_NB. Where the file system has no locks, as if it
    was."""
    try:
        fcntl.flock(file, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
    return True


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a regular file's bytes. OSError: the file cannot be read."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with `sha256`, the SHA-256 of all its other keys in any order: a file that is only read by its writer's
    program says so of itself when it is damaged or edited (stdit.config.read_json checks it)."""
    rest = {key: child for key, child in value.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


# Of a large file, the fingerprint reads this much.
_BLOCK_BYTES = 16 * 1024
_BLOCKS = 64


def fingerprint_file(path: Path | str) -> str:
    """Hex SHA-256 of a regular file's size and content: all of it up to 1 MiB, beyond that 64 blocks of 16 KiB spread
    evenly.

    For telling whether weights or media are the same ones, in milliseconds; first and last block are among those read.
    OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
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


# ------------------------------------------------------------------------------------------------ JSON

# Limits of one JSON file. The largest that stdit writes is the report of an extraction that names every clip.
MAX_JSON_BYTES = 256 * 2**20
MAX_JSON_DEPTH = 100
MAX_JSON_DIGITS = 64


def parse_json(text: str) -> Any:
    """The JSON document `text`. ValueError, one line: not JSON, a repeated key, NaN, infinity, nested or numbers too
    long."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_nan,
            parse_float=_finite,
            parse_int=_integer,
        )
    except RecursionError:
        raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep") from None
    level: list[Any] = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return value
    raise ValueError(f"nested more than {MAX_JSON_DEPTH} deep")


def read_json(path: Path | str) -> dict[str, Any]:
    """The JSON object in a regular file. ValueError, one line with the path: unreadable, or no JSON object.

    A file that stdit has written is read by `stdit.config.read_json`, which also checks its keys.
    """
    text = ""
    try:
        text = read_text(path, MAX_JSON_BYTES)
        found = parse_json(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        reason = f"not valid JSON ({error.msg} at line {error.lineno}, column {error.colno})" if text else "is empty"
        raise ValueError(f"{path}: {reason}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(found).__name__}")
    return found


def parse_jsonl(lines: str | Iterable[str]) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number from 1, its object or what is wrong with it) for every line that is not blank. lines: or a text of
    them.

    Strict: a repeated key, NaN and infinity, or a value that is no object are errors.
    """
    for number, line in enumerate(lines.split("\n") if isinstance(lines, str) else lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except json.JSONDecodeError as error:
            yield number, f"not valid JSON ({error.msg} at column {error.colno})"
        except ValueError as error:
            yield number, f"not a usable row ({error})"
        else:
            yield number, row if isinstance(row, dict) else f"expected an object, found {type(row).__name__}"


def read_jsonl(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a JSONL file. ValueError: it cannot be read; the first line that holds no object, with its
    number."""
    try:
        text = read_text(path, MAX_JSON_BYTES).removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error
    rows = []
    for number, row in parse_jsonl(text):
        if isinstance(row, str):
            raise ValueError(f"{path}:{number}: {row}")
        rows.append(row)
    return rows


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {repeated!r} is given twice")
    return found


def _no_nan(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:MAX_JSON_DIGITS]} is beyond the largest number")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_JSON_DIGITS:
        raise ValueError(f"a number of {len(text)} digits; at most {MAX_JSON_DIGITS}")
    return int(text)
