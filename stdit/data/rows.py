"""Rows of a manifest: of a JSONL, CSV or Parquet file, or of a folder of clips with captions beside them.

Each reader yields (row number, the row or what is wrong with it).
"""

from __future__ import annotations

import csv
import errno
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from stdit.config import Url
from stdit.data import objects
from stdit.files import open_regular, parse_jsonl

# Columns of a CSV that are text whatever their cells look like, and those that are numbers.
TEXT = ("path", "caption", "class", "split", "crop")
NUMBERS = ("fps", "frames", "height", "width", "start_frame", "end_frame")


# A manifest beyond these is a mistake: whole, it has to fit into memory.
MAX_BYTES, MAX_ROWS, MAX_COLUMNS = 2 << 30, 10_000_000, 1000
# Of a Parquet file, so much is read at a time, and turned into Python's objects.
PARQUET_ROWS, PARQUET_BYTES = 500, 256 << 20


class ManifestError(ValueError):
    """A manifest that cannot be used; the message names file, line, column and what was found."""


Row = tuple[int, "dict[str, Any] | str"]  # line number, and what stands there or what is wrong with it


def text_lines(path: Path, limit: int = MAX_BYTES) -> Iterator[str]:
    """The lines of a regular file of at most `limit` bytes, one at a time, each with its line break.

    ManifestError with the line, where it is not UTF-8; OSError: another kind of file, or a larger one.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes, more than the {limit:,} allowed", str(path))
        for number, raw in enumerate(file, 1):
            try:
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                found = f"byte 0x{raw[error.start]:02x}: {error.reason}"
                raise ManifestError(f"{path}:{number}: not UTF-8 ({found})") from None


def jsonl_rows(path: Path) -> Iterator[Row]:
    yield from parse_jsonl(text_lines(path))


def csv_rows(path: Path) -> Iterator[Row]:
    """Cells as text; an empty cell is None, and a free column that holds numbers alone is one of numbers."""
    csv.field_size_limit(MAX_BYTES)  # captions of any length; the default is 131,072 characters
    header: list[str] = []
    errors: list[Row] = []
    reader = csv.reader(text_lines(path), strict=True)
    try:
        header = next(reader, [])
        numeric = {at for at, name in enumerate(header) if name not in TEXT + NUMBERS}
        for cells in reader:
            if len(cells) == len(header):
                numeric -= {at for at in numeric if cells[at].strip() and _number(cells[at]) is None}
            elif cells:
                errors.append((reader.line_num, f"{len(cells)} cells under a header of {len(header)}"))
    except (csv.Error, OverflowError) as error:
        yield max(reader.line_num, 1), f"not valid CSV ({error})"
        return
    twice = [name for name, count in Counter(header).items() if count > 1]
    if twice or (header and "path" not in header):
        yield 1, f"column {twice[0]!r} is given twice" if twice else f"no column 'path'; columns: {', '.join(header)}"
        return
    yield from errors
    # Read again: what a column holds is known at the end, and all rows at once would fill the memory.
    names = {header[at] for at in numeric}
    reader = csv.reader(text_lines(path), strict=True)
    next(reader, None)
    for cells in reader:
        if len(cells) == len(header):
            yield reader.line_num, {name: _cell(cell, name, names) for name, cell in zip(header, cells, strict=True)}


def _cell(text: str, column: str, numeric: set[str]) -> str | int | float | None:
    if not text.strip():
        return None
    number = _number(text) if column in numeric or column in NUMBERS else None
    return text if number is None else number


def _number(text: str) -> int | float | None:
    """The number that `text` spells, or None."""
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text.strip(), re.ASCII):
        return None
    return int(text) if re.fullmatch(r"[-+]?\d{1,18}", text.strip()) else float(text)


def parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow.parquet as parquet

    number = text = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if "path" not in columns:
                raise ManifestError(f"{path}: no column 'path'; columns: {', '.join(columns[:MAX_COLUMNS])}")
            if len(columns) > MAX_COLUMNS or file.metadata.num_rows > MAX_ROWS:
                raise ManifestError(f"{path}: {_too_large(file.metadata.num_rows, len(columns))}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                for row in _python_values(batch):
                    number += 1
                    text += sum(len(value) for value in row.values() if isinstance(value, str | bytes))
                    if text > MAX_BYTES:
                        raise ManifestError(
                            f"{path}: more than the {MAX_BYTES:,} bytes of text allowed, by row {number:,}"
                        )
                    yield number, {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
    except ManifestError:
        raise
    # Of damaged files and columns; text that is not UTF-8 (ValueError), dates beyond Python's (ArithmeticError).
    except (ValueError, OSError, NotImplementedError, ArithmeticError) as error:
        raise ManifestError(f"{path}: not a readable Parquet file ({error})") from error


def _python_values(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows of a record batch. Few at a time: a text that is stored once for all of them has a copy in each."""
    step = min(max(PARQUET_BYTES // max(batch.nbytes, 1), 1), PARQUET_ROWS)
    for start in range(0, batch.num_rows, step):
        yield from _to_python(batch.slice(start, step))


def _to_python(batch: Any) -> list[dict[str, Any]]:
    """Dates beyond Python's years come as text."""
    import pyarrow as pa

    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError):
        names = [column.cast(pa.string()) if pa.types.is_temporal(column.type) else column for column in batch.columns]
        return pa.RecordBatch.from_arrays(names, names=batch.schema.names).to_pylist()


def _too_large(rows: int, columns: int) -> str:
    return f"{rows:,} rows of {columns:,} columns; a manifest has at most {MAX_ROWS:,} rows and {MAX_COLUMNS:,} columns"


# --------------------------------------------------------------------------------------- folders of clips

# Videos that a folder is searched for; images are stdit.data.decoding.IMAGE_SUFFIXES.
VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".ogv",
    ".3gp", ".y4m",
}  # fmt: skip
CAPTION_SUFFIX = ".txt"
# Clips below this folder are of the split of its name; all others are of split train.
VALIDATION_FOLDER = "validation"
# Caption objects that are read at a time.
READ_THREADS = 16
# A longer caption file is no caption.
MAX_CAPTION_BYTES = 1 << 20


@dataclass(frozen=True)
class ClipFolder:
    """Files below a folder, as paths relative to it, each list sorted: clips, captions by clip, and how many other
    files."""

    clips: tuple[str, ...]
    captions: Mapping[str, str]
    other_files: int


def scan_folder(folder: Path) -> ClipFolder:
    """Walks `folder`, without following linked folders. Hidden files and folders are not looked at.

    Raises ManifestError: a manifest lies in it (which of the two is meant?); it holds no clip; a subfolder cannot be
    read.
    """

    def unreadable(error: OSError) -> None:
        raise ManifestError(f"{error.filename}: cannot be read ({error.strerror})")

    files = []
    for place, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name).relative_to(folder).as_posix() for name in names]
    return clip_folder(folder, files)


def clip_folder(folder: Path | Url, files: Iterable[str]) -> ClipFolder:
    """Clips and captions among `files`, paths relative to `folder`. ManifestError: as scan_folder."""
    from stdit.data.decoding import IMAGE_SUFFIXES

    clips, texts, others = [], [], 0
    for name in files:
        path = PurePosixPath(name)
        hidden = any(part.startswith(".") for part in path.parts)
        if path.suffix.lower() in VIDEO_SUFFIXES | IMAGE_SUFFIXES and not hidden:
            clips.append(name)
        elif path.suffix.lower() == CAPTION_SUFFIX and not hidden:
            texts.append(name)
        elif path.suffix.lower() in READERS and path.stem == "manifest" and len(path.parts) == 1:
            raise ManifestError(f"{folder}: holds {name}; give {folder / name}, or move it out of the folder of clips")
        else:
            others += 1
    if not clips:
        found = f"{len(texts)} {CAPTION_SUFFIX} files and {others} others" if texts or others else "it is empty"
        kinds = " ".join(sorted(VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise ManifestError(f"{folder}: no clip in this folder ({found}); clips end in {kinds}")
    by_stem = {path.rpartition(".")[0]: path for path in sorted(texts)}
    captions = {clip: by_stem[stem] for clip in sorted(clips) if (stem := clip.rpartition(".")[0]) in by_stem}
    return ClipFolder(tuple(sorted(clips)), captions, others + len(texts) - len(set(captions.values())))


def folder_rows(folder: Path | Url, found: ClipFolder) -> Iterator[Row]:
    """A row a clip: its path, and as caption the text of NAME.txt beside NAME.mp4 (UTF-8); null where there is none."""
    owners: dict[str, str] = {}
    with ThreadPoolExecutor(READ_THREADS if isinstance(folder, Url) else 1) as pool:
        read = {text: pool.submit(read_caption, folder / text) for text in set(found.captions.values())}
    for number, clip in enumerate(found.clips, 1):
        text = found.captions.get(clip)
        split = {"split": VALIDATION_FOLDER} if clip.startswith(f"{VALIDATION_FOLDER}/") else {}
        if text is None:
            yield number, {"path": clip, "caption": None, **split}
        elif (owner := owners.setdefault(text, clip)) != clip:
            yield number, f"{owner} and {clip} share the caption file {text}; give clips in one folder different names"
        else:
            try:
                yield number, {"path": clip, "caption": read[text].result(), **split}
            except ManifestError as error:
                yield number, str(error)


def read_caption(path: Path | Url) -> str:
    try:
        if isinstance(path, Url):
            return objects.read(path, MAX_CAPTION_BYTES).decode("utf-8-sig")
        return "".join(text_lines(path, MAX_CAPTION_BYTES))
    except OSError as error:
        raise ManifestError(f"{path.name}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path.name}: not UTF-8 (byte {error.start})") from error


# ---------------------------------------------------------------------------------------- readers by suffix

READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": jsonl_rows,
    ".ndjson": jsonl_rows,
    ".csv": csv_rows,
    ".parquet": parquet_rows,
}
