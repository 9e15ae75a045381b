"""Metrics of a folder of generated clips: class accuracy, direction accuracy, distances to real clips.

    prompts = validation_prompts(manifest, 100, Bucket(frames=8, height=16, width=16))
    …                                              # stdit.generate them into the folder `videos`
    metrics = evaluate_videos(videos, manifest, cache=folder)

Real held-out clips of the same shape are measured too: the upper bound. Metrics are stored with their sampling
settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ConfigDict

from stdit.config import Bucket, ConfigError, EvaluationConfig, SealedSchema, read_json
from stdit.config.identity import FrameSampling
from stdit.data import manifest as manifests
from stdit.data.frame_sampling import FIRST_FRAMES
from stdit.data.manifest import Manifest
from stdit.evaluation.classifier import (
    DIRECTIONS,
    NO_DIRECTION,
    ClassifierInfo,
    ClipClassifier,
    Frames,
    crops,
    direction,
    train_classifier,
)
from stdit.evaluation.generated import (
    GeneratedClip,
    extracted_frames,
    fingerprint_videos,
    read_generated,
    sampling_protocol,
)
from stdit.evaluation.metrics import accuracy, confusion_matrix, frechet_distance, kernel_distance
from stdit.evaluation.validation_clips import (
    check_columns,
    class_of,
    direction_of,
    load_clips,
    load_frame,
    select,
    stated_count,
)
from stdit.files import atomic_write, seal
from stdit.memory import check_fits
from stdit.outputs import claim_outputs

# Incremented when the metrics of the same clips change, which invalidates metrics and classifiers on disk.
VERSION = 3
METRICS = "metrics.json"


@dataclass(frozen=True)
class Predictions:
    """Clips of one shape with their requested (None: not conditioned) and predicted classes and directions.

    Without a classifier there are no classes, requested or predicted.
    """

    frames: list[Frames]
    classes: list[str | None]
    directions: list[str | None]
    predicted_classes: list[str]
    probabilities: list[float]
    features: np.ndarray  # (n, D); (n, 0) without a classifier
    predicted_directions: list[str]

    def accuracies(self) -> dict[str, Any]:
        """class_accuracy and direction_accuracy (None where nothing was requested), intervals, counts, confusion."""
        pairs = {
            "class": (self.classes, self.predicted_classes),
            "direction": (self.directions, self.predicted_directions),
        }
        found: dict[str, Any] = {"intervals": {}, "counts": {}, "confusion": {}}
        for name, (requested, predicted) in pairs.items():
            both = [(r, p) for r, p in zip(requested, predicted, strict=True) if r is not None]
            found["counts"][name] = len(both)
            found[f"{name}_accuracy"] = found["intervals"][name] = found["confusion"][name] = None
            if not both:
                continue
            targets, predictions = [r for r, _ in both], [p for _, p in both]
            result, names = accuracy(targets, predictions), _names(targets, predictions, name)
            found[f"{name}_accuracy"] = result.value
            found["intervals"][name] = [result.low, result.high]
            found["confusion"][name] = {"names": names, "counts": confusion_matrix(targets, predictions, names)}
        return found

    def class_confidence(self) -> float | None:
        """Mean probability of the predicted class: legibility beyond right and wrong."""
        return float(np.mean(self.probabilities)) if self.probabilities else None


class StoredMetrics(SealedSchema):
    """metrics.json of a folder of videos; further keys are the metrics. fingerprint: of all that they follow from."""

    model_config = ConfigDict(extra="allow")

    fingerprint: str


def evaluate_videos(
    videos: Path,
    manifest: Path,
    config: EvaluationConfig | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Metrics of the clips that stdit.generate wrote into `videos`, also written to videos/metrics.json.

    manifest: of the dataset; its held-out clips are the reference, read as the extraction of the videos' run read
    its clips; its train split trains the classifier. cache: folder of the trained classifier (default: the parent of
    `videos`). Requested class and direction come from the columns of the prompts in videos/manifest.jsonl. A second
    call with nothing changed reads metrics.json.
    ValueError: no clips, clips of several shapes, an unusable manifest.
    """
    config = config or EvaluationConfig()
    source = manifests.read(manifest)
    check_columns(source, config)
    fingerprint = _digest(VERSION, config.model_dump(mode="json"), fingerprint_videos(videos), source.fingerprint)
    out = videos / METRICS
    if out.is_file():
        with suppress(ConfigError):  # damaged: computed again
            stored = read_json(out, StoredMetrics)
            if stored["fingerprint"] == fingerprint:
                return stored
    claim_outputs(videos, "evaluate", [METRICS])
    metrics = {"fingerprint": fingerprint, **_compute_metrics(videos, source, config, cache or videos.parent)}
    text = json.dumps(seal(metrics), indent=1, ensure_ascii=False) + "\n"
    atomic_write(out, text)
    return json.loads(text)


def check_memory(
    config: EvaluationConfig, source: Manifest, shape: Bucket, generated: int, sampling: FrameSampling = FIRST_FRAMES
) -> None:
    """ConfigError: clips or the classifier's frames, which are held at once, are more than this machine's memory.

    generated: clips of `shape`, with which those real ones are compared that `select` gives, `real_clips` at most.
    """
    real = min(config.real_clips, stated_count(source, config.validation_split, shape, 2 * generated, sampling))
    labelled = sum(clip.split == config.train_split and class_of(clip, config) is not None for clip in source)
    frames = min(config.classifier_frames, labelled)
    needs = {
        f"{generated:,} generated and {real:,} real clips (real_clips {config.real_clips:,}) of {shape.key}": (
            (generated + real) * shape.frames * shape.height * shape.width * 3
        ),
        f"{frames:,} frames (classifier_frames) of classifier_size {config.classifier_size}": (
            frames * config.classifier_size**2 * 3 * 4
        ),
    }
    for what, needed in needs.items():
        check_fits(f"{what} take", needed)


def load_or_train_classifier(source: Manifest, config: EvaluationConfig, cache: Path) -> ClipClassifier | None:
    """The classifier of the classes of `source`, trained or read from `cache`; None with fewer than two classes."""
    relevant = config.model_dump(mode="json", include=set(_CLASSIFIER_KEYS))
    fingerprint = _digest(VERSION, relevant, source.fingerprint)
    path = cache / f"classifier-{fingerprint[:16]}.safetensors"
    if path.is_file():
        with suppress(ValueError):  # damaged: trained again
            return ClipClassifier.load(path)
    images, names = _labelled_frames(source, config, config.train_split, config.classifier_frames)
    classes = _sorted(set(names))
    if len(classes) < 2:
        return None
    info = ClassifierInfo(tuple(classes), config.classifier_size, config.crop, fingerprint, train_frames=len(names))
    labels = torch.tensor([classes.index(name) for name in names])
    classifier = train_classifier(images, labels, info, config.classifier_steps, config.classifier_seed)
    images, names = _labelled_frames(source, config, config.validation_split, max(1, config.classifier_frames // 4))
    with torch.no_grad():
        predictions = classifier.net(images).argmax(1).tolist() if names else []
    correct = sum(classes[p] == name for p, name in zip(predictions, names, strict=True))
    tested = ClassifierInfo(**{**asdict(info), "held_out_correct": correct, "held_out_frames": len(names)})
    classifier = ClipClassifier(classifier.net, tested)
    classifier.save(path)
    return classifier


_CLASSIFIER_KEYS = (
    "train_split", "validation_split", "class_column", "crop", "classifier_frames", "classifier_steps", "classifier_seed", "classifier_size",
)  # fmt: skip


def _labelled_frames(
    source: Manifest, config: EvaluationConfig, split: str, limit: int
) -> tuple[torch.Tensor, list[str]]:
    """Crops (n, 3, S, S) and classes of at most `limit` labelled clips of a split, one frame of each."""
    clips = [clip for clip in source if clip.split == split and class_of(clip, config) is not None]
    rng = np.random.default_rng([config.classifier_seed, 3])
    images, names = [], []
    for i in rng.permutation(len(clips))[:limit]:
        frame = load_frame(clips[i], rng)
        name = class_of(clips[i], config)
        if frame is not None and name is not None:
            images.append(crops(frame, config.classifier_size, config.crop))
            names.append(name)
    size = config.classifier_size
    return torch.cat(images) if images else torch.zeros(0, 3, size, size), names


# ---------------------------------------------------------------------------------------- metrics


def _compute_metrics(videos: Path, source: Manifest, config: EvaluationConfig, cache: Path) -> dict[str, Any]:
    clips, failures = read_generated(videos)
    frames, height, width = clips[0].frames.shape[:3]
    shape = Bucket(frames=frames, height=height, width=width)
    sampling = extracted_frames([clip.row for clip in clips], videos)
    check_memory(config, source, shape, len(clips), sampling)
    classifier = load_or_train_classifier(source, config, cache)
    requested = [clip.class_name for clip in clips], [clip.direction for clip in clips]
    generated = _predict([clip.frames for clip in clips], *requested, classifier, config)
    real, damaged = _predict_real(source, config, shape, 2 * len(clips), classifier, sampling)
    distances, upper_bound = _distances(generated, real)
    metrics = generated.accuracies()
    train_captions = {clip.caption for clip in source if clip.split == config.train_split}
    counts = {"generated": len(clips), "failed": len(failures), "real": len(real.frames), "real_damaged": damaged}
    # Held-out clips may have the same captions as clips of the train split.
    counts["captions_also_in_train"] = sum(clip.prompt in train_captions for clip in clips)
    metrics["counts"] |= counts | distances.pop("counts")
    info = classifier.info if classifier else None
    return {
        "class_name": config.class_name,
        "class_accuracy": metrics.pop("class_accuracy"),
        "direction_accuracy": metrics.pop("direction_accuracy"),
        "class_confidence": generated.class_confidence(),
        **distances,
        "classifier_accuracy": info.held_out_accuracy if info else None,
        **metrics,
        "real": {**real.accuracies(), "class_confidence": real.class_confidence(), **upper_bound},
        "classifier": asdict(info) if info else None,
        "protocol": sampling_protocol(clips),
        "settings": config.model_dump(mode="json"),
        "manifest": {"path": str(source.path), "sha256": source.fingerprint},
        "failures": failures,
        "clips": [_clip_row(clip, generated, i) for i, clip in enumerate(clips)],
    }


def _clip_row(clip: GeneratedClip, predictions: Predictions, i: int) -> dict[str, Any]:
    """Requested and predicted conditions of one clip."""
    classified = bool(predictions.predicted_classes)
    return {
        "file": clip.file,
        "prompt": clip.prompt,
        "seed": clip.seed,
        "class": clip.class_name,
        "predicted_class": predictions.predicted_classes[i] if classified else None,
        "probability": round(predictions.probabilities[i], 4) if classified else None,
        "direction": clip.direction,
        "predicted_direction": predictions.predicted_directions[i] if len(clip.frames) > 1 else None,
    }


def _predict(
    frames: list[Frames],
    classes: list[str | None],
    directions: list[str | None],
    classifier: ClipClassifier | None,
    config: EvaluationConfig,
) -> Predictions:
    """Predictions for every clip: no class without a classifier, no direction for images."""
    predicted = [direction(clip, config.min_motion) if len(clip) > 1 else NO_DIRECTION for clip in frames]
    directions = [d if len(clip) > 1 else None for d, clip in zip(directions, frames, strict=True)]
    if classifier is None:
        return Predictions(frames, [], directions, [], [], np.zeros((len(frames), 0)), predicted)
    output = classifier.predict(frames)
    return Predictions(frames, classes, directions, output.names, output.probabilities, output.features, predicted)


def _predict_real(
    source: Manifest,
    config: EvaluationConfig,
    shape: Bucket,
    min_count: int,
    classifier: ClipClassifier | None,
    sampling: FrameSampling,
) -> tuple[Predictions, int]:
    """Predictions for held-out clips of `shape`, and the number of clips that could not be decoded."""
    split, seed = config.validation_split, config.classifier_seed
    clips = select(source, split, shape, min_count, seed, sampling=sampling)[: config.real_clips]
    loaded = list(load_clips(clips, shape, sampling))
    classes = [class_of(clip, config) for clip, _ in loaded]
    directions = [direction_of(clip, config) for clip, _ in loaded]
    return _predict([frames for _, frames in loaded], classes, directions, classifier, config), len(clips) - len(loaded)


def _distances(generated: Predictions, real: Predictions) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distances of generated clips, and of as many real ones, to the same reference: the remaining real ones.

    Both at the same count, since the Fréchet distance decreases with it. None with fewer than 2 clips on a side.
    """
    n = min(len(generated.features), len(real.features) // 2)
    sample, reference = real.features[:n], real.features[n:]
    counts = {"frechet_generated": n, "frechet_reference": len(reference)}
    if n < 2 or not generated.features.shape[1]:
        absent = {"frechet_distance": None, "kernel_distance": None}
        return {**absent, "counts": dict.fromkeys(counts, 0)}, absent
    found, upper_bound = (
        {"frechet_distance": frechet_distance(x, reference), "kernel_distance": kernel_distance(x, reference)}
        for x in (generated.features[:n], sample)
    )
    return {**found, "counts": counts}, upper_bound


def _names(targets: Sequence[str], predictions: Sequence[str], kind: str) -> list[str]:
    """Rows and columns of a confusion matrix: all targets and predictions; directions in the order of DIRECTIONS."""
    found = {*targets, *predictions}
    return [d for d in (*DIRECTIONS, NO_DIRECTION) if d in found] if kind == "direction" else _sorted(found)


def _sorted(names: set[str]) -> list[str]:
    """Numeric order if all are integers, else by code point: the order of Manifest.classes."""
    return sorted(names, key=int) if all(re.fullmatch(r"-?\d+", name) for name in names) else sorted(names)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
