"""An extraction as a whole: its parts, the settings that bind them, and the end, when the features count as whole.

    out/extraction.json    the settings that decide the features: written first, compared at every later run
        parts/, shards/    one record and one shard a part (records.py, features.py)
        report.json, samples.parquet, index.json    written last, in this order

Nothing here decodes or encodes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from stdit.config import ConfigError, ExtractConfig
from stdit.config.diff import EXTRACTION_RUNTIME_KEYS, changes
from stdit.data import records
from stdit.data.features import FORMAT, INDEX, REPORT, SAMPLES, samples_schema, shard_path
from stdit.data.manifest import check_where, matches, read
from stdit.data.records import Part, Tally
from stdit.files import atomic_path, atomic_write

SETTINGS = "extraction.json"
# Threads that look whether sources have changed: waiting for the disk, not computing.
LOOKERS = 16


class ExtractionError(ValueError):
    """An extraction whose result cannot be used. report.json has been written and says why."""


@dataclass(frozen=True)
class Plan:
    """All parts of an extraction, and what is known before the first clip is opened."""

    config: ExtractConfig
    parts: tuple[Part, ...]
    classes: tuple[str, ...]
    # Clips of the manifest that `where` leaves out.
    filtered: int
    # Paths of clips without a caption: their text features are those of the empty caption.
    uncaptioned: tuple[str, ...]
    # SHA-256 of the manifest.
    manifest: str
    # What decides the features, besides clips and captions.
    settings: dict[str, Any]

    @property
    def clips(self) -> int:
        """Clips that are opened."""
        return sum(len(part.clips) for part in self.parts)

    @property
    def bad_allowed(self) -> int:
        """As many clips may be undecodable."""
        return int(self.config.max_bad_share * self.clips)


def divide(config: ExtractConfig, encoders: Mapping[str, Any]) -> Plan:
    """The clips of the manifest that meet `where`, in parts of a shard each. `encoders`: what identifies them.

    Raises ManifestError: the manifest, or a condition on a column that it has not. ConfigError: no clip is left.
    """
    manifest = read(config.manifest)
    check_where(manifest, config.where)
    columns = records.free_columns(manifest)
    kept = [(number, clip) for number, clip in enumerate(manifest) if matches(clip, config.where)]
    if not kept:
        raise ConfigError(f"{config.manifest}: none of its {len(manifest)} clips meets `where`")
    # `encoders` identifies them by their weights, not by where these lie.
    excluded = {*EXTRACTION_RUNTIME_KEYS, "video_encoder", "text_encoder"}
    # As it comes back from the file: tuples as lists.
    settings = json.loads(
        json.dumps({"format": FORMAT, **config.model_dump(mode="json", exclude=excluded), **encoders})
    )
    if config.control_column is None:
        del settings["control_column"]  # as features had it before there was one
    elif config.control_column not in manifest.columns:
        raise ConfigError(
            f"control_column: {config.manifest} has no column {config.control_column!r}; columns: {', '.join(sorted(manifest.columns))}"
        )
    bound = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    step = config.clips_per_shard
    chunks = [kept[start : start + step] for start in range(0, len(kept), step)]
    parts = tuple(
        Part(number, tuple(i for i, _ in chunk), tuple(clip for _, clip in chunk), columns, bound)
        for number, chunk in enumerate(chunks)
    )
    uncaptioned = tuple(clip.key for _, clip in kept if not clip.captioned)
    if config.text_encoder and len(uncaptioned) == len(kept):
        raise ConfigError(
            f"text_encoder: none of the {len(kept)} clips of {config.manifest} has a caption; give captions, or leave "
            "text_encoder out to train without text"
        )
    classes = tuple(manifest.classes)
    return Plan(config, parts, classes, len(manifest) - len(kept), uncaptioned, manifest.fingerprint, settings)


def claim(plan: Plan, overwrite: bool = False) -> None:
    """Writes the settings into the plan's folder, or compares them with those that lie there.

    ConfigError: features of other settings (discarded with `overwrite`), or a folder of something else.
    """
    out = plan.config.out
    file = out / SETTINGS
    if file.is_file():
        try:
            changed = changes(json.loads(file.read_text(encoding="utf-8")), plan.settings)
        except ValueError as error:
            raise ConfigError(f"{file}: damaged ({error}); remove {out} and extract again") from error
        if not changed:
            return
        if not overwrite:
            lines = "\n".join(f"  {change}" for change in changed)
            raise ConfigError(
                f"{out} holds features of another config:\n{lines}\nChoose another out, or discard them with --overwrite"
            )
        # From here on nothing in the folder counts as whole.
        for path in (out / INDEX, *(out / "parts").glob("*.parquet")):
            path.unlink(missing_ok=True)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"out: {out} exists and holds no extraction; features go into a folder of their own")
    atomic_write(file, json.dumps(plan.settings, indent=2) + "\n")


def unfinished(plan: Plan) -> tuple[list[Part], str]:
    """The parts to extract, and a line that says why."""
    with ThreadPoolExecutor(LOOKERS) as pool:
        reasons = list(pool.map(lambda part: records.stale(plan.config.out, part), plan.parts))
    todo = [part for part, reason in zip(plan.parts, reasons, strict=True) if reason is not None]
    if not todo and plan.config.text_encoder and _empty_caption(plan.config.out, plan.parts) is None:
        # Features from before it was kept: one shard made again brings it.
        todo = [part for part in plan.parts if shard_path(plan.config.out, part.number).is_file()][:1]
        if todo:
            return todo, f"{len(todo)} of {len(plan.parts)} shards to extract again, for the empty caption's features"
    again = [reason for reason in reasons if reason not in (None, records.NEW)]
    line = f"{len(todo)} of {len(plan.parts)} shards to extract"
    return todo, f"{line}, {len(again)} of them again ({again[0]})" if again else line


def _empty_caption(out: Path, parts: Sequence[Part]) -> dict[str, Any] | None:
    """Where the empty caption's features are: {"shard": number, "sha256": …} of the first part that has them."""
    for part in parts:
        record = records.record_path(out, part.number)
        if record.is_file() and (digest := records.metadata(record).get("empty_caption")):
            return {"shard": part.number, "sha256": digest}
    return None


def finish(plan: Plan) -> Path:
    """Writes report.json, then, if the features can be used, samples.parquet and index.json. Returns the folder.

    Raises ExtractionError after the report is written: too many bad clips, nothing kept, parts missing,
    or parts made with different weights.
    """
    out = plan.config.out
    tally, told = _sum(plan)
    report = tally.report([b.key for b in plan.config.buckets], plan.filtered, plan.config.max_bad_share)
    uncaptioned = {"uncaptioned": len(plan.uncaptioned), "uncaptioned_clips": list(plan.uncaptioned)}
    _write_json(out / REPORT, {**report, **uncaptioned, "missing_parts": len(plan.parts) - len(told)})
    if len(tally.bad) > plan.bad_allowed:
        (out / INDEX).unlink(missing_ok=True)
        shown = "\n".join(f"  {clip['path']}: {clip['reason']}" for clip in tally.bad[:5])
        stopped = "" if tally.clips == plan.clips else f" (stopped after {tally.clips})"
        raise ExtractionError(
            f"{len(tally.bad)} of {plan.clips} clips{stopped} cannot be used, more than the {plan.bad_allowed} that "
            f"max_bad_share {plan.config.max_bad_share:g} allows; all are named in {out / REPORT}:\n{shown}"
        )
    if len(told) < len(plan.parts):
        raise ExtractionError(f"{out}: {len(plan.parts) - len(told)} of {len(plan.parts)} parts are missing; run again")
    if not tally.kept_count:
        dropped = ", ".join(f"{count} {reason}" for reason, count in report["dropped_by_reason"].items())
        raise ExtractionError(f"none of {plan.clips} clips is kept ({dropped or 'all bad'}); see {out / REPORT}")
    wanted = encoder_settings(plan.settings)
    if other := next((says for says in told if json.loads(says["settings"]) != wanted), None):
        raise ExtractionError(
            f"{out}: a part was made with other encoders (other weights on one of the machines?); extract again with "
            f"--overwrite. Wanted {json.dumps(wanted)}, found {other['settings']}"
        )
    index = _index(plan, tally, told, report)
    if not _is_whole(out, index):
        (out / INDEX).unlink(missing_ok=True)
        _write_samples(plan)
        _tidy(plan)
        _write_json(out / INDEX, index)
    return out


def read_report(out: Path) -> dict[str, Any]:
    """An extraction's report.json."""
    return json.loads((out / REPORT).read_text(encoding="utf-8"))


def report_lines(report: Mapping[str, Any], shown: int = 5) -> list[str]:
    """What became of the manifest's clips and captions, from report.json. shown: bad clips that are named."""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped_by_reason"].items())
    lines = [
        f"clips: {report['clips']:,} = {report['kept']:,} kept + {report['dropped']:,} dropped"
        + (f" ({reasons})" if reasons else "")
        + f" + {report['bad']:,} that can't be used"
    ]
    for key, splits in report["kept_by_bucket"].items():
        lines.append(f"  {key:<12} " + (", ".join(f"{count:,} {split}" for split, count in splits.items()) or "none"))
    lines += [f"  {clip['path']}: {clip['reason']}" for clip in report["bad_clips"][:shown]]
    if len(report["bad_clips"]) > shown:
        lines.append(f"  … and {len(report['bad_clips']) - shown} more, all in {REPORT}")
    if report["captions_cut"]:
        lines.append(f"captions: {report['captions_cut']:,} of {report['kept']:,} cut at text_encoder.max_text_tokens")
    if report.get("uncaptioned"):
        names = report["uncaptioned_clips"]
        more = f", … ({REPORT} has all)" if len(names) > shown else ""
        lines.append(f"captions: {len(names):,} clips have none: {', '.join(names[:shown])}{more}")
    return lines


def _is_whole(out: Path, index: Mapping[str, Any]) -> bool:
    """Whether index.json says `index`, and samples.parquet has as many samples."""
    try:
        found = json.loads((out / INDEX).read_text(encoding="utf-8"))
        return found == index and parquet.read_metadata(out / SAMPLES).num_rows == index["samples"]
    except (OSError, ValueError):  # not there, or damaged
        return False


def _sum(plan: Plan) -> tuple[Tally, list[dict[str, str]]]:
    """The sum of the records that there are, and what each says of itself."""
    tally, told = Tally(), []
    for part in plan.parts:
        record = records.record_path(plan.config.out, part.number)
        if record.is_file() and (says := records.metadata(record))["key"] == part.key:
            told.append(says)
            tally.add(parquet.read_table(record))
    return tally, told


def encoder_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The encoders' share of a plan's settings; every part's record has it too."""
    return {key: settings[key] for key in ("video_encoder", "text_encoder")}


def _index(plan: Plan, tally: Tally, told: list[dict[str, str]], report: dict[str, Any]) -> dict[str, Any]:
    controls = [row["digest"] for says in told for row in records.controls(says)]
    bound = json.dumps([plan.classes, [part.key for part in plan.parts], tally.sources, *controls])
    empty = _empty_caption(plan.config.out, plan.parts)
    return {
        "format": FORMAT,
        "fingerprint": hashlib.sha256(bound.encode()).hexdigest(),
        "samples": tally.kept_count,
        "buckets": report["kept_by_bucket"],
        "classes": list(plan.classes),
        "posterior": any(says["posterior"] == "true" for says in told),
        **json.loads(told[0]["encoders"]),
        **({"empty_caption": empty} if empty else {}),
        "manifest": {"path": str(plan.config.manifest), "sha256": plan.manifest},
        "config": plan.settings,
    }


def _write_samples(plan: Plan) -> None:
    """The kept clips of all records in one table, a part at a time."""
    schema = samples_schema(plan.parts[0].extra)
    labels = {name: label for label, name in enumerate(plan.classes)}
    with atomic_path(plan.config.out / SAMPLES) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
        for part in plan.parts:
            table = parquet.read_table(records.record_path(plan.config.out, part.number))
            table = table.filter(pa.array([status == "kept" for status in table["status"].to_pylist()], pa.bool_()))
            label = pa.array([labels.get(name, -1) for name in table["class"].to_pylist()], pa.int32())
            table = table.append_column("class_label", label)
            writer.write_table(table.select(schema.names).cast(schema))


def _tidy(plan: Plan) -> None:
    """Removes shards of an older, longer manifest and what killed writers left."""
    out = plan.config.out
    wanted = {shard_path(out, part.number).name for part in plan.parts}
    wanted |= {records.record_path(out, part.number).name for part in plan.parts}
    ours = re.compile(r"\d{5,}\.(safetensors|parquet)|\..*\.part\..*|\.tmp\w+")
    for folder in ("shards", "parts"):
        for path in (out / folder).glob("*"):
            if path.name not in wanted and ours.fullmatch(path.name):
                path.unlink()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
