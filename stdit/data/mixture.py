"""Several feature sets as one, each with a share of the samples.

A bucket's epoch has as many samples as the sets have clips in it, of each set its share by the largest remainder, in an
order of the seed; a set is gone through in permutations of its own, whatever its share. So a position in a bucket's
stream says which sample it is, as it does of one set (loader.py).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stdit.config import ENCODERS, Bucket, ConfigError, DataConfig, TrainBucket, Url, Where
from stdit.config.diff import changes
from stdit.config.identity import FrameSampling
from stdit.data.features import (
    ORIGINAL,
    EmptyCaption,
    FeatureFacts,
    FeatureSet,
    Sample,
    ShardReadAhead,
    feature_facts,
)
from stdit.data.manifest import in_label_order
from stdit.data.object_cache import ReadAhead
from stdit.data.objects import Digest


class MixedIndex:
    """Clips of several sets, each with a share: which there are, and how many of each set a bucket takes (`mix`).

    Ids: those of the sets one after the other. names, buckets (keys), sizes (ids that there may be): of each set.
    weights: of the sets;
    None: each has as many samples as clips.
    """

    def __init__(
        self,
        sets: Sequence[Any],
        weights: Sequence[float] | None,
        names: Sequence[str],
        buckets: Sequence[Collection[str]],
        sizes: Sequence[int],
    ) -> None:
        self.sets, self.weights, self.names = tuple(sets), weights and tuple(weights), tuple(names)
        self.buckets = tuple(buckets)
        # First id of each set, and one behind the last.
        self.starts = np.cumsum([0, *sizes])
        self.captions: tuple[str, ...] = tuple(dict.fromkeys(name for one in self.sets for name in one.captions))

    def select(
        self, split: str | None, buckets: Sequence[Bucket], where: Sequence[Where] = ()
    ) -> dict[str, np.ndarray]:
        """As FeatureSet.select, of all sets that have a bucket. ConfigError: none has."""
        there = list(dict.fromkeys(key for keys in self.buckets for key in keys))
        if absent := [bucket.key for bucket in buckets if bucket.key not in there]:
            raise ConfigError(
                f"buckets {', '.join(absent)} were not extracted into any of {', '.join(self.names)}; there are "
                f"{', '.join(there)}"
            )
        found: dict[str, list[np.ndarray]] = {bucket.key: [] for bucket in buckets}
        for start, one, keys in zip(self.starts[:-1], self.sets, self.buckets, strict=True):
            own = [bucket for bucket in buckets if bucket.key in keys]
            for key, ids in one.select(split, own, where).items():
                found[key].append(ids + start)
        return {key: np.concatenate(parts) for key, parts in found.items()}

    def split(self, ids: np.ndarray) -> list[np.ndarray]:
        """`ids` (ascending) by set."""
        return np.split(ids, np.searchsorted(ids, self.starts[1:-1]))


class Mixture(MixedIndex):
    """Feature sets behind the interface of one.

    ConfigError: sets that a model cannot train on together (other encoders, latent statistics, text tokens), with both
    values.
    """

    sets: tuple[FeatureSet, ...]

    def __init__(self, sets: Sequence[FeatureSet], weights: Sequence[float] | None = None) -> None:
        first = sets[0]
        for other in sets[1:]:
            check_compatible(
                _training_facts(first), _training_facts(other), f"data.features: {first.path} and {other.path}"
            )
        super().__init__(
            sets,
            weights,
            [str(features.path) for features in sets],
            [features.index["buckets"] for features in sets],
            [int(features.ids[-1]) + 1 for features in sets],
        )
        self.classes = in_label_order(name for features in self.sets for name in features.classes)
        self._labels = [[self.classes.index(name) for name in features.classes] for features in self.sets]
        self.video_encoder, self.text_encoder = first.video_encoder, first.text_encoder
        self.vision_encoder, self.has_control = first.vision_encoder, first.has_control
        texts = [features.index["fingerprint"] for features in self.sets]
        self.index: dict[str, Any] = {
            "fingerprint": hashlib.sha256(json.dumps(texts).encode()).hexdigest(),
            "buckets": dict.fromkeys(key for features in self.sets for key in features.index["buckets"]),
        }

    @property
    def empty_caption(self) -> EmptyCaption | None:
        return self.sets[0].empty_caption

    def facts(self) -> FeatureFacts:
        """As FeatureSet.facts."""
        rates = [rate for features in self.sets for rate in features.rows["fps"].to_pylist()]
        buckets = [Bucket.parse(key) for key in self.index["buckets"]]
        encoders = self.video_encoder, self.text_encoder
        return feature_facts(*encoders, buckets, len(self.classes), rates, self.vision_encoder)

    @property
    def frame_sampling(self) -> FrameSampling | None:
        """As FeatureSet.frame_sampling; without windows and buckets where the sets differ in these alone, None where in
        more."""
        first, *others = (features.frame_sampling for features in self.sets)
        if all(other == first for other in others):
            return first
        alone = first.of_one_window
        return alone if all(other.of_one_window == alone for other in others) else None

    def _find(self, id: int) -> tuple[int, int]:
        """Number of the set of a sample, and the sample's id in it."""
        number = int(np.searchsorted(self.starts, id, side="right")) - 1
        if not 0 <= number < len(self.sets):
            raise KeyError(f"{', '.join(self.names)} have no sample {id}")
        return number, int(id - self.starts[number])

    def captions_of(self, id: int) -> tuple[str, ...]:
        number, own = self._find(id)
        return self.sets[number].captions_of(own)

    def sample(self, id: int, caption: str = ORIGINAL) -> Sample:
        """As FeatureSet.sample; class labels count in `classes`."""
        number, own = self._find(id)
        found = vars(self.sets[number].sample(own, caption))
        label = found["class_label"]
        return Sample(**{**found, "id": int(id), "class_label": self._labels[number][label] if label >= 0 else -1})

    def shard_objects(self, ids: Sequence[int]) -> list[tuple[Url, Digest]]:
        """As FeatureSet.shard_objects."""
        own: dict[int, list[int]] = {}
        for id in ids:
            number, id_there = self._find(id)
            own.setdefault(number, []).append(id_there)
        return [found for number, there in own.items() for found in self.sets[number].shard_objects(there)]

    def read_ahead(self) -> ShardReadAhead | None:
        """As FeatureSet.read_ahead; None where no set is at a URL."""
        remote = [features for features in self.sets if isinstance(features.path, Url)]
        return ShardReadAhead(self.shard_objects, ReadAhead(remote[0].cache)) if remote else None

    def text_lengths(self, ids: np.ndarray) -> np.ndarray:
        """As FeatureSet.text_lengths."""
        found = np.zeros(len(ids), np.int64)
        for number, features in enumerate(self.sets):
            own = (ids >= self.starts[number]) & (ids < self.starts[number + 1])
            found[own] = features.text_lengths(ids[own] - self.starts[number])
        return found

    def frame_rates(self, ids: np.ndarray) -> dict[str, int]:
        """As FeatureSet.frame_rates."""
        total: Counter[str] = Counter()
        for start, features, part in zip(self.starts[:-1], self.sets, self.split(np.sort(ids)), strict=True):
            total.update(features.frame_rates(part - start))
        return dict(sorted(total.items(), key=lambda item: (-item[1], float(item[0]))))


def _training_facts(features: FeatureSet) -> dict[str, Any]:
    """What has to be equal among sets: the encoders, as the extraction's settings identify them, and kinds of
    tensors."""
    config = features.index["config"]
    encoders = {key: config.get(key) for key in ENCODERS}
    return {**encoders, "posterior": features.index["posterior"], "control_column": features.has_control}


def check_compatible(first: dict[str, Any], other: dict[str, Any], names: str) -> None:
    """ConfigError with both values where what two sets have to have in common differs. names: of the two, for the
    message."""
    if found := changes(first, other):
        lines = "; ".join(
            f"{change.key} is {json.dumps(change.old)} and {json.dumps(change.new)}" for change in found[:3]
        )
        more = f"; and {len(found) - 3} more" if len(found) > 3 else ""
        raise ConfigError(f"{names} do not go together: {lines}{more}")


# ------------------------------------------------------------------------------------------- the order


@dataclass(frozen=True)
class BucketMix:
    """A bucket of a mixture: `ids` of each set, how many samples of each an epoch has, and the bucket's share of all
    samples."""

    ids: tuple[np.ndarray, ...]
    counts: tuple[int, ...]
    share: float


def mix(mixture: MixedIndex, ids: Mapping[str, np.ndarray], buckets: Sequence[TrainBucket]) -> dict[str, BucketMix]:
    """What each bucket takes of each set, so that a set has its share of the samples, and its buckets theirs by clips
    and `weight`. ids: training clips by bucket key. ConfigError: a set without any."""
    parts = {bucket.key: mixture.split(ids[bucket.key]) for bucket in buckets}
    clips = np.array([[len(part) * b.weight for part in parts[b.key]] for b in buckets], float)  # (bucket, set)
    of_set = clips.sum(0)
    if not of_set.all():
        name = mixture.names[int(np.argmin(of_set))]
        raise ConfigError(f"data.features: {name} has no training sample in this run's buckets; leave it out")
    weights = of_set if mixture.weights is None else np.array(mixture.weights)
    wanted = clips / of_set * (weights / weights.sum())
    return {
        bucket.key: BucketMix(
            tuple(parts[bucket.key]), apportion(len(ids[bucket.key]), of_bucket.tolist()), float(of_bucket.sum())
        )
        for bucket, of_bucket in zip(buckets, wanted, strict=True)
    }


def apportion(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """`total` divided by `shares`: rounded down, and one more each to the largest remainders. A share above 0 has one
    at least."""
    exact = [total * share / sum(shares) for share in shares]
    found = [int(number) for number in exact]
    remainders = sorted(range(len(shares)), key=lambda i: (found[i] - exact[i], i))
    for i in remainders[: total - sum(found)]:
        found[i] += 1
    for i, share in enumerate(shares):
        if share and not found[i]:
            found[found.index(max(found))] -= 1
            found[i] = 1
    return tuple(found)


def open_features(data: DataConfig, vision: bool = False) -> FeatureSet | Mixture:
    """The features of `data.features`, which are not synthetic. vision: as FeatureSet's. ConfigError: one is not there
    or damaged; they do not go together."""
    assert data.feature_paths
    sets = [FeatureSet(path, data.cache, vision) for path in data.feature_paths]
    return sets[0] if len(sets) == 1 else Mixture(sets, data.feature_weights)
