"""Scores of a folder of generated clips: is the class right, does it move the right way, how far from real clips is it.

    rows = held_out_prompts(manifest, 100, Bucket(frames=8, height=16, width=16))
    write_prompts(prompts, rows)
    generate(…)                                    # stdit.generate, into the folder `videos`
    scores = evaluate(videos, manifest, cache=folder)

Everything is also scored on real held-out clips of the same shape: that is the ceiling. Scores carry their protocol.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.config import Bucket, EvaluationConfig
from stdit.data import manifest as manifests
from stdit.data.manifest import Manifest
from stdit.evaluation.classifier import (
    DIRECTIONS,
    NO_DIRECTION,
    Frames,
    Reader,
    ReaderInfo,
    crops,
    direction,
    train_reader,
)
from stdit.evaluation.generated import Generated, fingerprint_of, protocol_of, read_generated
from stdit.evaluation.held_out import check_columns, class_of, direction_of, load_all, load_frame, select
from stdit.evaluation.metrics import accuracy, confusion, frechet_distance, kernel_distance
from stdit.files import atomic_write

# Raised when the same clips would be scored otherwise, so that scores and readers on disk are made anew.
VERSION = 2
SCORES = "scores.json"


@dataclass(frozen=True)
class Seen:
    """Clips of one shape with what was wanted of each (None: nothing) and what was seen in it."""

    frames: list[Frames]
    classes: list[str | None]
    directions: list[str | None]
    read: list[str]
    probabilities: list[float]
    features: np.ndarray  # (n, D); (n, 0) without a reader
    moved: list[str]

    def accuracies(self) -> dict[str, Any]:
        """class_accuracy and direction_accuracy (None where nothing was wanted), their intervals and counts."""
        pairs = {"class": (self.classes, self.read), "direction": (self.directions, self.moved)}
        found: dict[str, Any] = {"intervals": {}, "counts": {}, "confusion": {}}
        for name, (wanted, seen) in pairs.items():
            # Without a reader nothing was read, and no class is wanted.
            both = [(w, s) for w, s in zip(wanted, seen, strict=False) if w is not None]
            found["counts"][name] = len(both)
            found[f"{name}_accuracy"] = found["intervals"][name] = found["confusion"][name] = None
            if not both:
                continue
            asked, answered = [w for w, _ in both], [s for _, s in both]
            score, names = accuracy(asked, answered), _names(asked, answered, name)
            found[f"{name}_accuracy"] = score.value
            found["intervals"][name] = [score.low, score.high]
            found["confusion"][name] = {"names": names, "counts": confusion(asked, answered, names)}
        return found


def evaluate(
    videos: Path,
    manifest: Path,
    config: EvaluationConfig | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Scores the clips that stdit.generate wrote into `videos`, writes them to videos/scores.json, and returns them.

    manifest: the data's; its held-out clips are the reference, its train split teaches the reader. cache: where the
    trained reader is kept (default: beside `videos`). What class and direction were asked for stands in generate's
    manifest.jsonl, which carries a prompt's columns through. A second call with nothing changed reads scores.json.
    ValueError: no clips, clips of several shapes, a manifest that cannot be used.
    """
    config = config or EvaluationConfig()
    source = manifests.read(manifest)
    check_columns(source, config)
    fingerprint = _digest(VERSION, config.model_dump(mode="json"), fingerprint_of(videos), source.fingerprint)
    out = videos / SCORES
    if out.is_file():
        known = json.loads(out.read_text(encoding="utf-8"))
        if known.get("fingerprint") == fingerprint:
            return known
    scores = {"fingerprint": fingerprint, **_score(videos, source, config, cache or videos.parent)}
    text = json.dumps(scores, indent=1, ensure_ascii=False) + "\n"
    atomic_write(out, text)
    return json.loads(text)


def reader_for(source: Manifest, config: EvaluationConfig, cache: Path) -> Reader | None:
    """The reader of `source`'s classes, trained now or found in `cache`; None where there are not two classes to tell."""
    relevant = config.model_dump(mode="json", include=set(_READER_SETTINGS))
    fingerprint = _digest(VERSION, relevant, source.fingerprint)
    path = cache / f"reader-{fingerprint[:16]}.safetensors"
    if path.is_file():
        return Reader.load(path)
    images, names = _labelled_frames(source, config, config.train_split, config.reader_frames)
    classes = _sorted(set(names))
    if len(classes) < 2:
        return None
    info = ReaderInfo(tuple(classes), config.reader_size, config.crop, fingerprint, train_frames=len(names))
    labels = torch.tensor([classes.index(name) for name in names])
    reader = train_reader(images, labels, info, config.reader_steps, config.reader_seed)
    images, names = _labelled_frames(source, config, config.validation_split, max(1, config.reader_frames // 4))
    with torch.no_grad():
        guesses = reader.net(images).argmax(1).tolist() if names else []
    right = sum(classes[guess] == name for guess, name in zip(guesses, names, strict=True))
    tested = ReaderInfo(**{**asdict(info), "held_out_right": right, "held_out_frames": len(names)})
    reader = Reader(reader.net, tested)
    reader.save(path)
    return reader


_READER_SETTINGS = (
    "train_split", "validation_split", "class_column", "crop", "reader_frames", "reader_steps", "reader_seed", "reader_size",
)  # fmt: skip


def _labelled_frames(
    source: Manifest, config: EvaluationConfig, split: str, limit: int
) -> tuple[torch.Tensor, list[str]]:
    """Crops (n, 3, S, S) and classes of at most `limit` clips of a split that have a class, one frame of each."""
    clips = [clip for clip in source if clip.split == split and class_of(clip, config) is not None]
    rng = np.random.default_rng([config.reader_seed, 3])
    images, names = [], []
    for i in rng.permutation(len(clips))[:limit]:
        frame = load_frame(clips[i], rng)
        name = class_of(clips[i], config)
        if frame is not None and name is not None:
            images.append(crops(frame, config.reader_size, config.crop))
            names.append(name)
    size = config.reader_size
    return torch.cat(images) if images else torch.zeros(0, 3, size, size), names


# ---------------------------------------------------------------------------------------- scoring


def _score(videos: Path, source: Manifest, config: EvaluationConfig, cache: Path) -> dict[str, Any]:
    made, failures = read_generated(videos)
    reader = reader_for(source, config, cache)
    wanted = [clip.class_name for clip in made], [clip.direction for clip in made]
    generated = _see([clip.frames for clip in made], *wanted, reader, config)
    frames, height, width = made[0].frames.shape[:3]
    shape = Bucket(frames=frames, height=height, width=width)
    real, damaged = _real(source, config, shape, 2 * len(made), reader)
    distances, ceiling = _distances(generated, real)
    scores = generated.accuracies()
    taught = {clip.caption for clip in source if clip.split == config.train_split}
    counts = {"generated": len(made), "failed": len(failures), "real": len(real.frames), "real_damaged": damaged}
    # Held-out clips may share their wording with clips of the train split.
    counts["captions_also_in_train"] = sum(clip.prompt in taught for clip in made)
    scores["counts"] |= counts | distances.pop("counts")
    info = reader.info if reader else None
    return {
        "class_name": config.class_name,
        "class_accuracy": scores.pop("class_accuracy"),
        "direction_accuracy": scores.pop("direction_accuracy"),
        **distances,
        "classifier_accuracy": info.held_out_accuracy if info else None,
        **scores,
        "real": {**real.accuracies(), **ceiling},
        "classifier": asdict(info) if info else None,
        "protocol": protocol_of(made),
        "settings": config.model_dump(mode="json"),
        "manifest": {"path": str(source.path), "sha256": source.fingerprint},
        "failures": failures,
        "clips": [_verdict(clip, generated, i) for i, clip in enumerate(made)],
    }


def _verdict(clip: Generated, seen: Seen, i: int) -> dict[str, Any]:
    """What was asked of one clip and what was seen in it."""
    return {
        "file": clip.file,
        "prompt": clip.prompt,
        "seed": clip.seed,
        "class": clip.class_name,
        "read": seen.read[i] if seen.read else None,
        "probability": round(seen.probabilities[i], 4) if seen.read else None,
        "direction": clip.direction,
        "moved": seen.moved[i] if len(clip.frames) > 1 else None,
    }


def _see(
    frames: list[Frames],
    classes: list[str | None],
    directions: list[str | None],
    reader: Reader | None,
    config: EvaluationConfig,
) -> Seen:
    """Reads every clip. Without a reader no class is wanted; of an image no direction."""
    moved = [direction(clip, config.min_motion) if len(clip) > 1 else NO_DIRECTION for clip in frames]
    directions = [d if len(clip) > 1 else None for d, clip in zip(directions, frames, strict=True)]
    if reader is None:
        return Seen(frames, [None] * len(frames), directions, [], [], np.zeros((len(frames), 0)), moved)
    reading = reader.read(frames)
    return Seen(frames, classes, directions, reading.names, reading.probabilities, reading.features, moved)


def _real(
    source: Manifest, config: EvaluationConfig, shape: Bucket, enough: int, reader: Reader | None
) -> tuple[Seen, int]:
    """Held-out clips of `shape`, as they would be scored had they been generated, and how many could not be decoded."""
    clips = select(source, config.validation_split, shape, enough, config.reader_seed)[: config.real_clips]
    loaded = list(load_all(clips, shape))
    classes = [class_of(clip, config) for clip, _ in loaded]
    directions = [direction_of(clip, config) for clip, _ in loaded]
    return _see([frames for _, frames in loaded], classes, directions, reader, config), len(clips) - len(loaded)


def _distances(generated: Seen, real: Seen) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distances of generated clips, and of as many real ones, to the same reference: the other real ones.

    Both are taken at one count, since the Fréchet distance falls as the count grows. None where a side has fewer than 2.
    """
    n = min(len(generated.features), len(real.features) // 2)
    sample, reference = real.features[:n], real.features[n:]
    counts = {"frechet_generated": n, "frechet_reference": len(reference)}
    if n < 2 or not generated.features.shape[1]:
        nothing = {"frechet_distance": None, "kernel_distance": None}
        return {**nothing, "counts": dict.fromkeys(counts, 0)}, nothing
    found, ceiling = (
        {"frechet_distance": frechet_distance(x, reference), "kernel_distance": kernel_distance(x, reference)}
        for x in (generated.features[:n], sample)
    )
    return {**found, "counts": counts}, ceiling


# ----------------------------------------------------------------------------------------- small


def _names(wanted: Sequence[str], read: Sequence[str], what: str) -> list[str]:
    """Names of a confusion table's rows and columns: all that were wanted or read; directions in their usual order."""
    found = {*wanted, *read}
    return [d for d in (*DIRECTIONS, NO_DIRECTION) if d in found] if what == "direction" else _sorted(found)


def _sorted(names: set[str]) -> list[str]:
    """By number where all are whole numbers, else by code point: the order of Manifest.classes."""
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d+", name) for name in names) else sorted(names)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
