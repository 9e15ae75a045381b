"""Clips of the validation split: their captions are the prompts, their frames the reference of an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.config import Bucket, EvaluationConfig
from stdit.config.identity import FrameSampling
from stdit.config.model import ClassConditioning
from stdit.data.buckets import dropped_for_shape
from stdit.data.clip_frames import open_row, read_row, row_info
from stdit.data.decoding import ClipInfo, DecodeError
from stdit.data.frame_sampling import FIRST_FRAMES, sampled_count, sampled_indices
from stdit.data.manifest import Clip, Manifest, ManifestError, read
from stdit.data.probe import stated_info
from stdit.data.transforms import resize_crop
from stdit.evaluation.classifier import DIRECTIONS, Frames
from stdit.files import atomic_write


def check_columns(manifest: Manifest, config: EvaluationConfig) -> None:
    """ManifestError: a configured column that is in no row (the default columns may be absent), a held-out clip's
    direction that is none."""
    default = EvaluationConfig()
    for setting in ("class_column", "direction_column"):
        column = getattr(config, setting)
        if column is not None and column != getattr(default, setting) and column not in manifest.columns:
            columns = ", ".join(sorted(manifest.columns))
            raise ManifestError(f"{manifest.path}: {setting}: no column {column!r}; columns: {columns}")
    for clip in manifest:
        if clip.split == config.validation_split:
            direction_of(clip, config)


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


def check_clips(
    manifest: Manifest,
    split: str,
    shape: Bucket,
    classes: ClassConditioning = None,
    sampling: FrameSampling = FIRST_FRAMES,
) -> None:
    """ManifestError: no clip of `split` has, or can be cropped to, `shape`; or none that can has a class, which a model
    of classes needs. Files are opened only as far as the manifest states no sizes. sampling: which frames of a clip are
    taken."""
    held_out = sorted((clip for clip in manifest if clip.split == split), key=lambda clip: clip.frames is None)
    with_class = [clip for clip in held_out if classes != "required" or clip.class_name is not None]
    if any(_fits(clip, shape, sampling) for clip in with_class):
        return
    where = f"{manifest.path}: validation_split {split!r}"
    if len(with_class) < len(held_out) and any(_fits(clip, shape, sampling) for clip in held_out):
        raise ManifestError(
            f"{where}: the model is class-conditional, but {len(held_out) - len(with_class)} of {len(held_out)} clips have no class "
            f"(column class), and none that has one is {shape.key} or larger"
        )
    sizes = sorted(size for clip in held_out if (size := _shape(clip, sampling)) is not None)
    taken = sampling.of_one_window.changed
    slow = sum(_shape(clip, sampling, shape) != _shape(clip, sampling) for clip in held_out) if sampling.buckets else 0
    raise ManifestError(
        f"{where}: none of its {len(held_out)} clips has, or can be cropped to, {shape.key} (frames x height x width)"
        + (f"; the longest is {'x'.join(map(str, sizes[-1]))}" if sizes else "")
        + (f" (frames as extracted: {', '.join(f'{key} {value}' for key, value in taken.items())})" if taken else "")
        + (f"; {slow} are of a frame rate that its buckets do not take (min_fps, max_fps)" if slow else "")
        + ("" if held_out else f"; splits: {', '.join(manifest.splits)}")
    )


def _fits(clip: Clip, shape: Bucket, sampling: FrameSampling) -> bool:
    size = _shape(clip, sampling, shape)
    target = (shape.frames, shape.height, shape.width)
    return size is not None and all(s >= t for s, t in zip(size, target, strict=True))


def stated_count(
    manifest: Manifest, split: str, shape: Bucket, min_count: int, sampling: FrameSampling = FIRST_FRAMES
) -> int:
    """How many clips `select` gives at least: by the sizes that the manifest states."""
    target = (shape.frames, shape.height, shape.width)
    stated = [size for clip in manifest if clip.split == split and (size := _stated_shape(clip, sampling, shape))]
    exact = sum(size == target for size in stated)
    covering = sum(all(s >= t for s, t in zip(size, target, strict=True)) for size in stated)
    return exact + min(covering - exact, max(0, min_count - exact))


def select(
    manifest: Manifest,
    split: str,
    shape: Bucket,
    min_count: int,
    seed: int,
    classes: ClassConditioning = None,
    sampling: FrameSampling = FIRST_FRAMES,
) -> list[Clip]:
    """Clips of `split` that have, or can be cropped to, `shape`, in a random order (`seed`); classes: of a model of
    classes alone, those that have one. sampling: which frames of a clip are taken; it has as many as those.

    All clips of exactly that shape; larger and longer ones only to fill up to `min_count`.
    """
    candidates = [clip for clip in manifest if clip.split == split]
    if classes == "required":
        candidates = [clip for clip in candidates if clip.class_name is not None]
    order = np.random.default_rng([seed, 1]).permutation(len(candidates))
    exact: list[Clip] = []
    larger: list[Clip] = []
    for clip in (candidates[i] for i in order):
        size = _shape(clip, sampling, shape)
        target = (shape.frames, shape.height, shape.width)
        if size == target:
            exact.append(clip)
        elif size is not None and all(s >= t for s, t in zip(size, target, strict=True)):
            larger.append(clip)
    return exact + larger[: max(0, min_count - len(exact))]


def _stated_shape(clip: Clip, sampling: FrameSampling, shape: Bucket | None = None) -> tuple[int, int, int] | None:
    """(frames that are taken, height, width) as the manifest states them; None: not all of what that follows from. 0
    frames: no sample of `shape` is of its frame rate."""
    info = stated_info(clip, rate=sampling.needs_rate)
    return None if info is None else _sampled_shape(info, sampling, shape)


def _sampled_shape(info: ClipInfo, sampling: FrameSampling, shape: Bucket | None) -> tuple[int, int, int]:
    dropped = shape is not None and dropped_for_shape(info, sampling, shape) is not None
    return 0 if dropped else sampled_count(info, sampling), info.height, info.width


def _shape(clip: Clip, sampling: FrameSampling, shape: Bucket | None = None) -> tuple[int, int, int] | None:
    """(frames that are taken, height, width) from the manifest, else from the file; None if it cannot be read. As
    `_stated_shape`."""
    if (stated := _stated_shape(clip, sampling, shape)) is not None:
        return stated
    try:
        with open_row(clip) as reader:
            return _sampled_shape(row_info(clip, reader), sampling, shape)
    except DecodeError:
        return None


def validation_prompts(
    manifest: Path,
    count: int,
    shape: Bucket,
    seed: int = 0,
    config: EvaluationConfig | None = None,
    classes: ClassConditioning = None,
    sampling: FrameSampling = FIRST_FRAMES,
) -> list[dict[str, Any]]:
    """`count` captions of held-out clips of `shape` as prompts: prompt, class, direction (None for images), seed.

    sampling: which frames of a clip the model's extraction took, by which a clip has that shape.
    classes: of a class-conditional model; its prompts have the classes that it is trained on, the manifest's column
    class, whatever `config.class_column` measures (which is then `measured_class`). Balanced over classes and
    directions as far as there are captions; with fewer captions than `count` they repeat with other seeds.
    ManifestError: no such clip.
    """
    config = config or EvaluationConfig()
    source = read(manifest)
    check_columns(source, config)
    clips = select(source, config.validation_split, shape, count, seed, classes, sampling)
    if not clips:
        check_clips(source, config.validation_split, shape, classes, sampling)
    groups: dict[tuple[str, str], list[Clip]] = {}
    for clip in clips:
        named = (clip.class_name if classes else None) or class_of(clip, config)
        groups.setdefault((named or "", direction_of(clip, config) or ""), []).append(clip)
    chosen = _round_robin([groups[key] for key in sorted(groups)], count, seed)
    return [_prompt(clip, shape, seed + i, config, classes) for i, clip in enumerate(chosen)]


def _prompt(
    clip: Clip, shape: Bucket, seed: int, config: EvaluationConfig, classes: ClassConditioning
) -> dict[str, Any]:
    measured = class_of(clip, config)
    named = clip.class_name if classes else measured
    return {
        "prompt": clip.caption,
        "class": named,
        **({} if measured in (None, named) else {"measured_class": measured}),
        "direction": direction_of(clip, config) if shape.frames > 1 else None,
        "seed": seed,
    }


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


def load_clip(clip: Clip, shape: Bucket, sampling: FrameSampling = FIRST_FRAMES) -> Frames:
    """The clip cropped to `shape` as in extraction: the frames that it takes, resized, centre crop. Raises
    DecodeError."""
    with open_row(clip) as reader:
        found = row_info(clip, reader)
        if (count := sampled_count(found, sampling)) < shape.frames:
            raise DecodeError(clip.file, f"has {count} frames, needs {shape.frames}")
        frames = read_row(clip, reader, sampled_indices(found, shape.frames, sampling))
        return resize_crop(frames, shape.height, shape.width)


def load_clips(
    clips: Sequence[Clip], shape: Bucket, sampling: FrameSampling = FIRST_FRAMES
) -> Iterator[tuple[Clip, Frames]]:
    """Each clip that can be decoded, with its frames; damaged clips are skipped."""
    for clip in clips:
        try:
            frames = load_clip(clip, shape, sampling)
        except DecodeError:
            continue
        yield clip, frames


def load_frame(clip: Clip, rng: np.random.Generator) -> Frames | None:
    """One random frame of the clip, (1, H, W, 3); None if it cannot be decoded."""
    try:
        with open_row(clip) as reader:
            return read_row(clip, reader, [int(rng.integers(row_info(clip, reader).frame_count))])
    except DecodeError:
        return None
