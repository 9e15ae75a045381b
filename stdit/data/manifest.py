"""The manifest: the list of clips with their captions and metadata (docs/data.md).

A JSONL, CSV or Parquet file; or a folder of clips, with the caption of NAME.mp4 in NAME.txt beside it.

    manifest = read("clips/manifest.jsonl")    # or read("clips/")

A row that cannot be understood is an error that names file, line and column, before any work is
done. A file that is missing or cannot be decoded is a `problem` of one clip and stops nothing here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import posixpath
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from stdit.config import Url
from stdit.data import objects
from stdit.data.objects import NoSuchObject, StoreError
from stdit.data.rows import (
    MAX_COLUMNS,
    MAX_ROWS,
    READERS,
    ClipFolder,
    ManifestError,
    Row,
    clip_folder,
    folder_rows,
    scan_folder,
)
from stdit.files import atomic_write, sha256

Scalar = str | int | float | bool | None
STANDARD_COLUMNS = (
    "path", "caption", "class", "fps", "frames", "height", "width", "split", "start_frame", "end_frame", "crop",
)  # fmt: skip
# Columns that features add themselves (stdit.data.features, .records); a manifest may not have them.
RESERVED_COLUMNS = (
    "id", "shard", "bucket", "class_label", "text_length", "tensors_digest", "status", "reason", "detail", "cut", "used_frames", "size", "mtime_ns", "digest",
)  # fmt: skip
ERRORS_SHOWN = 20
# Of all clips without free columns.
NO_EXTRA: Mapping[str, Scalar] = {}
INT32, INT64 = 2**31, 2**63
# Digits of a class that is ordered as a number; Python reads no longer ones.
CLASS_DIGITS = 4000
WHOLE_NUMBER = re.compile(r"([-+]?)([0-9]+)(?:\.0*)?")


def in_label_order(names: Iterable[str]) -> list[str]:
    """Class names, each once, in the order of their labels: by number where all are numbers, else by code point."""
    found = sorted(set(names))  # 1 and 01, which are one number, too
    numbers = all(re.fullmatch(rf"-?[0-9]{{1,{CLASS_DIGITS}}}", name) for name in found)
    return sorted(found, key=int) if numbers else found


@dataclass(frozen=True, slots=True)
class Clip:
    """One row. `key`, the path as the manifest spells it (normalised), names its file; `file` is its full path.

    `fps`, `frames`, `height` (px), `width` (px) are None where the manifest leaves them to be read
    from the file; they are the clip's, not the file's, where it is a part of it: frames `start_frame` to `end_frame`
    (exclusive), pixels `crop` (top, left, height, width). `row` counts lines of the file (rows, for Parquet), from 1.
    """

    key: str
    folder: Path | Url  # the manifest's
    caption: str
    class_name: str | None = None
    split: str = "train"
    fps: float | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    # Whether the manifest has a caption of this clip; an empty one is one, null or a missing NAME.txt is none.
    captioned: bool = True
    row: int = 0
    extra: Mapping[str, Scalar] = field(default_factory=dict)
    start_frame: int | None = None
    end_frame: int | None = None
    crop: tuple[int, int, int, int] | None = None

    @property
    def id(self) -> str:
        """The clip's name: its path, and its frames where it is a part of a file: films/a.mp4[240:312]."""
        return self.key if self.end_frame is None else f"{self.key}[{self.start_frame}:{self.end_frame}]"

    @property
    def is_part(self) -> bool:
        """Whether the clip is a part of its file."""
        return self.end_frame is not None or self.crop is not None

    @property
    def location(self) -> Path | Url:
        """Full path, or URL."""
        return Url(self.key) if "://" in self.key else self.folder / self.key

    @property
    def file(self) -> Path:
        """Full path. ManifestError: an object, which `stdit extract` and `stdit init` read, but not what asks for
        this."""
        location = self.location
        if isinstance(location, Url):
            raise ManifestError(f"{location}: clips are read from folders of this machine here; fetch them first")
        return location

    def value(self, column: str) -> Scalar:
        """The value of a column, known or free; None where the row has none."""
        known = {"path": self.key, "caption": self.caption, "class": self.class_name, "split": self.split}
        if column in known:
            return known[column]
        if column == "crop":
            return crop_text(self.crop)
        return getattr(self, column) if column in STANDARD_COLUMNS else self.extra.get(column)

    def beside(self, path: Scalar) -> Path | Url:
        """The file that a column's value names, as `path` is named: below the manifest's folder. ValueError: it is no
        such path."""
        key = _path(path, self.folder)
        return Url(key) if "://" in key else self.folder / key


@dataclass(frozen=True)
class Manifest:
    """All clips of a manifest. `fingerprint`: SHA-256 of its file; of a folder, of paths and captions."""

    path: Path | Url
    clips: tuple[Clip, ...]
    fingerprint: str
    # Of a folder: files that are neither clips nor their captions.
    other_files: int = 0

    def __iter__(self) -> Iterator[Clip]:
        return iter(self.clips)

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def classes(self) -> list[str]:
        """The class names in the order of their labels: by number where all are numbers, else by code point."""
        return in_label_order(clip.class_name for clip in self.clips if clip.class_name is not None)

    @property
    def uncaptioned(self) -> list[str]:
        """Paths of the clips without a caption, which count as clips with an empty one."""
        return [clip.id for clip in self.clips if not clip.captioned]

    @property
    def splits(self) -> dict[str, int]:
        """How many clips each split has."""
        return dict(sorted(Counter(clip.split for clip in self.clips).items()))

    @property
    def columns(self) -> set[str]:
        """The known columns and every free one."""
        return set(STANDARD_COLUMNS).union(*(clip.extra for clip in self.clips))


# The last manifests of files up to this size stay in memory.
MAX_KEPT_BYTES = 100_000_000


def read(path: Path | Url | str) -> Manifest:
    """Reads and checks a manifest: a .jsonl, .csv or .parquet file, or a folder of clips; or such an object, or
    objects, by URL.

    Raises ManifestError: missing, unreadable or empty file; rows that are no objects; missing,
    mistyped or contradictory values; paths that leave the manifest's folder; a clip listed twice;
    a folder without clips, or with captions that are not UTF-8. Up to 20 errors are listed at once.
    """
    if "://" in str(path):
        return _read_url(Url.parse(str(path)))
    path = Path(path)
    if path.is_dir():
        return of_folder(path, scan_folder(path))
    if path.suffix.lower() not in READERS:
        raise ManifestError(
            f"{path}: a manifest is a folder of clips or one of {', '.join(READERS)}; found suffix {path.suffix!r}"
        )
    if not path.is_file():
        raise ManifestError(f"{path}: {'is not a file' if path.exists() else 'no such manifest'}")
    if path.stat().st_size > MAX_KEPT_BYTES:
        return _read_file(path)
    return _kept(path, os.path.abspath(path), _sha256(path))


@lru_cache(maxsize=2)  # each step of a plan reads it, which takes a second for 40,000 rows
def _kept(path: Path, absolute: str, fingerprint: str) -> Manifest:
    found = _read_file(path)
    if found.fingerprint != fingerprint:
        raise ManifestError(f"{path}: was written while it was read")
    return found


def _read_file(path: Path) -> Manifest:
    return Manifest(path, _checked(path, path.parent, READERS[path.suffix.lower()](path)), _sha256(path))


def _sha256(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error


def of_folder(folder: Path | Url, found: ClipFolder) -> Manifest:
    """The manifest of a folder's files, or of some of them. ManifestError: as `read`."""
    clips = _checked(folder, folder, folder_rows(folder, found))
    listed = [[clip.key, clip.caption if clip.captioned else None] for clip in clips]
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return Manifest(folder, clips, digest, found.other_files)


def _read_url(url: Url) -> Manifest:
    """As `read`. ManifestError: also no access to it, a store that does not answer."""
    try:
        reader = READERS.get(url.suffix.lower())
        if reader is None:
            return of_folder(url, clip_folder(url, objects.listing(url)))
        with tempfile.NamedTemporaryFile(suffix=url.suffix) as copy:
            objects.download(url, cast(BinaryIO, copy))
            path = Path(copy.name)
            try:
                return Manifest(url, _checked(url, url.parent, reader(path)), sha256(path))
            except ManifestError as error:
                raise ManifestError(str(error).replace(str(path), url)) from error
    except NoSuchObject as error:
        raise ManifestError(f"{error.filename}: no such manifest") from error
    except StoreError as error:
        raise ManifestError(str(error)) from error


def _checked(path: Path | Url, folder: Path | Url, rows: Iterable[Row]) -> tuple[Clip, ...]:
    """The clips of `rows`, with files below `folder`. ManifestError: rows that are wrong, up to 20 of them; no rows."""
    clips: list[Clip] = []
    errors: list[tuple[int, str]] = []
    uncaptioned: list[int] = []
    columns: set[str] = set()
    share = _sharing()
    number = 0
    try:
        for number, (row, found) in enumerate(rows, 1):
            if isinstance(found, str):
                errors.append((row, found))
                continue
            columns.update(found)
            if number > MAX_ROWS or len(columns) > MAX_COLUMNS:
                raise ManifestError(
                    f"{path}:{row}: more than {MAX_ROWS:,} rows or {MAX_COLUMNS:,} columns, the most that a manifest has"
                )
            clip, complaints = _clip(row, found, folder, share)
            errors.extend((row, complaint) for complaint in complaints)
            if "caption" not in found:
                uncaptioned.append(row)
            if clip is not None:
                clips.append(clip)
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    if len(uncaptioned) < number:  # without any caption there is no such column, which models of classes do without
        errors += [(row, "caption: missing (an empty one is written as an empty text)") for row in uncaptioned]
    errors += [*_repeated(clips), *_mixed(clips)]
    if errors:
        lines = [f"{path}:{row}: {text}" for row, text in sorted(errors, key=lambda error: error[0])]
        hidden = len(lines) - ERRORS_SHOWN
        raise ManifestError("\n".join(lines[:ERRORS_SHOWN] + ([f"… and {hidden} more errors"] if hidden > 0 else [])))
    if not clips:
        raise ManifestError(f"{path}: the manifest is empty: 0 clips")
    return tuple(clips)


def fingerprint(path: Path | Url | str) -> str | None:
    """`read(path).fingerprint`; of a file without reading its rows. None where there is no manifest. ManifestError: a
    folder that cannot be used."""
    if "://" in str(path):
        return read(path).fingerprint
    path = Path(path)
    if path.is_file():
        return sha256(path)
    return read(path).fingerprint if path.is_dir() else None


def write(path: Path | str, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes `rows` as a JSONL manifest, atomically."""
    text = "".join(json.dumps(dict(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    atomic_write(path, text)


def file_problem(clip: Clip) -> str | None:
    """Why the clip's file is of no use, as far as a look at the folder tells; None: it may be of use, or is an
    object."""
    if isinstance(clip.location, Url):
        return None
    try:
        size = clip.file.stat().st_size
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if not clip.file.is_file():
        return "is not a file"
    return None if size else "is empty (0 bytes)"


# -------------------------------------------------------------------------------- from row to clip


# Values of a kind that are remembered as shared ones.
MAX_SHARED = 100_000


def _sharing() -> Callable[[Any], Any]:
    """A function that returns an earlier equal value of the same type: classes, sizes and names of columns repeat, and
    of millions of rows they would fill the memory."""
    seen: dict[type, dict[Any, Any]] = {}

    def share(value: Any) -> Any:
        found = seen.setdefault(type(value), {})
        return found.setdefault(value, value) if len(found) < MAX_SHARED else found.get(value, value)

    return share


def _clip(
    row: int, found: dict[str, Any], folder: Path | Url, share: Callable[[Any], Any]
) -> tuple[Clip | None, list[str]]:
    """The clip of one row, or None, and what is wrong with the row."""
    errors: list[str] = []

    def take(column: str, check: Any) -> Any:
        try:
            return check(found.get(column))
        except ValueError as error:
            errors.append(f"{column}: {error}")
            return None

    key = take("path", lambda value: _path(value, folder))
    split = take("split", _split)
    values = {name: take(name, _count) for name in ("frames", "height", "width")}
    caption, class_name, fps = take("caption", _caption), take("class", _class), take("fps", _fps)
    part = {
        "start_frame": take("start_frame", _index),
        "end_frame": take("end_frame", _count),
        "crop": take("crop", _crop),
    }
    extra = {share(name): take(name, _free) for name in found if name not in STANDARD_COLUMNS}
    extra = {name: share(value) if isinstance(value, str) else value for name, value in extra.items()}
    errors += _part_errors(part, values)
    if errors:
        return None, errors
    if part["end_frame"] is not None:
        part["start_frame"] = part["start_frame"] or 0
        values["frames"] = part["end_frame"] - part["start_frame"]
    if part["crop"] is not None:
        values |= {"height": part["crop"][2], "width": part["crop"][3]}
    captioned = found.get("caption") is not None
    values = {name: share(value) for name, value in values.items()}
    return Clip(
        key, folder, caption, share(class_name), share(split), share(fps), **values,
        captioned=captioned, row=row, extra=extra or NO_EXTRA, **part,
    ), []  # fmt: skip


def _part_errors(part: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """What contradicts itself in a row's frame range and crop."""
    start, end, crop = part["start_frame"], part["end_frame"], part["crop"]
    errors = []
    if start and end is None:
        errors.append(f"start_frame: {start} needs an end_frame (exclusive)")
    if end is not None and end <= (start or 0):
        errors.append(f"end_frame: {end} is not behind start_frame {start or 0}")
    elif end is not None and values["frames"] not in (None, end - (start or 0)):
        errors.append(f"frames: {values['frames']}, but frames {start or 0} to {end} are {end - (start or 0)}")
    for name, size in (("height", crop and crop[2]), ("width", crop and crop[3])):
        if size is not None and values[name] not in (None, size):
            errors.append(f"{name}: {values[name]}, but crop {crop_text(crop)} has {size}")
    return errors


def _path(value: Any, folder: Path | Url) -> str:
    """A path below `folder`, relative to it; or the URL of an object elsewhere. ValueError: another one."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a path, found {value!r}")
    if "\0" in value or _surrogate(value):
        raise ValueError(f"holds a character that no path can have: {value!r}")
    if "://" in value:
        if value.lower().startswith("file:"):
            raise ValueError(f"{value!r}: a file of this machine is given by its path below the manifest's folder")
        url = Url.parse(value)
        return url.removeprefix(f"{folder}/") if url.is_relative_to(folder) else url
    path = posixpath.normpath(value)
    if posixpath.isabs(path) and isinstance(folder, Path):
        for root in (os.path.abspath(folder), os.path.realpath(folder)):
            if path.startswith(root.rstrip("/") + "/"):
                path = posixpath.relpath(path, root)
    if posixpath.isabs(path) or path == "." or path.split("/")[0] == "..":
        raise ValueError(
            f"{value!r} leaves the manifest's folder; give a path below it (a link there may lead elsewhere)"
        )
    return path


def _caption(value: Any) -> str:
    """NFC, runs of white space as one space. Any length, any script, and empty: the text encoder cuts what is too
    long."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {value!r}")
    if _surrogate(value):
        raise ValueError(f"holds half a surrogate pair, which is no character: {value[:40]!a}")
    return " ".join(unicodedata.normalize("NFC", value).split())


def _class(value: Any) -> str | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and (number := WHOLE_NUMBER.fullmatch(value.strip())):
        # One class, one name, whichever program wrote it: 7, 07, "7.0".
        digits = number[2].lstrip("0") or "0"
        value = digits if digits == "0" or number[1] != "-" else f"-{digits}"
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"expected text, a whole number or null, found {value!r}")
    return _caption(str(value))


def _split(value: Any) -> str:
    if value is None:
        return "train"
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected the name of a split, such as train or validation, found {value!r}")
    return _caption(value)


def _fps(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < INT32:
        raise ValueError(f"expected frames per second, a number above 0 and below {INT32}, found {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    """A value for a message; of a number of hundreds of digits, that it is one."""
    huge = isinstance(value, int) and not -(10**40) < value < 10**40
    return "a number of more than 40 digits" if huge else repr(value)


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1 or value != value // 1:
        raise ValueError(f"expected a whole number above 0, found {value!r}")
    if value >= INT32:
        raise ValueError(f"expected a whole number below {INT32}, found {_short(value)}")
    return int(value)


def _index(value: Any) -> int | None:
    return 0 if value == 0 and not isinstance(value, bool) else _count(value)


def _crop(value: Any) -> tuple[int, int, int, int] | None:
    """Of a list, or of the text of one, as CSV and features have it."""
    if value is None:
        return None
    try:
        found = json.loads(value) if isinstance(value, str) else list(value)
    except (TypeError, ValueError):
        found = None
    whole = isinstance(found, list) and len(found) == 4 and all(type(n) is int and 0 <= n < INT32 for n in found)
    if not isinstance(found, list) or not whole or not found[2] * found[3]:
        raise ValueError(f"expected [top, left, height, width] in px, found {value!r}")
    return found[0], found[1], found[2], found[3]


def crop_text(crop: tuple[int, int, int, int] | None) -> str | None:
    """A crop as text, "[top, left, height, width]"."""
    return None if crop is None else json.dumps(list(crop))


def _free(value: Any) -> Scalar:
    """A free column's value; what is no scalar is kept as JSON text."""
    if isinstance(value, (list, dict)):
        value = json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, str) and _surrogate(value):
        raise ValueError(f"holds half a surrogate pair, which is no character: {value[:40]!a}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number, found {value!r}")
    if isinstance(value, int) and not -INT64 <= value < INT64:
        raise ValueError(f"{_short(value)} does not fit 64 bits")
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _surrogate(text: str) -> bool:
    return re.search("[\ud800-\udfff]", text) is not None


def _repeated(clips: Sequence[Clip]) -> Iterator[tuple[int, str]]:
    """A clip listed twice would be counted twice, or stand in two splits."""
    first: dict[str, int] = {}
    for clip in clips:
        if clip.id in first:
            yield clip.row, f"path: {clip.id!r} is listed already, in row {first[clip.id]}"
        first.setdefault(clip.id, clip.row)


def _mixed(clips: Sequence[Clip]) -> Iterator[tuple[int, str]]:
    """A free column holds one kind of value throughout: conditions and Parquet both need that."""
    kinds: dict[str, tuple[str, int]] = {}
    for clip in clips:
        for column, value in clip.extra.items():
            if value is None:
                continue
            kind = "text" if isinstance(value, str) else "true/false" if isinstance(value, bool) else "numbers"
            before, row = kinds.setdefault(column, (kind, clip.row))
            if kind != before:
                yield clip.row, f"{column}: holds {kind} ({value!r}) where row {row} holds {before}"
