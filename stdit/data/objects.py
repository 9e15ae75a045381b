"""Objects of a store by URL: read, listed and written through pyarrow's file systems (S3 and GCS; fsspec's memory).

Credentials, endpoint and region are those of the store's own environment (AWS_PROFILE, AWS_ENDPOINT_URL, AWS_REGION, …;
GOOGLE_APPLICATION_CREDENTIALS). What may pass by itself (a lost connection, 429, 5xx, a body cut short) is tried again
TRIES times with growing waits, each said on stderr. What remains is a StoreError of one line; it never holds a
credential.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs
from pydantic import BaseModel

from stdit import config
from stdit.config import ConfigError, Url
from stdit.console import echo
from stdit.files import MAX_JSON_BYTES, parse_json

# Over about two minutes: a store that restarts, or limits its rate, does not end a run.
TRIES = 12
# Seconds before the second try; they double, up to the longest, less a random part so that ranks do not come in step.
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 20.0
# Seconds without an answer or a byte after which a connection is lost.
CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 20
# Bytes per request: large enough that 50 ms of latency are small beside their transfer.
CHUNK_BYTES = 16 << 20

_Result = TypeVar("_Result")


class StoreError(OSError):
    """An object that cannot be read or written: its URL and the reason, on one line."""

    def __init__(self, number: int, reason: str, url: Url) -> None:
        super().__init__(number, reason, str(url))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class NoSuchObject(StoreError, FileNotFoundError):
    """The bucket has no object of this name."""


class NoSuchBucket(StoreError, FileNotFoundError):
    """The store has no such bucket: a wrong name, or another store's endpoint."""


class NoAccess(StoreError, PermissionError):
    """The store refuses: no, wrong or expired credentials, or no right to this object."""


class ChangedObject(StoreError):
    """An object that is not the one whose size or hash was written down."""


def is_of_object(error: StoreError) -> bool:
    """Whether an error says something of the object, which others of the store need not share; else the store is out of
    reach, as without access or bucket: then nothing is known of the object, and what was made of it stays."""
    return isinstance(error, NoSuchObject | ChangedObject) or error.errno == errno.EFBIG


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and what changes when the object does: its ETag, generation or time."""

    size: int
    version: str


@dataclass(frozen=True)
class Digest:
    """What an object's bytes must be."""

    size: int
    sha256: str


def stat(url: Url) -> ObjectInfo:
    """One request. NoSuchObject, NoAccess, StoreError."""

    def attempt() -> ObjectInfo:
        with _store(url.scheme).open_input_file(url.key) as file:
            found = {key.lower(): value.decode() for key, value in (file.metadata() or {}).items()}
            version = next((found[key] for key in ("etag", "generation", "last-modified") if key in found), "")
            return ObjectInfo(file.size(), version)

    return _retried(url, attempt)


def read(url: Url, limit: int) -> bytes:
    """A small object, whole. StoreError, with the size: larger than `limit`."""

    def attempt() -> bytes:
        with _store(url.scheme).open_input_file(url.key) as file:
            if (size := file.size()) > limit:
                raise StoreError(errno.EFBIG, f"{size:,} bytes, more than the {limit:,} allowed", url)
            content = file.read()
        if len(content) != size:
            raise ConnectionError(f"ended after {len(content):,} of {size:,} bytes")
        return content

    return _retried(url, attempt)


def download(url: Url, target: BinaryIO, expected: Digest | None = None, size: int | None = None) -> None:
    """Writes an object into the open file `target`, from its start.

    ChangedObject: it is not what was `expected`, or has not the `size` that it had a moment ago. OSError: `target`
    cannot be written; NoSuchObject, NoAccess, StoreError.
    """
    wanted = expected.size if expected else size

    def attempt() -> str:
        digest = hashlib.sha256()
        target.seek(0)
        with _store(url.scheme).open_input_file(url.key) as file:
            if wanted is not None and (found := file.size()) != wanted:
                raise ChangedObject(
                    errno.ESTALE, f"has {found:,} bytes where {wanted:,} were written; it was changed", url
                )
            left = file.size()
            while left:
                chunk = file.read(min(CHUNK_BYTES, left))
                if not chunk:
                    raise ConnectionError(f"ended {left:,} bytes early")
                digest.update(chunk)
                try:
                    target.write(chunk)
                except OSError as error:
                    raise _LocalError(error) from error
                left -= len(chunk)
        target.truncate()
        return digest.hexdigest()

    try:
        found = _retried(url, attempt)
        if expected and found != expected.sha256:  # damaged on its way, or not what was written
            found = _retried(url, attempt)
        target.flush()
    except _LocalError as error:
        raise error.args[0] from None
    if expected and found != expected.sha256:
        raise ChangedObject(
            errno.ESTALE,
            f"sha256 {found[:12]}… where {expected.sha256[:12]}… was written; it was changed or damaged",
            url,
        )


def upload(file: Path, url: Url) -> None:
    """Writes the content of `file` to an object, which appears when all of it has arrived. OSError: `file` cannot be
    read; NoSuchBucket, NoAccess, StoreError."""

    def attempt() -> None:
        size = 0
        with _store(url.scheme).open_output_stream(url.key) as target:
            for chunk in _chunks(file):
                target.write(chunk)
                size += len(chunk)
        if (found := _store(url.scheme).get_file_info(url.key).size) != size:
            raise ConnectionError(f"{found} of {size:,} bytes have arrived")

    try:
        _retried(url, attempt)
    except _LocalError as error:
        with suppress(StoreError):  # what was read before has become the object
            delete(url)
        raise error.args[0] from None


def _chunks(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise _LocalError(error) from error


def delete(url: Url) -> None:
    """Removes an object. NoSuchObject, NoAccess, StoreError."""

    def attempt() -> None:
        try:
            _store(url.scheme).delete_file(url.key)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException):  # perhaps of the marker of an empty folder, which pyarrow writes then
            if _store(url.scheme).get_file_info(url.key).type != fs.FileType.NotFound:
                raise

    _retried(url, attempt)


def delete_folder(url: Url) -> None:
    """Removes all objects below `url`. NoSuchBucket, NoAccess, StoreError."""
    with suppress(NoSuchObject):
        _retried(url, lambda: _store(url.scheme).delete_dir(url.key))


def read_json(file: Path | Url, schema: type[BaseModel]) -> dict[str, Any]:
    """`stdit.config.read_json`, of an object too. NoSuchObject, NoAccess, StoreError."""
    if isinstance(file, Path):
        return config.read_json(file, schema)
    try:
        found = parse_json(read(file, MAX_JSON_BYTES).decode())
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: expected a JSON object, found {type(found).__name__}")
    config.check(found, schema, file)
    return found


def listing(folder: Url) -> dict[str, int]:
    """Sizes of all objects below `folder`, by their names relative to it, in order; empty if there are none.

    NoSuchBucket, NoAccess, StoreError.
    """

    def attempt() -> dict[str, int]:
        selector = fs.FileSelector(folder.key, allow_not_found="/" in folder.key, recursive=True)
        found = _store(folder.scheme).get_file_info(selector)
        files = {one.path.lstrip("/"): one.size for one in found if one.type == fs.FileType.File}
        return {key.removeprefix(f"{folder.key}/"): files[key] for key in sorted(files)}

    return _retried(folder, attempt)


# --------------------------------------------------------------------------------------- file systems


def _store(scheme: str) -> Any:
    """The file system of a scheme, for the environment as it is now."""
    settings = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith(("AWS_", "GOOGLE_"))))
    return _open_store(scheme, settings, os.getpid())


@lru_cache(8)
def _open_store(scheme: str, settings: tuple[tuple[str, str], ...], process: int) -> Any:
    if scheme == "memory":
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    if scheme == "gs":
        return fs.GcsFileSystem()
    environment = dict(settings)
    endpoint = urlsplit(environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL") or "")
    return fs.S3FileSystem(
        region=environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"),
        endpoint_override=endpoint.netloc or None,
        scheme=endpoint.scheme or "https",
        anonymous=environment.get("AWS_NO_SIGN_REQUEST", "").lower() in ("1", "true"),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=READ_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),  # `_retried` waits and says so
    )


# -------------------------------------------------------------------------------------------- errors


class _LocalError(Exception):
    """An error of this machine's disk in the midst of a download or upload."""


_MISSING = re.compile(
    r"NO_SUCH|NOT_FOUND|HTTP status 404|No such file|Not a regular file|does not exist", re.IGNORECASE
)
_REFUSED = re.compile(
    r"ACCESS_DENIED|SIGNATURE|INVALID_ACCESS_KEY|INVALID_CLIENT_TOKEN|EXPIRED_TOKEN|UNRECOGNIZED_CLIENT|MISSING_AUTH|"
    r"HTTP status 40[13]|PERMISSION_DENIED|UNAUTHENTICATED|Forbidden|Unauthorized",
    re.IGNORECASE,
)
# Of other answers these do not pass by themselves: a wrong region, a request that the server does not understand.
_PERMANENT = re.compile(r"HTTP status (30\d|400|405|411|412|416|501)|INVALID_ARGUMENT|NotImplemented", re.IGNORECASE)
_SECRETS = re.compile(r"(?i)\b([\w-]*(?:key|secret|token|signature|credential|password)[\w-]*\s*[=:]\s*)[^\s&,;<>]+")
_waits = random.Random()


def _retried(url: Url, attempt: Callable[[], _Result]) -> _Result:
    """The result of `attempt`, which is called up to TRIES times. NoSuchObject, NoAccess, StoreError."""
    for number in range(1, TRIES + 1):
        try:
            return attempt()
        except StoreError:
            raise
        except (OSError, pa.ArrowException) as error:
            found, passes = _store_error(error, url)
        if isinstance(found, NoSuchObject):
            found, passes = _no_such_bucket(url) or (found, False)
        if not passes or number == TRIES:
            tries = f" ({number} tries)" if passes else ""
            raise type(found)(found.errno or errno.EIO, f"{found.strerror}{tries}", url) from None
        wait = min(FIRST_WAIT_S * 2 ** (number - 1), LONGEST_WAIT_S) * _waits.uniform(0.5, 1.0)
        echo(f"stdit: {found}; try {number + 1} of {TRIES} in {wait:.1f} s", file=sys.stderr)
        time.sleep(wait)
    raise AssertionError("TRIES is above 0")


def _store_error(error: Exception, url: Url) -> tuple[StoreError, bool]:
    """What a client's exception says, and whether it may pass by itself."""
    text = redacted(" ".join(str(error).split()))
    if isinstance(error, FileNotFoundError) or _MISSING.search(text):
        return NoSuchObject(errno.ENOENT, "no such object", url), False
    if isinstance(error, PermissionError) or _REFUSED.search(text):
        name = re.search(r"AWS Error (\w+)", text)
        return NoAccess(errno.EACCES, f"access denied ({name[1] if name else 'by the store'})", url), False
    # "… AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 7, Could not connect"
    reason = re.sub(r"^.*?(?=AWS Error|google::cloud)", "", text)
    return StoreError(errno.EIO, reason[:300] or type(error).__name__, url), not _PERMANENT.search(text)


def _no_such_bucket(url: Url) -> tuple[StoreError, bool] | None:
    """The error of a bucket that is not there, or cannot be asked for, as `_store_error`; None if there is one."""
    if url.scheme == "memory":
        return None
    try:
        there = _store(url.scheme).get_file_info(url.bucket).type != fs.FileType.NotFound
    except (OSError, pa.ArrowException) as error:
        found, passes = _store_error(error, url)
        return (
            None if isinstance(found, NoAccess) else (found, passes)
        )  # the right to ask for the bucket is another one
    return None if there else (NoSuchBucket(errno.ENOENT, f"no such bucket as {url.bucket}", url), False)


def redacted(text: str) -> str:
    """`text` without credentials: the values of the environment's, and what stands behind key=, token=, …"""
    for name, value in os.environ.items():
        if re.search(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", name) and len(value) >= 8:
            text = text.replace(value, "***")
    return _SECRETS.sub(r"\1***", text)
