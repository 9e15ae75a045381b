"""A manifest's own clips, seen from evaluation: which of them stand for a shape, what their columns say, their frames.

Held-out captions become prompts here, and held-out clips the ceiling that generated ones are measured against.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.config import Bucket, EvaluationConfig
from stdit.data.decoding import DecodeError, open_clip
from stdit.data.manifest import Clip, Manifest, ManifestError, read
from stdit.data.transforms import resize_crop, window
from stdit.evaluation.classifier import DIRECTIONS, Frames
from stdit.files import atomic_write


def check_columns(manifest: Manifest, config: EvaluationConfig) -> None:
    """ManifestError where a column that the settings name is in no row (the default ones may be absent)."""
    usual = EvaluationConfig()
    for setting in ("class_column", "direction_column"):
        column = getattr(config, setting)
        if column is not None and column != getattr(usual, setting) and column not in manifest.columns:
            known = ", ".join(sorted(manifest.columns))
            raise ManifestError(f"{manifest.path}: {setting}: no column {column!r}; columns: {known}")


def class_of(clip: Clip, config: EvaluationConfig) -> str | None:
    """The clip's class as text; None where it has none."""
    value = None if config.class_column is None else clip.value(config.class_column)
    return None if value is None else str(value)


def direction_of(clip: Clip, config: EvaluationConfig) -> str | None:
    """The clip's direction; None where it has none. ManifestError: a word that is no direction."""
    value = None if config.direction_column is None else clip.value(config.direction_column)
    if value is not None and value not in DIRECTIONS:
        raise ManifestError(
            f"{clip.file}: row {clip.row}: column {config.direction_column!r} holds {value!r}; "
            f"a direction is one of {', '.join(DIRECTIONS)}"
        )
    return None if value is None else str(value)


def select(manifest: Manifest, split: str, shape: Bucket, enough: int, seed: int) -> list[Clip]:
    """Clips of `split` that are, or can be cut to, `shape`, in an order that `seed` draws.

    All those of that very shape; only if they are fewer than `enough`, larger and longer ones make up the number.
    """
    here = [clip for clip in manifest if clip.split == split]
    order = np.random.default_rng([seed, 1]).permutation(len(here))
    exact: list[Clip] = []
    larger: list[Clip] = []
    for clip in (here[i] for i in order):
        found = _shape(clip)
        wanted = (shape.frames, shape.height, shape.width)
        if found == wanted:
            exact.append(clip)
        elif found is not None and all(f >= w for f, w in zip(found, wanted, strict=True)):
            larger.append(clip)
    return exact + larger[: max(0, enough - len(exact))]


def _shape(clip: Clip) -> tuple[int, int, int] | None:
    """(frames, height, width): the manifest's, or else the file's; None where that cannot be read."""
    if clip.frames is not None and clip.height is not None and clip.width is not None:
        return clip.frames, clip.height, clip.width
    try:
        with open_clip(clip.file, "pyav") as reader:
            return reader.frame_count, reader.height, reader.width
    except DecodeError:
        return None


def held_out_prompts(
    manifest: Path, count: int, shape: Bucket, seed: int = 0, config: EvaluationConfig | None = None
) -> list[dict[str, Any]]:
    """`count` captions of held-out clips of `shape` as prompts: prompt, class, direction (None for images), seed.

    Classes and directions take turns, so that each is asked for equally often, as far as there are captions; where
    there are fewer captions than `count` they come again, with other seeds. ManifestError: none at all.
    """
    config = config or EvaluationConfig()
    source = read(manifest)
    check_columns(source, config)
    clips = select(source, config.validation_split, shape, count, seed)
    if not clips:
        raise ManifestError(
            f"{manifest}: no clip of split {config.validation_split!r} has, or can be cut to, {shape.key}; "
            f"splits: {source.splits}"
        )
    groups: dict[tuple[str, str], list[Clip]] = {}
    for clip in clips:
        key = (class_of(clip, config) or "", direction_of(clip, config) or "")
        groups.setdefault(key, []).append(clip)
    chosen = _take_turns([groups[key] for key in sorted(groups)], count, seed)
    return [
        {
            "prompt": clip.caption,
            "class": class_of(clip, config),
            "direction": direction_of(clip, config) if shape.frames > 1 else None,
            "seed": seed + i,
        }
        for i, clip in enumerate(chosen)
    ]


def _take_turns(groups: Sequence[Sequence[Clip]], count: int, seed: int) -> list[Clip]:
    """One of each group, in an order drawn anew each round, until there are `count`; a group used up begins again.

    An unfinished last round would favour the groups that stand first: hence the drawn order.
    """
    chosen: list[Clip] = []
    turn = 0
    while len(chosen) < count:
        order = np.random.default_rng([seed, 2, turn]).permutation(len(groups))
        chosen += [groups[i][turn % len(groups[i])] for i in order]
        turn += 1
    return chosen[:count]


def write_prompts(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Prompts as JSONL for stdit.generate; a file that says the same already is left alone."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        atomic_write(path, text)


def load(clip: Clip, shape: Bucket) -> Frames:
    """The clip cut to `shape` as extraction cuts it: its first frames, scaled down and cropped at the centre. DecodeError."""
    with open_clip(clip.file, "pyav") as reader:
        if reader.frame_count < shape.frames:
            raise DecodeError(clip.file, f"has {reader.frame_count} frames, {shape.frames} are needed")
        return resize_crop(reader.get(window(reader.frame_count, shape.frames)), shape.height, shape.width)


def load_all(clips: Sequence[Clip], shape: Bucket) -> Iterator[tuple[Clip, Frames]]:
    """Each clip that can be decoded, with its frames; a damaged held-out clip is passed over."""
    for clip in clips:
        try:
            frames = load(clip, shape)
        except DecodeError:
            continue
        yield clip, frames


def load_frame(clip: Clip, rng: np.random.Generator) -> Frames | None:
    """One frame drawn from the clip, (1, H, W, 3); None where it cannot be decoded."""
    try:
        with open_clip(clip.file, "pyav") as reader:
            return reader.get([int(rng.integers(reader.frame_count))])
    except DecodeError:
        return None
