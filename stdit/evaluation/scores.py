"""Scores of generated media, each with its protocol and a 95 % interval.

    result = evaluate_media(config)            # an EvaluateConfig; also writes OUT/scores.json
    check_comparable({"a": result, "b": other})

A score is computed with the network that defines it or not at all. What decides a score's value besides the model that
drew the media is its protocol: network and hash, resizing, counts, seeds, sampler, steps, guidance, EMA, prompts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stdit.config import EvaluateConfig, FileSchema, ReferenceConfig, SealedSchema
from stdit.config.diff import changes
from stdit.evaluation import metrics
from stdit.evaluation.adm import AdmFile, read_adm, write_samples, write_statistics
from stdit.evaluation.feature_cache import FeatureJob, compute_features, load_features
from stdit.evaluation.generated import extracted_frames
from stdit.evaluation.media_set import MediaSet, open_generated, open_reference, overlap, size_of
from stdit.evaluation.metrics import Statistics, bootstrap_interval, in_canonical_order
from stdit.evaluation.networks import Clip, MissingWeights, Network, NetworkError, find_network
from stdit.files import atomic_write, seal
from stdit.outputs import claim_outputs

SCORES, SAMPLES = "scores.json", "samples.npz"
# Behind a score: which values are better.
ARROWS = {"lower": "↓", "higher": "↑", None: ""}
# Incremented when scores of the same features change.
VERSION = 1
Kind = Literal["frechet", "kernel", "precision", "recall", "inception_score", "mean", "accuracy"]
Better = Literal["lower", "higher"] | None
Compute = Callable[[FeatureJob], None]
Features = NDArray[Any]


@dataclass(frozen=True)
class ScoreSpec:
    """How a score is computed: from which network's rows, and which are better (None: neither). note: what else to
    know."""

    kind: Kind
    network: str
    rows: str = "features"
    better: Better = "higher"
    note: str = ""

    @property
    def needs_reference(self) -> bool:
        return self.kind in ("frechet", "kernel", "precision", "recall")


_UNSUPPORTED = {
    "vbench_motion_smoothness": "VBench interpolates frames by AMT-S, which is not supported; linear_motion_smoothness needs no network",
    "vbench_dynamic_degree": "VBench thresholds RAFT's optical flow, which is not supported; vmaf_motion needs no network",
}
SPECS: dict[str, ScoreSpec] = {
    "fid": ScoreSpec("frechet", "inception", better="lower"),
    "kid": ScoreSpec("kernel", "inception", better="lower"),
    "inception_score": ScoreSpec("inception_score", "inception", "logits"),
    "precision": ScoreSpec("precision", "inception"),
    "recall": ScoreSpec("recall", "inception"),
    "fd_dinov2": ScoreSpec("frechet", "dinov2", better="lower"),
    "kd_dinov2": ScoreSpec("kernel", "dinov2", better="lower"),
    "precision_dinov2": ScoreSpec("precision", "dinov2"),
    "recall_dinov2": ScoreSpec("recall", "dinov2"),
    "clip_score": ScoreSpec("mean", "clip", "clip_score", note="100 max(cos, 0), the mean over frames"),
    "fvd": ScoreSpec("frechet", "i3d", better="lower"),
    "frechet_videomae": ScoreSpec("frechet", "videomae", better="lower", note="mean of the last layer's tokens"),
    "frechet_vjepa2": ScoreSpec("frechet", "vjepa2", better="lower", note="mean of the encoder's tokens"),
    "vbench_temporal_flickering": ScoreSpec(
        "mean",
        "none",
        "temporal_flickering",
        note="VBench's arithmetic on all videos; VBench leaves out moving ones, by RAFT",
    ),
    "vbench_subject_consistency": ScoreSpec("mean", "dino", "consistency"),
    "vbench_background_consistency": ScoreSpec("mean", "clip", "consistency"),
    "linear_motion_smoothness": ScoreSpec("mean", "none", "linear_motion_smoothness", note="not VBench's"),
    "vmaf_motion": ScoreSpec(
        "mean", "none", "vmaf_motion", better=None, note="how much moves; not VBench's dynamic degree"
    ),
    "class_accuracy": ScoreSpec("accuracy", "classifier", note="classifier trained on the reference's manifest"),
    "direction_accuracy": ScoreSpec("accuracy", "classifier", note="of the foreground's centroid"),
}


class ScoreEntry(FileSchema):
    """One score of scores.json."""

    value: float
    interval: tuple[float, float]
    better: Better
    notes: list[str]
    protocol: dict[str, Any]


class ScoresFile(SealedSchema):
    """scores.json."""

    version: Literal[1]
    subject: dict[str, Any]
    scores: dict[str, ScoreEntry]
    skipped: dict[str, str]
    warnings: list[str]


class ProtocolMismatch(ValueError):
    """Results of different protocols; the message lists the differences."""


@dataclass(frozen=True)
class Reference:
    """What generated media are compared with: media, statistics (of `network` if it is recorded), or both."""

    media: MediaSet | None
    statistics: AdmFile | None

    @property
    def protocol(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.media is not None:
            found |= {"sha256": self.media.fingerprint, "count": len(self.media), "crop": self.media.crop}
            if changed := self.media.sampling.changed:  # which windows of which clips
                found["frame_sampling"] = changed
            if self.media.dropped:
                found["dropped"] = sum(self.media.dropped.values())
        return found


def evaluate_media(config: EvaluateConfig, compute: Compute = compute_features) -> dict[str, Any]:
    """The content of OUT/scores.json: subject, scores, skipped (reasons by name), warnings.

    compute: computes a job's missing chunks. ValueError: unusable media or reference; a score named in `scores` whose
    network is another than the one that defines it. All of that comes before features are computed.
    """
    generated = open_generated(config.generated)
    if len(generated) < 2:
        raise ValueError(f"{config.generated}: holds {len(generated)} of the 2 or more media that a score needs")
    if config.save_samples and generated.is_video:
        raise ValueError(f"save_samples: ADM's .npz holds images; {config.generated} holds videos")
    reference = _open_reference(config, generated)
    networks, skipped = _plan(config, generated, reference)
    warnings = list(_warnings(config, generated, reference))
    claim_outputs(config.out, "evaluate", _files(config, networks))
    cache = config.cache or config.out / "features"
    scores: dict[str, Any] = {}
    for network, names in networks:
        jobs = {"generated": FeatureJob(network, generated, cache, config.threads)}
        if reference.media is not None and any(SPECS[name].needs_reference for name in names):
            jobs["reference"] = FeatureJob(network, reference.media, cache, config.threads)
        rows = {}
        for side, job in jobs.items():
            compute(job)
            rows[side] = load_features(job)
        for name in names:
            scores[name] = _score(name, config, network, generated, reference, rows)
        _save_statistics(config.out, network, names, rows)
    for name, score in _accuracies(config, generated, skipped).items():
        scores[name] = score
    result = {
        "version": VERSION,
        "subject": _subject(generated),
        "scores": {name: scores[name] for name in SPECS if name in scores},
        "skipped": skipped,
        "warnings": warnings,
    }
    if config.save_samples:
        images = (frames[0] for frames in generated.frames(generated.media))
        write_samples(config.out / SAMPLES, images, len(generated))
    atomic_write(config.out / SCORES, json.dumps(seal(result), indent=1, ensure_ascii=False) + "\n")
    return result


# ------------------------------------------------------------------------------------ before work


def _files(config: EvaluateConfig, networks: list[tuple[Network, list[str]]]) -> list[str]:
    """Names of the files in OUT that may be written."""
    frechet = [network for network, names in networks if any(SPECS[name].kind == "frechet" for name in names)]
    statistics = [_statistics_file(network, side) for network in frechet for side in ("generated", "reference")]
    return [SCORES, *([SAMPLES] if config.save_samples else []), *statistics]


def _statistics_file(network: Network, side: str) -> str:
    return f"statistics-{network.key}-{side}.npz"


def _open_reference(config: EvaluateConfig, generated: MediaSet) -> Reference:
    if config.reference is None:
        return Reference(None, None)
    path = config.reference.path
    adm = read_adm(path) if path.is_file() and path.suffix == ".npz" else None
    sampling = extracted_frames(generated.rows, generated.source)
    media = None if adm and adm.samples is None else open_reference(config.reference, generated.shape, sampling)
    if media is not None and len(media) < 2:
        raise ValueError(f"{path}: holds {len(media)} of the 2 or more media that a reference needs")
    return Reference(media, adm if adm and adm.statistics else None)


def _plan(
    config: EvaluateConfig, generated: MediaSet, reference: Reference
) -> tuple[list[tuple[Network, list[str]]], dict[str, str]]:
    """Networks with their scores, and the reasons of the scores that are skipped."""
    named = config.scores is not None
    wanted = [name for name in (*SPECS, *_UNSUPPORTED) if config.scores is None or name in config.scores]
    skipped: dict[str, str] = {name: _UNSUPPORTED[name] for name in wanted if name in _UNSUPPORTED}
    networks: dict[str, Network | str] = {}
    plan: dict[str, list[str]] = {}
    for name in wanted:
        if name in skipped or SPECS[name].kind == "accuracy":
            continue
        key = SPECS[name].network
        try:
            if key not in networks:
                networks[key] = find_network(key, config.networks, config.device)
        except MissingWeights as error:
            networks[key] = str(error)
        except NetworkError as error:
            if named:
                raise ValueError(f"{name}: {error}") from error
            networks[key] = f"refused: {error}"
        network = networks[key]
        reason = network if isinstance(network, str) else _unusable(name, network, generated, reference)
        if reason is None:
            plan.setdefault(key, []).append(name)
        else:
            if named and reason.startswith("refused: "):
                raise ValueError(f"{name}: {reason.removeprefix('refused: ')}")
            skipped[name] = reason
    found = [(network, plan[key]) for key, network in networks.items() if key in plan and isinstance(network, Network)]
    return found, skipped


def _unusable(name: str, network: Network, generated: MediaSet, reference: Reference) -> str | None:
    """Why a score cannot be computed from these media; None: it can."""
    spec = SPECS[name]
    if spec.rows == "clip_score":
        without = sum(medium.prompt is None for medium in generated.media)
        if without:
            return f"{without} of {len(generated)} media have no prompt"
    if name == "vbench_background_consistency":
        assert isinstance(network, Clip)
        try:
            network.matches(network.vbench, "CLIP ViT-B/32, which defines VBench's background consistency,")
        except NetworkError as error:
            return f"refused: {error}"
    if spec.rows == "consistency" and not generated.is_video:
        return "of videos; these are images"
    if (limit := network.limits(generated.shape)) is not None:
        return limit
    if not spec.needs_reference:
        return None
    if spec.kind == "frechet" and reference.statistics is not None:
        return _other_network(network, reference.statistics)
    if reference.media is None:
        return "the reference holds statistics, not samples" if reference.statistics else "no reference"
    return None


def _other_network(network: Network, file: AdmFile) -> str | None:
    """Why statistics cannot serve as reference for a network. ADM's say nothing: they are of the original Inception."""
    assert file.statistics is not None
    found, width = len(file.statistics.mean), network.width
    if found != width:
        return f"refused: {file.path}: statistics of another network: {found} dimensions, {network.key} has {width}"
    if file.network is None and network.key != "inception":
        return f"refused: {file.path} does not say of which network its statistics are"
    if file.network not in (None, network.digest):
        return (
            f"refused: {file.path}: statistics of another network or resizing ({file.network[:16]}…; {network.key} here "
            f"is {network.digest[:16]}…)"
        )
    return None


def _warnings(config: EvaluateConfig, generated: MediaSet, reference: Reference) -> Iterator[str]:
    if reference.media is not None and reference.statistics is None and len(reference.media) != len(generated):
        yield (
            f"{len(generated)} generated against {len(reference.media)} reference media: Fréchet distances and recall "
            "depend on the counts; compare results of equal counts"
        )
    if reference.media is not None and reference.media.left_out:
        yield (
            f"{reference.media.left_out} media of {reference.media.source} are of other shapes than {size_of(generated.shape)} "
            f"and left out; {len(reference.media)} are the reference"
        )
    if reference.media is not None and (dropped := reference.media.dropped):
        reasons = "; ".join(f"{count}: {reason}" for reason, count in list(dropped.items())[:3])
        more = f"; {len(dropped) - 3} more reasons" if len(dropped) > 3 else ""
        yield (
            f"{sum(dropped.values())} clips of {reference.media.source} are dropped, as by the extraction of the run's clips ({reasons}{more})"
        )
    training = config.training
    source = config.reference
    if training is None and source and source.split not in (None, "train") and source.path.suffix != ".npz":
        training = ReferenceConfig(path=source.path, split="train")
    if training is not None and reference.media is not None and (count := overlap(reference.media, training)):
        yield f"{count} of {len(reference.media)} reference media are also in the training set {training.path}"


# -------------------------------------------------------------------------------------- computing


def _score(
    name: str,
    config: EvaluateConfig,
    network: Network,
    generated: MediaSet,
    reference: Reference,
    rows: Mapping[str, Mapping[str, Features]],
) -> dict[str, Any]:
    """Value, interval, protocol and notes of one score."""
    spec = SPECS[name]
    a = in_canonical_order(rows["generated"][spec.rows].astype(np.float64))
    b: Features | Statistics | None = None
    if spec.needs_reference:
        if spec.kind == "frechet" and reference.statistics is not None:
            b = reference.statistics.statistics
        else:
            b = in_canonical_order(rows["reference"][spec.rows].astype(np.float64))
    try:
        value, interval, settings = _value(spec.kind, config, a, b)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    notes = [spec.note] if spec.note else []
    count = b.count if isinstance(b, Statistics) else None if b is None else len(b)
    if spec.kind == "frechet" and min(len(a), count or len(a)) <= a.shape[1]:
        notes.append(
            f"singular covariance: {len(a)} generated and {count or 'unknown'} reference samples in {a.shape[1]} dimensions; "
            "the distance is that of their span and is biased upwards"
        )
    protocol = {"generated": _protocol(generated), "network": network.identity, "settings": settings}
    if spec.needs_reference:
        if isinstance(b, Statistics):
            digest = hashlib.sha256(b.mean.tobytes() + b.covariance.tobytes()).hexdigest()
            protocol["reference"] = {"statistics_sha256": digest, "count": b.count}
        else:
            protocol["reference"] = reference.protocol
    return {"value": value, "interval": list(interval), "better": spec.better, "notes": notes, "protocol": protocol}


def _value(
    kind: Kind, config: EvaluateConfig, a: Features, b: Features | Statistics | None
) -> tuple[float, tuple[float, float], dict[str, Any]]:
    """Value, interval, and the settings that decide the value."""
    settings: dict[str, Any] = {"bootstrap": config.bootstrap, "seed": config.seed}
    sets = (a, b) if isinstance(b, np.ndarray) else (a,)
    score, interval_score = _mean, None
    if kind == "frechet":
        score = partial(_frechet_to, b) if isinstance(b, Statistics) else metrics.frechet_distance
    elif kind == "kernel":
        size = min(config.kid_subset_size, *map(len, sets))
        settings |= {"kid_subsets": config.kid_subsets, "kid_subset_size": size}
        score = partial(metrics.kernel_inception_distance, subsets=config.kid_subsets, size=size, seed=config.seed)
        # Every resample with a tenth of the subsets: an interval needs no more digits.
        interval_score = partial(score, subsets=-(-config.kid_subsets // 10))
    elif kind == "inception_score":
        settings |= {"splits": config.splits}
        score = partial(metrics.inception_score, splits=config.splits, seed=config.seed)
    elif kind in ("precision", "recall"):
        settings |= {"neighbors": config.neighbors}
        # Resampled sample by sample: neighbourhoods stay as they are.
        inside = metrics.precision_recall(*sets, neighbors=config.neighbors)[0 if kind == "precision" else 1]
        sets = (inside.astype(float),)
    else:
        sets = (a[:, 0],)
    value = float(score(*sets))
    interval = bootstrap_interval(
        interval_score or score, *sets, value=value, resamples=config.bootstrap, seed=config.seed
    )
    return value, interval, settings


def _mean(samples: Features) -> float:
    return float(samples.mean())


def _frechet_to(reference: Statistics, samples: Features) -> float:
    return metrics.frechet_distance_of_statistics(metrics.statistics_of(samples), reference)


def _save_statistics(out: Path, network: Network, names: list[str], rows: Mapping[str, Mapping[str, Features]]) -> None:
    """Writes mu and sigma of each side as OUT/statistics-NETWORK-SIDE.npz."""
    if any(SPECS[name].kind == "frechet" for name in names):
        for side, found in rows.items():
            statistics = metrics.statistics_of(in_canonical_order(found["features"].astype(np.float64)))
            write_statistics(out / _statistics_file(network, side), statistics, network.digest)


def _accuracies(config: EvaluateConfig, generated: MediaSet, skipped: dict[str, str]) -> dict[str, Any]:
    """Class and direction accuracy by the reference's manifest; reasons go to `skipped`."""
    names = [n for n in ("class_accuracy", "direction_accuracy") if config.scores is None or n in config.scores]
    manifest = config.reference.path if config.reference else None
    reason = None
    if not any(row.get("class") is not None or row.get("direction") is not None for row in generated.rows):
        reason = f"no class or direction was requested in {generated.source}/manifest.jsonl"
    elif manifest is None or not manifest.is_file() or manifest.suffix == ".npz":
        reason = "needs a manifest as reference, whose train split trains the classifier"
    if reason is not None or manifest is None or not names:
        skipped |= dict.fromkeys(names, reason or "")
        return {}
    from stdit.evaluation.evaluator import evaluate_videos

    found = evaluate_videos(generated.source, manifest, config.metrics, config.cache or config.out)
    scores = {}
    for name in names:
        if found[name] is None:
            skipped[name] = f"no {name.removesuffix('_accuracy')} was requested, or the manifest has no such column"
            continue
        network = {"network": "classifier", "sha256": (found["classifier"] or {}).get("fingerprint", "")}
        scores[name] = {
            "value": found[name], "interval": found["intervals"][name.removesuffix("_accuracy")], "better": "higher",
            "notes": [SPECS[name].note],
            "protocol": {
                "generated": _protocol(generated), "network": network, "settings": found["settings"],
                "reference": {"sha256": found["manifest"]["sha256"]},
            },
        }  # fmt: skip
    return scores


# -------------------------------------------------------------------------------------- protocols

# Of a row's `protocol`: what is scored, not how; and what changes samples in the last bit alone.
_SUBJECT = ("run", "checkpoint", "step", "samples_seen", "lora")
_NUMERICAL = ("batch_size", "threads")


def _subject(generated: MediaSet) -> dict[str, Any]:
    """Which model drew the media, as far as they say."""
    settings = _settings(generated)
    return {"generated": str(generated.source), **{key: settings[key] for key in _SUBJECT if key in settings}}


def _protocol(generated: MediaSet) -> dict[str, Any]:
    """Count, shape, sampling settings, seeds, and the SHA-256 of the prompts."""
    settings = {k: v for k, v in _settings(generated).items() if k not in (*_SUBJECT, *_NUMERICAL)}
    requests = sorted(json.dumps([row.get("prompt"), row.get("class")]) for row in generated.rows)
    seeds = sorted(row["seed"] for row in generated.rows if isinstance(row.get("seed"), int))
    return {
        "count": len(generated),
        "shape": list(generated.shape),
        **settings,
        "prompts_sha256": hashlib.sha256(json.dumps(requests).encode()).hexdigest() if requests else None,
        "seeds": [seeds[0], seeds[-1], hashlib.sha256(json.dumps(seeds).encode()).hexdigest()[:16]] if seeds else None,
    }


def _settings(generated: MediaSet) -> dict[str, Any]:
    """Sampling settings; one that differs between media is a list of its values."""
    found: dict[str, list[Any]] = {}
    for row in generated.rows:
        for key, value in {**(row.get("protocol") or {}), "fps": row.get("fps")}.items():
            if value not in (values := found.setdefault(key, [])):
                values.append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in found.items()}


def check_comparable(results: Mapping[str, Mapping[str, Any]]) -> None:
    """ProtocolMismatch: a score that two results share, with different protocols; lists every difference."""
    names = list(results)
    differences: dict[str, list[str]] = {}
    for other in names[1:]:
        first, second = results[names[0]]["scores"], results[other]["scores"]
        for score in first:
            if score in second:
                for change in changes(first[score]["protocol"], second[score]["protocol"]):
                    differences.setdefault(f"{names[0]} -> {other}: {change}", []).append(score)
    if differences:
        listed = "\n".join(f"  {change} ({', '.join(scores)})" for change, scores in differences.items())
        raise ProtocolMismatch(f"scores of different protocols cannot be compared:\n{listed}")


def scores_table(result: Mapping[str, Any]) -> str:
    """One line a score: name, value, interval, direction; then notes, warnings and what was skipped."""
    lines = []
    width = max([len(name) for name in result["scores"]] or [0])
    for name, score in result["scores"].items():
        low, high = score["interval"]
        lines.append(
            f"{name:<{width}}  {score['value']:.5g} [{low:.5g}, {high:.5g}] {ARROWS[score['better']]}".rstrip()
        )
        lines += [f"{'':<{width}}    {note}" for note in score["notes"]]
    lines += [f"warning: {text}" for text in result["warnings"]]
    reasons: dict[str, list[str]] = {}
    for name, reason in result["skipped"].items():
        reasons.setdefault(reason, []).append(name)
    lines += [f"skipped {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join(lines)
