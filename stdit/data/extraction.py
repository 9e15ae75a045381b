"""Planning and completing an extraction: its shards, the settings that they share, and the index written last.

    out/extraction.json    settings that determine the features: written first, compared by every later run
        parts/, shards/    a record and a shard each (records.py, features.py)
        report.json, samples.parquet, index.json    written last, in this order

Nothing here decodes or encodes. Where `out` is a URL, this is a folder of this machine (stdit.data.staging).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from pydantic import ConfigDict

from stdit.config import ENCODERS, ConfigError, ExtractConfig, FileSchema, NonNegative, Share, Url, read_json
from stdit.config.diff import EXTRACTION_RUNTIME_KEYS, changes
from stdit.console import count_of
from stdit.data import objects, records
from stdit.data.features import (
    FORMAT,
    INDEX,
    REPORT,
    SAMPLES,
    read_index,
    samples_schema,
    shard_path,
)
from stdit.data.filters import check_where, passes
from stdit.data.manifest import read
from stdit.data.object_cache import ObjectCache
from stdit.data.records import ReportTotals, ShardSpec, SpentSeconds
from stdit.data.staging import PARTS, SHARDS, Staging, local_folder, staging_of
from stdit.errors import WorkFailed
from stdit.files import atomic_path, atomic_write, check_writable, seal, sha256
from stdit.outputs import check_outputs, claim_outputs, own_outputs

SETTINGS = "extraction.json"
COMMAND, OUTPUTS = "extract", (SETTINGS, INDEX, REPORT, SAMPLES, "parts", "shards")
# Names of files in `parts` and `shards`, and of those that killed writers have left there.
_OUR_FILES = re.compile(r"\d{5,}\.(safetensors|parquet)|\..*\.part\..*|\.tmp\w+")
# A clip that keeps less of its pictures than this is mentioned at the end.
MENTIONED_CROP = 0.8
# A larger share of the encoders' time spent waiting for clips is mentioned at the end.
MENTIONED_WAIT = 0.1
# Threads that check sources for changes: they wait for the disk.
CHECK_THREADS = 16


class ExtractionSettings(FileSchema):
    """extraction.json: the keys of ExtractConfig that determine features, and the encoders' settings. Compared key by
    key."""

    model_config = ConfigDict(extra="allow")

    format: int
    video_encoder: dict[str, Any]
    text_encoder: dict[str, Any] | None
    vision_encoder: dict[str, Any] | None = None


class BadClip(FileSchema):
    path: str
    reason: str


class DroppedClip(FileSchema):
    path: str
    reason: str | None
    detail: str | None


class CroppedClip(FileSchema):
    path: str
    bucket: str
    kept: Share


class MisstatedClip(FileSchema):
    path: str
    detail: str


class ExtractionReport(FileSchema):
    """report.json: counts of clips, and those that were dropped, bad or without a caption by name."""

    clips: NonNegative
    kept: NonNegative
    samples: NonNegative
    kept_by_bucket: dict[str, dict[str, NonNegative]]
    kept_share_by_bucket: dict[str, Share]
    used_frames_by_bucket: dict[str, Share]
    most_cropped_clips: tuple[CroppedClip, ...]
    frame_rates: dict[str, NonNegative]
    misstated_clips: tuple[MisstatedClip, ...]
    dropped: NonNegative
    dropped_by_reason: dict[str, NonNegative]
    dropped_clips: tuple[DroppedClip, ...]
    bad: NonNegative
    bad_share: Share
    max_bad_share: Share
    bad_clips: tuple[BadClip, ...]
    captions_cut: NonNegative
    text_tokens: NonNegative
    uncaptioned: NonNegative
    uncaptioned_clips: tuple[str, ...]
    missing_parts: NonNegative
    seconds: SpentSeconds


class ExtractionError(WorkFailed):
    """An extraction whose result cannot be used. report.json has been written and says why."""


@dataclass(frozen=True)
class ExtractionPlan:
    """All shards of an extraction, planned before any clip is opened."""

    config: ExtractConfig
    shards: tuple[ShardSpec, ...]
    classes: tuple[str, ...]
    # Clips of the manifest that `where` excludes.
    filtered: int
    # Paths of clips without a caption: their text features are those of the empty caption.
    uncaptioned: tuple[str, ...]
    # Fingerprint of the manifest.
    manifest: str
    # What determines the features, besides clips and captions.
    settings: dict[str, Any]

    @property
    def staging(self) -> Staging | None:
        """Of features at a URL."""
        return staging_of(self.config)

    @property
    def folder(self) -> Path:
        """Folder of this machine in which the features are made."""
        return local_folder(self.config)

    @property
    def clips(self) -> int:
        """Number of clips to open."""
        return sum(len(spec.clips) for spec in self.shards)

    @property
    def bad_allowed(self) -> int:
        """Number of clips that may fail."""
        return int(self.config.max_bad_share * self.clips)


def plan_extraction(config: ExtractConfig, encoders: Mapping[str, Any]) -> ExtractionPlan:
    """Divides the clips that pass `where` into shards. encoders: their identities.

    Raises ManifestError: the manifest, or a condition on a column that it has not. ConfigError: no clip passes, or none
    has a caption though there is a text encoder.
    """
    manifest = read(config.manifest)
    check_where(manifest, config.where)
    columns = records.extra_columns(manifest)
    if config.windows is not None:  # samples say which frames of the file they are
        columns = tuple(sorted({**dict(columns), "start_frame": "int64", "end_frame": "int64"}.items()))
    passed = passes(manifest.clips, config.where)
    kept = [(number, clip) for number, clip in enumerate(manifest) if passed[number]]
    if not kept:
        raise ConfigError(f"{config.manifest}: none of its {len(manifest)} clips meets `where`")
    # `encoders` identifies them by their weights, not by where these lie.
    excluded = {*EXTRACTION_RUNTIME_KEYS, *ENCODERS}
    # As it comes back from the file: tuples as lists.
    settings = json.loads(
        json.dumps({"format": FORMAT, **config.model_dump(mode="json", exclude=excluded), **encoders})
    )
    # Left out where they change nothing, as features had it before there were these keys.
    for key in ("control_column", "target_fps", "images_from_videos", "captions", "windows"):
        if not settings[key]:
            del settings[key]
    for bucket in settings["buckets"]:
        for key in ("min_fps", "max_fps"):
            if bucket[key] is None:
                del bucket[key]
    for condition in settings["where"]:
        for key in ("top", "per"):
            if condition[key] is None:
                del condition[key]
    if absent := [name for name in config.captions if f"caption_{name}" not in manifest.columns]:
        raise ConfigError(
            f"captions: {config.manifest} has no column 'caption_{absent[0]}'; columns: {', '.join(sorted(manifest.columns))}"
        )
    if config.captions and config.text_encoder is None:
        raise ConfigError(f"captions: {', '.join(config.captions)} need a text_encoder")
    if config.control_column is not None and config.control_column not in manifest.columns:
        raise ConfigError(
            f"control_column: {config.manifest} has no column {config.control_column!r}; columns: {', '.join(sorted(manifest.columns))}"
        )
    settings_digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    step = config.clips_per_shard
    chunks = [kept[start : start + step] for start in range(0, len(kept), step)]
    shards = tuple(
        ShardSpec(
            number,
            tuple(i for i, _ in chunk),
            tuple(clip for _, clip in chunk),
            columns,
            settings_digest,
            config.most_windows,
        )
        for number, chunk in enumerate(chunks)
    )
    uncaptioned = tuple(clip.id for _, clip in kept if not clip.captioned)
    if config.text_encoder and len(uncaptioned) == len(kept):
        raise ConfigError(
            f"text_encoder: none of the {len(kept)} clips of {config.manifest} has a caption; give captions, or leave "
            "text_encoder out to train without text"
        )
    classes = tuple(manifest.classes)
    return ExtractionPlan(
        config, shards, classes, len(manifest) - len(kept), uncaptioned, manifest.fingerprint, settings
    )


def write_settings(plan: ExtractionPlan, overwrite: bool = False) -> None:
    """Writes the settings into the output folder, or compares them with those of an earlier run.

    ConfigError: features of other settings (discarded with `overwrite`), or a folder with other files.
    """
    out = plan.folder
    if plan.staging:
        claim_outputs(out, COMMAND, OUTPUTS)
        plan.staging.pull(SETTINGS)
    file = out / SETTINGS
    if file.exists():
        try:
            changed = changes(read_json(file, ExtractionSettings), plan.settings)
        except ConfigError as error:
            if not overwrite:
                raise ConfigError(f"{error}; discard the features there with --overwrite") from error
            changed = []
        else:
            if not changed:
                return
        if not overwrite:
            lines = "\n".join(f"  {change}" for change in changed)
            raise ConfigError(
                f"{plan.config.out} holds features of another config ({SETTINGS}):\n{lines}\nChoose another out, or discard them with --overwrite"
            )
        check_outputs(out, COMMAND, OUTPUTS)
        check_writable(out)
        # From here on the folder is incomplete.
        if plan.staging:
            plan.staging.remove([INDEX])  # records of other settings count for nothing
        for path in (out / INDEX, *(out / "parts").glob("*.parquet")):
            if path.parent == out or _OUR_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
    elif out.exists() and (not out.is_dir() or (any(out.iterdir()) and not own_outputs(out, COMMAND))):
        raise ConfigError(f"out: {out} exists and holds no extraction; features go into a folder of their own")
    check_writable(out)
    claim_outputs(out, COMMAND, OUTPUTS)
    atomic_write(file, json.dumps(plan.settings, indent=2) + "\n")
    if plan.staging:
        plan.staging.push(SETTINGS)


def pending_shards(plan: ExtractionPlan) -> tuple[list[ShardSpec], str]:
    """The shards to extract, and a line that says why."""
    cache, stored = ObjectCache.of(plan.config.cache), plan.staging and plan.staging.stored()
    with ThreadPoolExecutor(CHECK_THREADS) as pool:
        reasons = list(pool.map(lambda spec: records.stale_reason(plan.folder, spec, cache, stored), plan.shards))
    todo = [spec for spec, reason in zip(plan.shards, reasons, strict=True) if reason is not None]
    again = [reason for reason in reasons if reason not in (None, records.NEW)]
    line = f"{len(todo)} of {len(plan.shards)} shards to extract"
    return todo, f"{line}, {len(again)} of them again ({again[0]})" if again else line


def finish(plan: ExtractionPlan) -> Path | Url:
    """Writes report.json, then samples.parquet and index.json, which complete the features. Returns the folder, or URL.

    Raises ExtractionError after the report is written: too many bad clips, nothing kept, missing shards,
    or shards of encoders with different weights.
    """
    out, staging = plan.folder, plan.staging
    if staging:  # records of other machines
        staging.pull(SETTINGS)
    totals, found = _read_records(plan)
    report = totals.report([b.key for b in plan.config.buckets], plan.filtered, plan.config.max_bad_share)
    uncaptioned = {"uncaptioned": len(plan.uncaptioned), "uncaptioned_clips": list(plan.uncaptioned)}
    before = (out / REPORT).read_bytes() if (out / REPORT).is_file() else None
    _write_json(out / REPORT, {**report, **uncaptioned, "missing_parts": len(plan.shards) - len(found)})
    if staging and (out / REPORT).read_bytes() != before:
        staging.push(REPORT)
    if len(totals.bad) > plan.bad_allowed:
        _remove_index(plan)
        shown = "\n".join(f"  {clip['path']}: {clip['reason']}" for clip in totals.bad[:5])
        stopped = "" if totals.clips == plan.clips else f" (stopped after {totals.clips})"
        raise ExtractionError(
            f"{len(totals.bad)} of {plan.clips} clips{stopped} cannot be used, more than the {plan.bad_allowed} that "
            f"max_bad_share {plan.config.max_bad_share:g} allows; all are named in {out / REPORT}:\n{shown}"
        )
    if len(found) < len(plan.shards):
        raise ExtractionError(
            f"{out}: {len(plan.shards) - len(found)} of {len(plan.shards)} shards are missing; run again"
        )
    if not totals.samples:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped_by_reason"].items())
        raise ExtractionError(f"none of {plan.clips} clips is kept ({dropped or 'all bad'}); see {out / REPORT}")
    expected = encoder_settings(plan.settings)
    if other := next((info for info in found.values() if info["settings"] != expected), None):
        raise ExtractionError(
            f"{out}: a shard was extracted with other encoders (other weights on one of the machines?); extract again with "
            f"--overwrite. Expected {json.dumps(expected)}, found {json.dumps(other['settings'])}"
        )
    index = _index(plan, totals, found, report)
    if not _is_complete(out, index):
        _remove_index(plan)
        _write_samples(plan)
        _remove_stale_files(plan)
        index["samples_sha256"] = sha256(out / SAMPLES)
        _write_json(out / INDEX, seal(index))
        if staging:
            staging.push(SAMPLES, INDEX)
    return plan.config.out


def _remove_index(plan: ExtractionPlan) -> None:
    """The features are incomplete."""
    if plan.staging:
        plan.staging.remove([INDEX])
    (plan.folder / INDEX).unlink(missing_ok=True)


def read_report(out: Path | Url) -> dict[str, Any]:
    """An extraction's report.json. ConfigError: gone or damaged. StoreError."""
    return objects.read_json(out / REPORT, ExtractionReport)


def report_lines(report: Mapping[str, Any], shown: int = 5) -> list[str]:
    """What became of the manifest's clips and captions, from report.json. shown: bad clips that are named."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped_by_reason"].items())
    lines = [
        f"clips: {report['clips']:,} = {report['kept']:,} kept + {report['dropped']:,} dropped"
        + (f" ({reasons})" if reasons else "")
        + f" + {report['bad']:,} that can't be used"
        + (f"; {report['samples']:,} samples" if report["samples"] != report["kept"] else "")
    ]
    for key, splits in report["kept_by_bucket"].items():
        cropped = 1 - report["kept_share_by_bucket"].get(key, 1.0)
        used = report["used_frames_by_bucket"].get(key, 1.0)
        crop = f"; {cropped:.0%} of the pixels are cropped, {used:.0%} of the frames used" if splits else ""
        counts = ", ".join(f"{count:,} {split}" for split, count in splits.items())
        lines.append(f"  {key:<12} {counts or 'none'}{crop}")
    lines += [f"  {clip['path']}: {clip['reason']}" for clip in report["bad_clips"][:shown]]
    if len(report["bad_clips"]) > shown:
        lines.append(f"  … and {len(report['bad_clips']) - shown} more, all in {REPORT}")
    cropped = [clip for clip in report["most_cropped_clips"] if clip["kept"] < MENTIONED_CROP]
    if cropped:
        named = ", ".join(f"{clip['path']} ({clip['kept']:.0%} in {clip['bucket']})" for clip in cropped[:shown])
        lines.append(f"most cropped: {named}; a bucket of their aspect would keep more")
    if len(rates := report["frame_rates"]) > 1:
        named = ", ".join(f"{rate} ({count_of(count, 'clip')})" for rate, count in list(rates.items())[:shown])
        more = f" and {len(rates) - shown} more" if len(rates) > shown else ""
        lines.append(
            f"frame rates differ: {named}{more}; target_fps resamples, min_fps and max_fps of buckets keep them apart"
        )
    if misstated := report["misstated_clips"]:
        first = f"{misstated[0]['path']}: {misstated[0]['detail']}"
        lines.append(f"not as the manifest says, taken as they are: {count_of(len(misstated), 'clip')} ({first})")
    if report["captions_cut"]:
        lines.append(f"captions: {report['captions_cut']:,} of {report['kept']:,} cut at text_encoder.max_text_tokens")
    if report["uncaptioned"]:
        names = report["uncaptioned_clips"]
        more = f", … ({REPORT} has all)" if len(names) > shown else ""
        lines.append(f"captions: {count_of(len(names), 'clip')} without one: {', '.join(names[:shown])}{more}")
    return lines + _spent_line(report["seconds"], sum(report[key] for key in ("kept", "bad")))


def _spent_line(seconds: Mapping[str, float], clips: int) -> list[str]:
    """Where the time of an extraction went, if it took any."""
    if not (clips and seconds["total"]):
        return []
    each = ", ".join(f"{seconds[name] / clips:.3g} {name}" for name in ("decode", "encode", "wait"))
    busy, waiting = seconds["encode"] / seconds["total"], seconds["wait"] / seconds["total"]
    more = f"; {waiting:.0%} was waiting for clips: raise decoder_workers" if waiting > MENTIONED_WAIT else ""
    return [f"seconds a clip: {each}; encoders were busy {busy:.0%} of the time{more}"]


def _is_complete(out: Path, index: Mapping[str, Any]) -> bool:
    """Whether index.json says what `index` does, and samples.parquet is what index.json says."""
    try:
        found = read_index(out)
        return all(found[key] == value for key, value in index.items()) and found["samples_sha256"] == sha256(
            out / SAMPLES
        )
    except (OSError, ConfigError):  # not there, or damaged
        return False


def _read_records(plan: ExtractionPlan) -> tuple[ReportTotals, dict[int, dict[str, Any]]]:
    """Totals over the records that are there and whole, and the info of each by its shard's number."""
    totals, found = ReportTotals(), {}
    for spec in plan.shards:
        try:
            info, rows = records.read_record(plan.folder, spec)
        except ValueError:  # finish says that it is missing
            continue
        found[spec.number] = info
        totals.add(rows, info["seconds"], spec.windows)
    return totals, found


def encoder_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a plan's settings about encoders, which every record has too."""
    return {key: settings[key] for key in ENCODERS if key in settings}


def _index(
    plan: ExtractionPlan, totals: ReportTotals, found: Mapping[int, dict[str, Any]], report: dict[str, Any]
) -> dict[str, Any]:
    """index.json but for what follows from samples.parquet. found: the shards' infos, by number."""
    control_states = [state["digest"] for info in found.values() for state in info["controls"]]
    digest_input = json.dumps([plan.classes, [spec.key for spec in plan.shards], totals.sources, *control_states])
    # Every shard with text has the empty caption.
    empty = next(({"shard": n, "sha256": i["empty_caption"]} for n, i in found.items() if i["empty_caption"]), None)
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(digest_input.encode()).hexdigest(),
        "samples": totals.samples,
        "shards": {
            str(number): {"bytes": info["shard_bytes"], "sha256": info["shard_sha256"]}
            for number, info in found.items()
            if info["shard_sha256"]
        },
        "buckets": report["kept_by_bucket"],
        "classes": list(plan.classes),
        "posterior": any(info["posterior"] for info in found.values()),
        **found[plan.shards[0].number]["encoders"],
        "empty_caption": empty,
        "manifest": {"path": str(plan.config.manifest), "sha256": plan.manifest},
        "config": plan.settings,
    }


def _write_samples(plan: ExtractionPlan) -> None:
    """Writes samples.parquet: the kept clips of all records, one shard at a time."""
    schema = samples_schema(plan.shards[0].extra)
    labels = {name: label for label, name in enumerate(plan.classes)}
    with atomic_path(plan.folder / SAMPLES) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for spec in plan.shards:
            table = records.read_record(plan.folder, spec)[1]
            table = table.filter(pa.array([status == "kept" for status in table["status"].to_pylist()], pa.bool_()))
            label = pa.array([labels.get(name, -1) for name in table["class"].to_pylist()], pa.int32())
            table = table.append_column("class_label", label)
            writer.write_table(table.select(schema.names).cast(schema))


def _remove_stale_files(plan: ExtractionPlan) -> None:
    """Removes shards of an older, longer manifest, and temporary files of killed writers."""
    out = plan.folder
    wanted = {shard_path(out, spec.number).name for spec in plan.shards}
    wanted |= {records.record_path(out, spec.number).name for spec in plan.shards}
    for folder in ("shards", "parts"):
        for path in (out / folder).glob("*"):
            if path.name not in wanted and _OUR_FILES.fullmatch(path.name):
                path.unlink()
    if plan.staging:
        ours = (name for name in plan.staging.stored() if name.startswith((SHARDS, PARTS)))
        names = ((name, name.rpartition("/")[2]) for name in ours)
        plan.staging.remove(name for name, file in names if file not in wanted and _OUR_FILES.fullmatch(file))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
