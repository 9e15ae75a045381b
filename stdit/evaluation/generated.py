"""Reads a folder written by stdit.generate: its clips, the conditions of each, and the sampling settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from stdit.config import ConfigError, FileSchema, check, validate
from stdit.config.identity import FrameSampling
from stdit.data.decoding import DecodeError, open_clip
from stdit.data.frame_sampling import FIRST_FRAMES
from stdit.evaluation.classifier import Frames
from stdit.files import fingerprint_file, fingerprint_files, read_jsonl

MANIFEST = "manifest.jsonl"


class GeneratedRow(FileSchema):
    """A row of manifest.jsonl; further keys are the prompt's own and the shape's."""

    model_config = ConfigDict(extra="allow")

    file: Annotated[str, Field(pattern=r"^[^/\x00]+$")] | None
    """A file in the same folder; null: the prompt failed."""
    error: str | None = None
    prompt: str | None = None
    class_name: str | int | None = Field(default=None, alias="class")
    # Where the class that is measured is another one than the model was conditioned on.
    measured_class: str | None = None
    direction: str | None = None
    seed: int | None = None
    fps: float | None = Field(default=None, gt=0)
    protocol: dict[str, Any] | None = None


@dataclass(frozen=True)
class GeneratedClip:
    """One generated clip: file (relative to the folder), requested conditions (None: not conditioned), frames."""

    file: str
    prompt: str
    seed: int | None
    class_name: str | None
    direction: str | None
    frames: Frames
    row: Mapping[str, Any]


def read_generated(videos: Path, limit: int | None = None) -> tuple[list[GeneratedClip], list[str]]:
    """The clips of `videos` in the order of its manifest.jsonl (the first `limit`), and the errors of failed prompts.

    ValueError: no manifest, no clip, a file that cannot be decoded, clips of different shapes.
    """
    manifest = videos / MANIFEST
    clips: list[GeneratedClip] = []
    failures: list[str] = []
    for row in read_rows(videos):
        if row.get("error") or row.get("file") is None:
            failures.append(f"{row.get('prompt')!r}: {row.get('error') or 'no file'}")
            continue
        if limit is not None and len(clips) >= limit:
            break
        asked = {"class": row.get("measured_class", row.get("class")), "direction": row.get("direction")}
        requested = {key: None if value is None else str(value) for key, value in asked.items()}
        frames = _decode(videos / row["file"])
        prompt = str(row.get("prompt") or "")
        clips.append(
            GeneratedClip(row["file"], prompt, row.get("seed"), requested["class"], requested["direction"], frames, row)
        )
    if not clips:
        raise ValueError(f"{manifest}: no clip was generated, {len(failures)} failed: {'; '.join(failures[:3])}")
    shapes = sorted({clip.frames.shape[:3] for clip in clips})
    if len(shapes) > 1:
        raise ValueError(
            f"{videos}: clips of {len(shapes)} shapes (frames, height, width) {shapes}; evaluate each by itself"
        )
    return clips, failures


def sampling_protocol(clips: Sequence[GeneratedClip]) -> dict[str, Any]:
    """Sampling settings that the clips share, with their shape and seeds.

    A setting that differs between clips (some generated before it was changed) becomes a list of its values.
    """
    frames, height, width = clips[0].frames.shape[:3]
    seeds = [clip.seed for clip in clips if clip.seed is not None]
    found: dict[str, list[Any]] = {}
    for clip in clips:
        for key, value in (clip.row.get("protocol") or {}).items():
            if value not in (values := found.setdefault(key, [])):
                values.append(value)
    return {
        "frames": frames,
        "height": height,
        "width": width,
        "fps": clips[0].row.get("fps"),
        **{key: values[0] if len(values) == 1 else values for key, values in found.items()},
        "seeds": {"first": min(seeds), "last": max(seeds), "different": len(set(seeds))} if seeds else None,
        "captions": {"count": len(clips), "different": len({clip.prompt for clip in clips})},
    }


def extracted_frames(rows: Sequence[Mapping[str, Any]], videos: Path) -> FrameSampling:
    """Which frames of a clip the extraction took whose features the model of these rows of manifest.jsonl was trained
    on; the first ones, where they don't say. ConfigError: rows that differ, or hold something else."""
    found = [row["protocol"].get("frame_sampling") for row in rows if isinstance(row.get("protocol"), dict)]
    if any(one != found[0] for one in found):
        raise ConfigError(f"{videos / MANIFEST}: protocol.frame_sampling differs between rows; evaluate each by itself")
    if not found or found[0] is None:
        return FIRST_FRAMES
    return validate(found[0], FrameSampling, f"{videos / MANIFEST}: protocol.frame_sampling")


def fingerprint_videos(videos: Path) -> str:
    """Hex SHA-256 of a folder's manifest.jsonl and the files that it lists. ValueError: no manifest."""
    files = [videos / str(row["file"]) for row in read_rows(videos)]
    return fingerprint_files(
        [videos / MANIFEST, *files], lambda path: fingerprint_file(path) if path.is_file() else "-"
    )


def read_rows(videos: Path) -> list[dict[str, Any]]:
    """The rows of a folder's manifest.jsonl. ValueError: there is none, or a row that is no GeneratedRow."""
    manifest = videos / MANIFEST
    if not manifest.is_file():
        raise ValueError(f"{manifest}: no such file; {videos} was not written by stdit.generate")
    rows = read_jsonl(manifest)
    for number, row in enumerate(rows, 1):
        check(row, GeneratedRow, f"{manifest}:{number}")
    return rows


def _decode(path: Path) -> Frames:
    try:
        with open_clip(path, "pyav") as reader:
            return reader.get(range(reader.frame_count))
    except DecodeError as error:
        raise ValueError(f"{error}; delete the file and run the same command to generate it again") from error
