"""A bounded cache of objects on this machine's disk, shared by all its processes: each object is fetched once, whole.

    cache = ObjectCache.of(config.cache)
    with cache.local(Url("s3://bucket/clips/a.mp4")) as path:    # a file of this machine; a Path is itself
        …

    folder/4f1c….mp4             an object, by the hash of its content (where it is known), or of its URL and version
           .4f1c….mp4.part  one that is being fetched, locked by the process that fetches it; as large as it will be,
                            once there is room
           .lock                 held while room is made

The files used longest ago are removed first; one that is in use stays until it is released, and a file that is open or
mapped stays readable after. Files that are being fetched count as if they were whole, so they never exceed the limit.
Other files in the folder are neither counted nor touched.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stdit.config import CacheConfig, Url
from stdit.cores import local_ranks
from stdit.data import objects
from stdit.data.objects import Digest, StoreError
from stdit.files import flock, user_cache

# Seconds to wait for others to release files when there is no room.
ROOM_WAIT_S = 300.0
# Objects that one process fetches at a time when it reads ahead.
FETCH_THREADS = 8
# Files of the cache: a hash with the object's suffix; one that is being fetched.
_WHOLE = re.compile(r"[0-9a-f]{64}(\.[^.]+)?", re.DOTALL)
_PART = re.compile(r"\.[0-9a-f]{64}(\.[^.]+)?\.part", re.DOTALL)


@dataclass(frozen=True)
class ObjectCache:
    """limit: bytes of all its files in `folder`."""

    folder: Path
    limit: int

    @classmethod
    def of(cls, config: CacheConfig) -> ObjectCache:
        """The cache of a config; its folder is created on first use."""
        return cls(config.folder or user_cache() / "objects", int(config.size_gb * 1e9))

    @contextmanager
    def local(self, file: Path | Url, expected: Digest | None = None) -> Iterator[Path]:
        """A path of this machine with the content of `file`, which stays there within the context. A Path is returned
        as it is.

        StoreError (NoSuchObject, NoAccess, ChangedObject): it cannot be fetched, or the cache is too small for it.
        OSError: the cache cannot be written.
        """
        if isinstance(file, Path):
            yield file
            return
        info = None if expected else objects.stat(file)
        size = expected.size if expected else info.size if info else 0
        path = self.path(file, expected, info)
        while (pin := _pin(path)) is None:
            self._fetch(file, path, size, expected)
        try:
            yield path
        finally:
            pin.close()

    def ahead(self, files: Sequence[Path | Url], count: int = FETCH_THREADS) -> Iterator[Path | Url]:
        """Iterates over `files`, while the objects among the `count` from this one on are being fetched."""
        if not any(isinstance(file, Url) for file in files):
            yield from files
            return

        def fetch(file: Path | Url) -> None:
            with suppress(OSError), self.local(file):  # its reader will meet the error
                pass

        pool = ThreadPoolExecutor(count, thread_name_prefix="fetch")
        try:
            for number, file in enumerate(files):
                for later in files[1:count] if number == 0 else files[number + count - 1 :][:1]:
                    pool.submit(fetch, later)
                yield file
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def path(self, url: Url, expected: Digest | None, info: objects.ObjectInfo | None = None) -> Path:
        """Where an object is kept."""
        key = expected.sha256 if expected else version_digest(url, info)
        return self.folder / f"{key}{url.suffix}"

    def _fetch(self, url: Url, path: Path, size: int, expected: Digest | None) -> None:
        """Downloads an object to `path`, unless another process does so meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f".{path.name}.part"
        with _locked(part) as file:
            if path.exists():
                part.unlink()
                return
            try:
                file.truncate(0)  # what a process that died has left
                self._make_room(url, file, size)
                objects.download(url, file, expected, size)
                os.fsync(file.fileno())
                with _locked(self.folder / ".lock"):  # or another's count of the bytes could miss both names
                    os.replace(part, path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    def _make_room(self, url: Url, part: BinaryIO, size: int) -> None:
        """Removes the files used longest ago until there is room for `size` bytes, and takes it for the empty file
        `part`."""
        if size > self.limit:
            reason = f"{size:,} bytes, more than the cache holds ({self.limit:,} bytes, cache.size_gb)"
            raise StoreError(errno.EFBIG, reason, url)
        until = time.monotonic() + ROOM_WAIT_S
        while True:
            with _locked(self.folder / ".lock"):
                total, files = self._usage()
                for _, bytes_, path in sorted(files):
                    if total + size <= self.limit:
                        break
                    if _remove_unused(path):
                        total -= bytes_
                if total + size <= self.limit:
                    part.truncate(size)
                    return
            if time.monotonic() > until:
                reason = f"no room in {self.folder}: all of its {self.limit:,} bytes are in use; raise cache.size_gb"
                raise StoreError(errno.ENOSPC, reason, url)
            time.sleep(0.1)

    def _usage(self) -> tuple[int, list[tuple[int, int, Path]]]:
        """Bytes used; (time of use, bytes, path) of the whole files. What dead processes left is removed."""
        total, files = 0, []
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            with suppress(FileNotFoundError):
                whole, part = _WHOLE.fullmatch(entry.name), _PART.fullmatch(entry.name)
                if not (whole or part) or not entry.is_file(follow_symlinks=False) or (part and _remove_unused(path)):
                    continue
                found = entry.stat()
                total += found.st_size
                if whole:
                    files.append((found.st_mtime_ns, found.st_size, path))
        return total, files


def version_digest(url: Url, info: objects.ObjectInfo | None) -> str:
    """Name of an object's version: a SHA-256 of its URL, size and what the store says of the version."""
    version = f"{url}\0{info.version}\0{info.size}" if info else str(url)
    return hashlib.sha256(version.encode()).hexdigest()


class ReadAhead:
    """Fetches objects before they are needed, as far as they leave room in the cache for those in use.

    announce(…) before an object is needed, release(…) after; `is_full` says when enough is announced.
    """

    def __init__(self, cache: ObjectCache) -> None:
        self.cache = cache
        # Other ranks of this machine announce as much.
        self._limit = cache.limit / 2 / (local_ranks() or 1)
        self._pool = ThreadPoolExecutor(FETCH_THREADS, thread_name_prefix="read-ahead")
        self._wanted: dict[Url, tuple[int, int, Future[None]]] = {}  # users, bytes
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        return self._bytes >= self._limit

    def announce(self, url: Url, expected: Digest) -> None:
        """An object that will be needed; its fetch is begun unless it was announced before."""
        if url in self._wanted:
            users, size, future = self._wanted[url]
            self._wanted[url] = (users + 1, size, future)
            return
        self._wanted[url] = (1, expected.size, self._pool.submit(self._fetch, url, expected))
        self._bytes += expected.size

    def release(self, url: Url) -> None:
        """The object is no longer needed by one of those that announced it."""
        users, size, future = self._wanted.pop(url)
        if users > 1:
            self._wanted[url] = (users - 1, size, future)
            return
        future.cancel()
        self._bytes -= size

    def close(self) -> None:
        """Cancels what has not begun."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _fetch(self, url: Url, expected: Digest) -> None:
        with suppress(OSError), self.cache.local(url, expected):  # its reader will meet the error
            pass


# ---------------------------------------------------------------------------------------------- locks


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The file `path`, created if need be, open and locked for this thread alone."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b") as file:
            flock(file, fcntl.LOCK_EX)
            if _is_at(file, path):  # else the one who held it has renamed or removed it
                yield file
                return


def _pin(path: Path) -> BinaryIO | None:
    """The file open and locked against removal, marked as used now; None if it is not there."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    flock(file, fcntl.LOCK_SH)
    if not _is_at(file, path):
        file.close()
        return None
    with suppress(OSError):  # of another user
        os.utime(path)
    return file


def _remove_unused(path: Path) -> bool:
    """Removes a file that nobody has locked."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        if not flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return False
        if _is_at(file, path):
            path.unlink()
    return True
