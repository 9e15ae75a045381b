"""Clips of the validation split: their captions are the prompts, their frames the reference of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.config import Bucket, EvaluationConfig
from stdit.data.decoding import DecodeError, open_clip
from stdit.data.manifest import Clip, Manifest, ManifestError, read
from stdit.data.transforms import frame_indices, resize_crop
from stdit.evaluation.classifier import DIRECTIONS, Frames
from stdit.files import atomic_write


def check_columns(manifest: Manifest, config: EvaluationConfig) -> None:
    """ManifestError: a configured column that is in no row (the default columns may be absent)."""
    default = EvaluationConfig()
    for setting in ("class_column", "direction_column"):
        column = getattr(config, setting)
        if column is not None and column != getattr(default, setting) and column not in manifest.columns:
            columns = ", ".join(sorted(manifest.columns))
            raise ManifestError(f"{manifest.path}: {setting}: no column {column!r}; columns: {columns}")


def class_of(clip: Clip, config: EvaluationConfig) -> str | None:
    """The clip's class as text, or None."""
    value = None if config.class_column is None else clip.value(config.class_column)
    return None if value is None else str(value)


def direction_of(clip: Clip, config: EvaluationConfig) -> str | None:
    """The clip's motion direction, or None. ManifestError: not one of DIRECTIONS."""
    value = None if config.direction_column is None else clip.value(config.direction_column)
    if value is not None and value not in DIRECTIONS:
        raise ManifestError(
            f"{clip.file}: row {clip.row}: column {config.direction_column!r} holds {value!r}; "
            f"a direction is one of {', '.join(DIRECTIONS)}"
        )
    return None if value is None else str(value)


def select(manifest: Manifest, split: str, shape: Bucket, min_count: int, seed: int) -> list[Clip]:
    """Clips of `split` that have, or can be cropped to, `shape`, in a random order (`seed`).

    All clips of exactly that shape; larger and longer ones only to fill up to `min_count`.
    """
    candidates = [clip for clip in manifest if clip.split == split]
    order = np.random.default_rng([seed, 1]).permutation(len(candidates))
    exact: list[Clip] = []
    larger: list[Clip] = []
    for clip in (candidates[i] for i in order):
        size = _shape(clip)
        target = (shape.frames, shape.height, shape.width)
        if size == target:
            exact.append(clip)
        elif size is not None and all(s >= t for s, t in zip(size, target, strict=True)):
            larger.append(clip)
    return exact + larger[: max(0, min_count - len(exact))]


def _shape(clip: Clip) -> tuple[int, int, int] | None:
    """(frames, height, width) from the manifest, else from the file; None if it cannot be read."""
    if clip.frames is not None and clip.height is not None and clip.width is not None:
        return clip.frames, clip.height, clip.width
    try:
        with open_clip(clip.file, "pyav") as reader:
            return reader.frame_count, reader.height, reader.width
    except DecodeError:
        return None


def validation_prompts(
    manifest: Path, count: int, shape: Bucket, seed: int = 0, config: EvaluationConfig | None = None
) -> list[dict[str, Any]]:
    """`count` captions of held-out clips of `shape` as prompts: prompt, class, direction (None for images), seed.

    Balanced over classes and directions as far as there are captions; with fewer captions than `count` they repeat
    with other seeds. ManifestError: no such clip.
    """
    config = config or EvaluationConfig()
    source = read(manifest)
    check_columns(source, config)
    clips = select(source, config.validation_split, shape, count, seed)
    if not clips:
        raise ManifestError(
            f"{manifest}: no clip of split {config.validation_split!r} has, or can be cropped to, {shape.key}; "
            f"splits: {source.splits}"
        )
    groups: dict[tuple[str, str], list[Clip]] = {}
    for clip in clips:
        key = (class_of(clip, config) or "", direction_of(clip, config) or "")
        groups.setdefault(key, []).append(clip)
    chosen = _round_robin([groups[key] for key in sorted(groups)], count, seed)
    return [
        {
            "prompt": clip.caption,
            "class": class_of(clip, config),
            "direction": direction_of(clip, config) if shape.frames > 1 else None,
            "seed": seed + i,
        }
        for i, clip in enumerate(chosen)
    ]


def _round_robin(groups: Sequence[Sequence[Clip]], count: int, seed: int) -> list[Clip]:
    """One clip of each group per round until there are `count`; an exhausted group starts again.

    Each round has a random order, so that an incomplete last round favours no group.
    """
    chosen: list[Clip] = []
    turn = 0
    while len(chosen) < count:
        order = np.random.default_rng([seed, 2, turn]).permutation(len(groups))
        chosen += [groups[i][turn % len(groups[i])] for i in order]
        turn += 1
    return chosen[:count]


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes prompts as JSONL for stdit.generate; an identical file is not rewritten."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic_write(path, text)


def load_clip(clip: Clip, shape: Bucket) -> Frames:
    """The clip cropped to `shape` as in extraction: first frames, resized, centre crop. Raises DecodeError."""
    with open_clip(clip.file, "pyav") as reader:
        if reader.frame_count < shape.frames:
            raise DecodeError(clip.file, f"has {reader.frame_count} frames, needs {shape.frames}")
        return resize_crop(reader.get(frame_indices(reader.frame_count, shape.frames)), shape.height, shape.width)


def load_clips(clips: Sequence[Clip], shape: Bucket) -> Iterator[tuple[Clip, Frames]]:
    """Each clip that can be decoded, with its frames; damaged clips are skipped."""
    for clip in clips:
        try:
            frames = load_clip(clip, shape)
        except DecodeError:
            continue
        yield clip, frames


def load_frame(clip: Clip, rng: np.random.Generator) -> Frames | None:
    """One random frame of the clip, (1, H, W, 3); None if it cannot be decoded."""
    try:
        with open_clip(clip.file, "pyav") as reader:
            return reader.get([int(rng.integers(reader.frame_count))])
    except DecodeError:
        return None
