"""Records of an extraction: what became of each clip of a shard, and the totals over all shards.

    out/parts/00000.parquet    a row per clip of the shard (per window, of several): status, reason, and size, time and
                               hash of its file

A record is written after its shard, so a shard with a record is complete. It is up to date while its rows of
the manifest, and the files that they name, are unchanged, and the shard has the SHA-256 that the record says.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import Field

from stdit.config import Bucket, ConfigError, FileSchema, NonNegative, SealedSchema, Sha256, Url, check
from stdit.config.identity import TextIdentity, VideoIdentity, VisionIdentity
from stdit.data import objects
from stdit.data.buckets import kept_share
from stdit.data.features import MANIFEST_COLUMNS, SAMPLE_COLUMNS, shard_path
from stdit.data.manifest import RESERVED_COLUMNS, Clip, Manifest
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError, is_of_object
from stdit.files import atomic_path, fingerprint_file, parse_json, seal, sha256

# Beside the columns of samples.parquet. status: kept, dropped (fits no bucket) or bad (cannot be decoded).
RECORD = {name: kind for name, kind in SAMPLE_COLUMNS.items() if name != "class_label"}
# used_frames: of the clip, by all of its samples.
STATUS = {
    "status": pa.string(), "reason": pa.string(), "detail": pa.string(), "cut": pa.bool_(), "used_frames": pa.int32(),
}  # fmt: skip
SOURCE = {"size": pa.int64(), "mtime_ns": pa.int64(), "digest": pa.string()}
# Integers up to here are exact as 64-bit floats.
EXACT = 2**53
# Clips that the report names as those of which cropping loses most.
MOST_CROPPED = 20
# `stale_reason` of a shard that has not been extracted yet.
NEW = "new"
# Key of a record's Parquet metadata that holds its RecordInfo.
_INFO = b"stdit"


class Encoders(FileSchema):
    """Identities of the encoders, in full."""

    video_encoder: VideoIdentity
    text_encoder: TextIdentity | None
    vision_encoder: VisionIdentity | None = None


class ControlState(FileSchema):
    """A clip's control input: its path in the manifest, and `source_state` of the file."""

    path: str | None
    size: int
    mtime_ns: int
    digest: str


class SpentSeconds(FileSchema):
    """Where the time of a shard went, or of all of them. decode: summed over decoders, from opening a file (and
    fetching it) to its frames. wait: the encoder waited for clips. total: of the process that encodes, writing
    included."""

    decode: float = Field(ge=0)
    encode: float = Field(ge=0)
    wait: float = Field(ge=0)
    total: float = Field(ge=0)


class RecordInfo(SealedSchema):
    """What a record says of its shard, beside a row per clip."""

    key: Sha256
    """ShardSpec.key."""
    shard_sha256: Sha256 | None
    """null: no clip is kept, there is no shard."""
    shard_bytes: NonNegative
    rows_sha256: Sha256
    """Of the record's rows: Parquet's checksums leave its headers out."""
    posterior: bool
    empty_caption: Sha256 | None
    """`digest_of` its features, where there is text."""
    controls: tuple[ControlState, ...]
    """One for each clip with control_column, else none."""
    encoders: Encoders
    settings: dict[str, Any]
    """Of the encoders, as far as they determine features."""
    seconds: SpentSeconds


@dataclass(frozen=True)
class ShardSpec:
    """The clips of one shard: consecutive rows of the manifest. `ids`: their positions in it. Small enough to send to a
    worker.

    The samples of clip i have the ids i * windows to (i + 1) * windows - 1, in the order of its windows."""

    number: int
    ids: tuple[int, ...]
    clips: tuple[Clip, ...]
    # Extra columns of the manifest and their Arrow types, the same for all shards.
    columns: tuple[tuple[str, str], ...]
    # SHA-256 of the settings that decide features.
    settings: str
    # Samples of a clip at most.
    windows: int = 1

    def has_samples(self, ids: Sequence[int]) -> bool:
        """Whether `ids` are those of samples of all clips, of each its first ones, in order."""
        first = [id for id in ids if id % self.windows == 0]
        following = all(b == a + 1 for a, b in itertools.pairwise(ids) if b % self.windows)
        return first == [id * self.windows for id in self.ids] and following

    @cached_property
    def key(self) -> str:
        """SHA-256 of the settings and of what the manifest says of these clips."""
        rows = [
            (i, c.key, c.caption, c.class_name, c.split, c.fps, c.frames, c.height, c.width, sorted(c.extra.items()))
            + ((c.start_frame, c.end_frame, c.crop) if c.end_frame or c.crop else ())
            for i, c in zip(self.ids, self.clips, strict=True)
        ]
        return hashlib.sha256(json.dumps([rows, self.columns, self.settings]).encode()).hexdigest()

    @property
    def extra(self) -> dict[str, pa.DataType]:
        return {name: pa.type_for_alias(kind) for name, kind in self.columns}


@dataclass(frozen=True)
class ShardResult:
    """Result of extracting one shard: its clips, and how many of them cannot be used."""

    number: int
    clips: int
    bad: int


def extra_columns(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    """The manifest's extra columns, each with the Arrow type that represents all its values.

    ConfigError: a column whose name features need for themselves.
    """
    kinds: dict[str, set[type]] = {}
    long: dict[str, int] = {}
    for clip in manifest:
        for name, value in [*clip.extra.items(), *part_columns(clip).items()]:
            kinds.setdefault(name, set()).add(type(value))
            if isinstance(value, int) and abs(value) > EXACT:
                long.setdefault(name, value)
    if taken := sorted(set(kinds) & set(RESERVED_COLUMNS)):
        raise ConfigError(f"{manifest.path}: column {taken[0]!r} has a name that features use themselves; rename it")
    if lossy := [name for name in long if float in kinds[name]]:
        raise ConfigError(
            f"{manifest.path}: column {lossy[0]!r} holds fractions and {long[lossy[0]]}, which no 64-bit fraction holds exactly"
        )
    return tuple((name, _type(found - {type(None)})) for name, found in sorted(kinds.items()))


def part_columns(clip: Clip) -> dict[str, Any]:
    """The columns that say which part of its file a clip is, where it is one."""
    part = {name: clip.value(name) for name in ("start_frame", "end_frame", "crop")}
    return {name: value for name, value in part.items() if value is not None}


def _type(kinds: set[type]) -> str:
    for kind, name in ((str, "string"), (float, "double"), (int, "int64"), (bool, "bool")):
        if kind in kinds:
            return name
    return "string"  # nothing but nulls


def source_state(file: Path | Url, cache: ObjectCache) -> dict[str, Any]:
    """A source file's size, modification time (of an object: a number of its version) and fingerprint; size -1 if it
    cannot be read. StoreError: a store that does not answer."""
    try:
        size, mtime = _size_and_time(file)
        with cache.local(file) as path:
            return {"size": size, "mtime_ns": mtime, "digest": fingerprint_file(path)}
    except OSError as error:
        if isinstance(error, StoreError) and not is_of_object(error):
            raise
        return {"size": -1, "mtime_ns": 0, "digest": ""}


def _size_and_time(file: Path | Url) -> tuple[int, int]:
    if isinstance(file, Url):
        found = objects.stat(file)
        return found.size, int.from_bytes(hashlib.sha256(found.version.encode()).digest()[:7], "big")
    stat = file.stat()
    if not S_ISREG(stat.st_mode):  # opening a pipe would wait for ever
        raise OSError(f"{file} is not a file")
    return stat.st_size, stat.st_mtime_ns


def record_path(out: Path, number: int) -> Path:
    return out / "parts" / f"{number:05d}.parquet"


def write_record(out: Path, spec: ShardSpec, rows: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> None:
    """Writes the record that marks a shard as complete. info: RecordInfo without `key` and `rows_sha256`. OSError: no
    space, no permission."""
    schema = pa.schema({**RECORD, **MANIFEST_COLUMNS, **STATUS, **SOURCE, **spec.extra})
    table = pa.Table.from_pylist([dict(row) for row in rows], schema)
    sealed = seal({"key": spec.key, "rows_sha256": _rows_digest(table), **info})
    with atomic_path(record_path(out, spec.number)) as temporary:
        parquet.write_table(
            table.replace_schema_metadata({_INFO: json.dumps(sealed)}), temporary, write_page_checksum=True
        )


def _rows_digest(table: pa.Table) -> str:
    return hashlib.sha256(json.dumps(table.to_pylist()).encode()).hexdigest()


def read_record(out: Path, spec: ShardSpec) -> tuple[dict[str, Any], pa.Table]:
    """A shard's RecordInfo and its rows, one for each clip or window. ValueError, with the path: it cannot be read, or
    is of other clips."""
    record = record_path(out, spec.number)
    schema = pa.schema({**RECORD, **MANIFEST_COLUMNS, **STATUS, **SOURCE, **spec.extra})
    try:
        table = parquet.read_table(record, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{record} cannot be read ({error})") from error
    text = (table.schema.metadata or {}).get(_INFO)
    if text is None:
        raise ValueError(f"{record} is no record of an extraction")
    try:
        info = parse_json(text.decode())
        check(info, RecordInfo, str(record))
    except ValueError as error:
        raise ValueError(f"{record} is damaged ({error})") from error
    if info["key"] != spec.key:
        raise ValueError("the settings, or what the manifest says of its clips, have changed")
    counts = (0, len(spec.clips))
    if (
        not table.schema.equals(schema)
        or not spec.has_samples(table["id"].to_pylist())
        or _rows_digest(table) != info["rows_sha256"]
        or len(info["controls"]) not in counts
    ):
        raise ValueError(f"{record} has other rows or columns than were written")
    return info, table


def stale_reason(out: Path, spec: ShardSpec, cache: ObjectCache, stored: Mapping[str, int] | None = None) -> str | None:
    """Why a shard has to be extracted (again); None if shard and record are complete and nothing has changed.

    stored: of features at a URL, sizes of the objects there, by name. Reads every byte of the shard; of one that is at
    the URL alone, nothing but its size is compared (training compares the rest). A source with another time but the
    same size is compared by fingerprint: copying a dataset costs no extraction.
    """
    if not record_path(out, spec.number).exists():
        return NEW
    try:
        info, table = read_record(out, spec)
    except ValueError as error:
        return str(error)
    shard = shard_path(out, spec.number)
    if stored is not None and info["shard_sha256"] is not None and not shard.exists():
        if stored.get(f"shards/{shard.name}") != info["shard_bytes"]:
            return f"shards/{shard.name} is gone from the store, or has another size there"
    else:
        try:
            found = sha256(shard) if shard.exists() else None
        except OSError as error:
            return f"{shard} cannot be read ({error.strerror})"
        if found != info["shard_sha256"]:
            return f"{shard} is gone or damaged"
    rows = [row for row in table.select(["id", *SOURCE]).to_pylist() if row["id"] % spec.windows == 0]
    for row, clip in zip(rows, spec.clips, strict=True):
        if _is_changed(row, clip.location, cache):
            return f"{clip.location} has changed"
    for row, clip in zip(info["controls"], spec.clips if info["controls"] else (), strict=True):
        if row["path"] is not None and _is_changed(row, clip.beside(row["path"]), cache):
            return f"{clip.beside(row['path'])} has changed"
    return None


def _is_changed(row: Mapping[str, Any], file: Path | Url, cache: ObjectCache) -> bool:
    try:
        size, mtime = _size_and_time(file)
    except OSError as error:
        if isinstance(error, StoreError) and not is_of_object(error):
            raise
        return row["size"] != -1
    if row["size"] != -1 and size != row["size"]:
        return True
    if row["size"] != -1 and mtime == row["mtime_ns"]:
        return False
    return source_state(file, cache)["digest"] != row["digest"]


@dataclass
class ReportTotals:
    """Totals over records, for report.json."""

    clips: int = 0
    # Clips with samples; bucket -> split -> samples
    kept_clips: int = 0
    kept: dict[str, Counter[str]] = field(default_factory=dict)
    # reason -> clips
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_clips: list[dict[str, str]] = field(default_factory=list)
    bad: list[dict[str, str]] = field(default_factory=list)
    # Kept clips whose file has another length or size than the manifest says.
    misstated: list[dict[str, str]] = field(default_factory=list)
    # bucket -> the sum of the shares of their pictures that its clips keep when they are cropped
    kept_shares: dict[str, float] = field(default_factory=dict)
    most_cropped: list[dict[str, Any]] = field(default_factory=list)
    clips_by_bucket: Counter[str] = field(default_factory=Counter)
    # bucket -> frames of its clips, and how many of them are in a sample
    frames: Counter[str] = field(default_factory=Counter)
    used_frames: Counter[str] = field(default_factory=Counter)
    # frame rate of kept videos, to a thousandth -> clips
    frame_rates: Counter[float] = field(default_factory=Counter)
    captions_cut: int = 0
    tokens: int = 0
    # SHA-256 over the sources' fingerprints.
    sources: str = ""
    # SpentSeconds, summed over workers.
    seconds: Counter[str] = field(default_factory=Counter)

    def add(self, rows: pa.Table, seconds: Mapping[str, float], windows: int = 1) -> None:
        """Adds one record. seconds: SpentSeconds; windows: samples of a clip at most; but for the numbers of samples, a
        clip counts by its first."""
        self.seconds.update(seconds)
        self.sources = hashlib.sha256(json.dumps([self.sources, rows["digest"].to_pylist()]).encode()).hexdigest()
        columns = [
            "id",
            "status",
            "reason",
            "detail",
            "bucket",
            "split",
            "path",
            "cut",
            "text_length",
            "frames",
            "used_frames",
        ]
        for row in rows.select([*columns, "height", "width", "fps"]).to_pylist():
            key, path = row["bucket"], row["path"]
            if row["status"] == "kept":
                self.kept.setdefault(key, Counter())[row["split"]] += 1
            if row["id"] % windows:
                continue
            self.clips += 1
            if row["status"] == "kept":
                self.kept_clips += 1
                share = kept_share(row["height"], row["width"], Bucket.parse(key))
                self.kept_shares[key] = self.kept_shares.get(key, 0.0) + share
                if share < 1:
                    self.most_cropped.append({"path": path, "bucket": key, "kept": round(share, 4)})
                self.frames[key] += row["frames"]
                self.used_frames[key] += row["used_frames"]
                self.clips_by_bucket[key] += 1
                if row["fps"]:
                    self.frame_rates[round(row["fps"], 3)] += 1
                if row["detail"]:
                    self.misstated.append({"path": path, "detail": row["detail"]})
                self.captions_cut += row["cut"]
                self.tokens += row["text_length"]
            elif row["status"] == "dropped":
                self.dropped[row["reason"]] += 1
                self.dropped_clips.append({key: row[key] for key in ("path", "reason", "detail")})
            else:
                self.bad.append({"path": path, "reason": row["reason"] or "unknown"})
        self.most_cropped = sorted(self.most_cropped, key=lambda clip: (clip["kept"], clip["path"]))[:MOST_CROPPED]

    @property
    def samples(self) -> int:
        return sum(counts.total() for counts in self.kept.values())

    def report(self, buckets: Sequence[str], filtered: int, max_bad_share: float) -> dict[str, Any]:
        """Counts every clip of the manifest once. filtered: clips that `where` excluded before anything was read."""
        reasons = {**({"where": filtered} if filtered else {}), **dict(sorted(self.dropped.items()))}
        return {
            "clips": self.clips + filtered,
            "kept": self.kept_clips,
            "samples": self.samples,
            "kept_by_bucket": {key: dict(sorted(self.kept.get(key, Counter()).items())) for key in buckets},
            # Mean share of the pictures that is left after cropping to a bucket's aspect; share of the clips' frames
            # that are in a sample; the clips of which cropping leaves least.
            "kept_share_by_bucket": {
                key: round(self.kept_shares[key] / count, 4) for key in buckets if (count := self.clips_by_bucket[key])
            },
            "used_frames_by_bucket": {
                key: round(self.used_frames[key] / count, 4) for key in buckets if (count := self.frames[key])
            },
            "most_cropped_clips": self.most_cropped,
            "frame_rates": {f"{rate:g}": count for rate, count in self.frame_rates.most_common()},
            "misstated_clips": self.misstated,
            "dropped": sum(reasons.values()),
            "dropped_by_reason": reasons,
            "dropped_clips": self.dropped_clips,
            "bad": len(self.bad),
            "bad_share": len(self.bad) / max(1, self.clips),
            "max_bad_share": max_bad_share,
            "bad_clips": self.bad,
            "captions_cut": self.captions_cut,
            "text_tokens": self.tokens,
            "seconds": {name: round(self.seconds[name], 3) for name in SpentSeconds.model_fields},
        }
