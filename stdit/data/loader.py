"""Batches for training: one bucket per step (or packed, of all), the same on all ranks, in an order that depends on the
seed alone.

Each bucket is a stream of permutations of its samples, seeded by (seed, epoch, bucket); of several sets, of each its
share (mixture.py). A step takes the next
ranks · batch_size · accumulation samples of one stream (or its global_batch); which one follows from the streams'
positions. So the positions, one number per bucket, are the loader's full state, independent of the number of ranks.

B samples of one rank and micro-batch · C latent channels · t, h, w latent grid · L text tokens, the batch's longest
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from stdit.config import Bucket, ConfigError, DataConfig, TrainBucket, Where
from stdit.config.token_budget import PackingBudget, imbalance
from stdit.data.features import ORIGINAL, EmptyCaption, Sample, pad_texts
from stdit.data.mixture import MixedIndex, Mixture, mix
from stdit.data.order import MixedStream, Stream
from stdit.data.packing import fill_step, micro_batches_of

# Steps that are announced to a source that fetches ahead, if it takes as many.
STEPS_AHEAD = 64
# Purpose of the draw of a caption, among the numbers that seed it.
CAPTIONS = 1


class ClipIndex(Protocol):
    """Which clips a dataset has."""

    def select(
        self, split: str | None, buckets: Sequence[Bucket], where: Sequence[Where] = ()
    ) -> dict[str, np.ndarray]:
        """Ids by bucket key."""
        ...

    @property
    def captions(self) -> tuple[str, ...]:
        """Names of the captions that clips may have."""
        ...


class Source(ClipIndex, Protocol):
    """Interface of a dataset."""

    def captions_of(self, id: int) -> tuple[str, ...]:
        """Those that one clip has."""
        ...

    def sample(self, id: int, caption: str = ...) -> Sample:
        """One clip's features, with one of its captions."""
        ...


@dataclass(frozen=True)
class Batch:
    """One rank's samples of one micro-batch. Latents are raw, not normalised."""

    mean: Tensor  # (B, C, t, h, w)
    std: Tensor | None  # of the same shape
    text: Tensor | None  # (B, L, D), zero where masked
    text_mask: Tensor | None  # (B, L) bool
    class_labels: Tensor  # (B,) int64, -1: none
    fps: Tensor  # (B,)
    height: Tensor  # (B,) px
    width: Tensor  # (B,) px
    ids: tuple[int, ...]
    captions: tuple[str, ...]
    paths: tuple[str, ...]  # source files, as the manifest names them
    positions: tuple[int, ...]  # in the bucket's stream (packed: in all of the run's samples); seed noise and timesteps
    bucket: Bucket
    weight: float = 1.0  # of its mean loss among the step's micro-batches, whose mean it is: their share of samples
    control: Tensor | None = None  # (B, C, t or 1, h, w), raw
    pooled: Tensor | None = None  # (B, P), pooled text vectors
    vision: Tensor | None = None  # (B, D, t, h', w'), features of a vision encoder

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def frames(self) -> Tensor:
        """Frames in pixels, (B,)."""
        return torch.full((len(self),), float(self.bucket.frames))

    @property
    def parts(self) -> tuple[Batch, ...]:
        """Itself, as a packed batch has one for each bucket."""
        return (self,)


@dataclass(frozen=True)
class PackedBatch:
    """One rank's samples of one micro-batch that is one packed sequence: a part for each bucket in it."""

    parts: tuple[Batch, ...]
    weight: float  # as a Batch's

    def __len__(self) -> int:
        return sum(map(len, self.parts))


# What a packed step is logged as, in place of a bucket.
PACKED = "packed"


class PlannedStep(NamedTuple):
    """What a step takes: stream positions before it and after it, by bucket; packed, the buckets' keys in the order in
    which samples are taken."""

    first: dict[str, int]
    position: dict[str, int]
    packed: tuple[str, ...] | None

    @property
    def samples_by_bucket(self) -> dict[str, int]:
        """Samples by bucket key, over all ranks."""
        return {key: end - self.first[key] for key, end in self.position.items() if end > self.first[key]}


@dataclass(frozen=True)
class Step:
    """One rank's part of one optimizer step."""

    batches: tuple[Batch | PackedBatch, ...]  # one per micro-step
    samples_by_bucket: dict[str, int]  # samples by bucket key, over all ranks and micro-steps
    position: dict[str, int]  # samples taken from each bucket's stream, this step included
    imbalance: float  # how far the rank with the most or least work is from the mean, as a share of it

    @property
    def samples(self) -> int:
        return sum(self.samples_by_bucket.values())

    @property
    def parts(self) -> list[Batch]:
        """The samples of all micro-steps, each of one bucket."""
        return [part for batch in self.batches for part in batch.parts]

    @property
    def key(self) -> str:
        """The bucket's, or PACKED."""
        return PACKED if isinstance(self.batches[0], PackedBatch) else self.batches[0].bucket.key


def collate(samples: Sequence[Sample], positions: Sequence[int], bucket: Bucket) -> Batch:
    """Samples of one bucket as a batch. ValueError: latents of different shapes; some with text and some without."""
    shapes = {tuple(s.mean.shape) for s in samples}
    if len(shapes) > 1:
        raise ValueError(f"bucket {bucket.key} holds latents of several shapes: {sorted(shapes)}")
    stds = [s.std for s in samples if s.std is not None]
    texts = [s.text for s in samples if s.text is not None]
    pooled = [s.pooled for s in samples if s.pooled is not None]
    if len(pooled) not in (0, len(samples)):
        raise ValueError(f"bucket {bucket.key}: {len(pooled)} of {len(samples)} samples have a pooled vector")
    if len(stds) not in (0, len(samples)) or len(texts) not in (0, len(samples)):
        raise ValueError(
            f"bucket {bucket.key}: {len(texts)} of {len(samples)} samples have text, {len(stds)} have a std"
        )
    vision = [s.vision for s in samples if s.vision is not None]
    if len(vision) not in (0, len(samples)):
        raise ValueError(
            f"bucket {bucket.key}: {len(vision)} of {len(samples)} samples have features of a vision encoder"
        )
    text, mask = pad_texts(texts) if texts else (None, None)
    return Batch(
        mean=torch.stack([s.mean for s in samples]),
        std=torch.stack(stds) if stds else None,
        text=text,
        text_mask=mask,
        class_labels=torch.tensor([s.class_label for s in samples]),
        fps=torch.tensor([float(s.fps) for s in samples]),
        height=torch.tensor([float(s.height) for s in samples]),
        width=torch.tensor([float(s.width) for s in samples]),
        ids=tuple(s.id for s in samples),
        captions=tuple(s.caption for s in samples),
        paths=tuple(s.path for s in samples),
        positions=tuple(positions),
        bucket=bucket,
        control=_stacked([s.control for s in samples], samples[0].mean.shape[1]),
        pooled=torch.stack(pooled) if pooled else None,
        vision=torch.stack(vision) if vision else None,
    )


def _stacked(controls: Sequence[Tensor | None], frames: int) -> Tensor | None:
    """Stacks control latents (C, frames or 1, h, w); with one frame only if all have one."""
    held = [control for control in controls if control is not None]
    if len(held) not in (0, len(controls)):
        raise ValueError(f"{len(held)} of {len(controls)} samples have a condition (control)")
    if len({control.shape[1] for control in held}) > 1:
        held = [control.expand(-1, frames, -1, -1) for control in held]
    return torch.stack(held) if held else None


class BucketSchedule:
    """Which bucket each step takes. `ids`: of the training clips, by bucket key; `counts`: how many there are.

    accumulation: micro-batches of buckets that state no global_batch. packing: steps take samples of all buckets, which
    state their tokens. ConfigError: a bucket without samples, captions that no clip has, a global_batch that is too
    small for the ranks.
    """

    def __init__(
        self,
        index: ClipIndex,
        data: DataConfig,
        ranks: int = 1,
        accumulation: int = 1,
        packing: PackingBudget | None = None,
    ) -> None:
        self.data, self.ranks, self.packing = data, ranks, packing
        if packing is None:
            self.micro_batches = {b.key: b.micro_batches(ranks, accumulation) for b in data.buckets}
        if unknown := sorted(set(data.captions or ()) - set(index.captions if data.captions else ())):
            raise ConfigError(
                f"data.captions: {data.source_name} has no captions {', '.join(unknown)}; it has {', '.join(index.captions)}"
            )
        self.ids = index.select(data.train_split, data.buckets, data.where)
        for i, bucket in enumerate(data.buckets):
            if len(self.ids[bucket.key]) == 0:
                conditions = " that meets data.where" if data.where else ""
                raise ConfigError(
                    f"data.buckets[{i}]: {data.source_name} holds no sample of bucket {bucket.key} in split {data.train_split!r}{conditions}"
                )
        self.counts = {key: len(found) for key, found in self.ids.items()}
        self.mixed = mix(index, self.ids, data.buckets) if isinstance(index, MixedIndex) else None
        # Of all samples, the part that each bucket gives: by its clips and weight.
        self.shares = {
            b.key: self.mixed[b.key].share if self.mixed else self.counts[b.key] * b.weight for b in data.buckets
        }

    def step_size(self, bucket: TrainBucket) -> int:
        """Samples of one step, over all ranks and micro-steps."""
        return self.micro_batches[bucket.key].samples

    def next_bucket(self, position: Mapping[str, int]) -> TrainBucket:
        """Picks the bucket furthest behind its weighted share: samples · weight per epoch, whatever the batch sizes."""
        return min(
            self.data.buckets,
            key=lambda b: (position[b.key] + self.step_size(b)) / self.shares[b.key],
        )

    def plan_step(self, position: Mapping[str, int]) -> PlannedStep:
        """The step at `position`."""
        first = dict(position)
        if self.packing is None:
            bucket = self.next_bucket(position)
            return PlannedStep(first, first | {bucket.key: first[bucket.key] + self.step_size(bucket)}, None)
        keys = fill_step(first, self.shares, self.tokens, self.packing.tokens_per_step)
        return PlannedStep(first, {key: start + keys.count(key) for key, start in first.items()}, keys)

    @property
    def tokens(self) -> dict[str, int]:
        """Video tokens of a sample by bucket key, where the buckets state them."""
        return {b.key: b.tokens for b in self.data.buckets if b.tokens is not None}


class BatchPart(NamedTuple):
    """Samples of one bucket in a micro-batch: their positions in its stream, and those that seed them
    (Batch.positions)."""

    bucket: TrainBucket
    stream: Sequence[int]
    positions: Sequence[int]


class RankShare(NamedTuple):
    """One rank's micro-batches of a step, each by bucket; imbalance: as Step's."""

    micro_batches: list[list[BatchPart]]
    imbalance: float


class Loader(BucketSchedule):
    """Iterates over `Step`s without end, starting at `position`. `workers` threads read ahead. ConfigError: as
    BucketSchedule.

    left_out: positions of each bucket's stream; a step that would take one of them is left out.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        accumulation: int = 1,
        position: Mapping[str, int] | None = None,
        left_out: Mapping[str, Sequence[range]] | None = None,
        packing: PackingBudget | None = None,
    ) -> None:
        super().__init__(source, data, ranks, accumulation, packing)
        self.source, self.seed, self.rank, self.left_out = source, seed, rank, left_out or {}
        self.streams = {b.key: self._stream(b) for b in data.buckets}
        self.position = {b.key: int((position or {}).get(b.key, 0)) for b in data.buckets}

    def _stream(self, bucket: TrainBucket) -> Stream | MixedStream:
        if self.mixed is None:
            return Stream(self.ids[bucket.key], self.seed, bucket)
        return MixedStream(self.mixed[bucket.key].ids, self.mixed[bucket.key].counts, self.seed, bucket)

    def samples_by_set(self, position: Mapping[str, int]) -> dict[str, int]:
        """Samples before `position` of each set of a mixture, by its name; empty for one set."""
        if not isinstance(self.source, Mixture):
            return {}
        streams = ((stream, position[key]) for key, stream in self.streams.items())
        taken = sum(stream.samples_before(end) for stream, end in streams if isinstance(stream, MixedStream))
        return {name: int(count) for name, count in zip(self.source.names, np.asarray(taken), strict=True)}

    def _plan(self) -> Iterator[PlannedStep]:
        position = dict(self.position)
        while True:
            step = self.plan_step(position)
            position = step.position
            if any(
                step.first[key] < other.stop and other.start < position[key]
                for key in step.samples_by_bucket
                for other in self.left_out.get(key, ())
            ):
                continue
            yield step

    def _announced(self) -> Iterator[tuple[PlannedStep, RankShare]]:
        """`_plan`, with this rank's share; a source that reads from another machine is told of its samples before they
        are needed."""
        planned = ((step, self._share(step)) for step in self._plan())
        open_ahead = getattr(self.source, "read_ahead", None)
        ahead = open_ahead and open_ahead()
        if ahead is None:
            yield from planned
            return
        upcoming: deque[tuple[PlannedStep, RankShare, list[int]]] = deque()
        try:
            for step, share in planned:
                parts = [part for parts in share.micro_batches for part in parts]
                ids = [self.streams[part.bucket.key].at(p) for part in parts for p in part.stream]
                ahead.announce(ids)
                upcoming.append((step, share, ids))
                while upcoming and (ahead.is_full or len(upcoming) > STEPS_AHEAD):
                    step, share, ids = upcoming.popleft()
                    yield step, share
                    ahead.release(ids)
        finally:
            ahead.close()

    def _read(self, parts: Sequence[BatchPart], weight: float) -> Batch | PackedBatch:
        batches = [self._read_part(part) for part in parts]
        return replace(batches[0], weight=weight) if self.packing is None else PackedBatch(tuple(batches), weight)

    def _read_part(self, part: BatchPart) -> Batch:
        stream = self.streams[part.bucket.key]
        ids = [stream.at(position) for position in part.stream]
        if self.data.captions is None:
            samples = [self.source.sample(i) for i in ids]
        else:
            epochs = [stream.epoch_of(position) for position in part.stream]
            names = [self._caption(id, epoch) for id, epoch in zip(ids, epochs, strict=True)]
            samples = [self.source.sample(i, name) for i, name in zip(ids, names, strict=True)]
        return collate(samples, part.positions, part.bucket)

    def _caption(self, id: int, epoch: int) -> str:
        """The caption of a clip in an epoch, by `data.captions`: a function of seed, clip and epoch alone."""
        assert self.data.captions is not None
        having = self.source.captions_of(id)
        shares = {name: share for name, share in self.data.captions.items() if name in having}
        if not shares:
            return ORIGINAL
        draw = np.random.default_rng((self.seed, CAPTIONS, id, epoch)).random() * sum(shares.values())
        at = int(np.searchsorted(np.cumsum(list(shares.values())), draw, side="right"))
        return list(shares)[min(at, len(shares) - 1)]

    def _share(self, step: PlannedStep) -> RankShare:
        if step.packed is not None:
            return self._packed_share(step, step.packed)
        ((key, samples),) = step.samples_by_bucket.items()
        (bucket,) = (b for b in self.data.buckets if b.key == key)
        count, first = self.micro_batches[key].accumulation, step.first[key]
        # A run of its own, so that ranks differ by one sample at most.
        shares = self.ranks * count
        runs = [
            range(first + samples * share // shares, first + samples * (share + 1) // shares)
            for share in range(self.rank * count, (self.rank + 1) * count)
        ]
        return RankShare([[BatchPart(bucket, run, run)] for run in runs], imbalance(samples, self.ranks))

    def _packed_share(self, step: PlannedStep, keys: Sequence[str]) -> RankShare:
        """keys: of each sample's bucket, in order."""
        assert self.packing is not None
        tokens = [self.tokens[key] for key in keys]
        before, drawn = sum(step.first.values()), dict(step.first)
        positions: list[int] = []
        for key in keys:  # of each sample, in its bucket's stream
            positions.append(drawn[key])
            drawn[key] += 1

        def parts(samples: Sequence[int]) -> list[BatchPart]:
            own = {b.key: [i for i in samples if keys[i] == b.key] for b in self.data.buckets}
            return [
                BatchPart(b, [positions[i] for i in own[b.key]], [before + i for i in own[b.key]])
                for b in self.data.buckets
                if own[b.key]
            ]

        ranks = micro_batches_of(tokens, self.ranks, self.packing.tokens_per_micro_batch)
        work = [sum(tokens[i] for samples in own for i in samples) for own in ranks]
        mean = sum(work) / self.ranks
        unequal = max(max(work) - mean, mean - min(work)) / mean
        return RankShare([parts(samples) for samples in ranks[self.rank]], unequal)

    def __iter__(self) -> Iterator[Step]:
        if self.data.workers == 0:
            for step, share in self._announced():
                yield _step(step, share, [self._read(*one) for one in self._weighted(step, share)])
            return
        with ThreadPoolExecutor(self.data.workers, thread_name_prefix="loader") as pool:
            ahead: deque[tuple[PlannedStep, RankShare, list[Future[Batch | PackedBatch]]]] = deque()
            try:
                for step, share in self._announced():
                    futures = [pool.submit(self._read, *one) for one in self._weighted(step, share)]
                    ahead.append((step, share, futures))
                    if sum(len(f) for *_, f in ahead) > self.data.workers + len(futures):
                        step, share, futures = ahead.popleft()
                        yield _step(step, share, [future.result() for future in futures])
            finally:
                for *_, futures in ahead:
                    for future in futures:
                        future.cancel()

    def _weighted(self, step: PlannedStep, share: RankShare) -> list[tuple[list[BatchPart], float]]:
        """This rank's micro-batches, and the weights of their mean losses."""
        count, samples = len(share.micro_batches), sum(step.samples_by_bucket.values())
        return [
            (parts, sum(len(part.stream) for part in parts) * self.ranks * count / samples)
            for parts in share.micro_batches
        ]


def _step(step: PlannedStep, share: RankShare, batches: Sequence[Batch | PackedBatch]) -> Step:
    return Step(tuple(batches), step.samples_by_bucket, step.position, share.imbalance)


class Synthetic:
    """Generated clips, to test a launch: waves whose direction and speed depend on the class.

    channels: of the latents, which stand for themselves. classes, text_dim, max_text_tokens, pooled_dim: None where the
    model takes none. 256 training and 32 validation clips a bucket.
    """

    SIZES = {"train": range(256), "validation": range(256, 288)}  # noqa: RUF012

    def __init__(
        self,
        channels: int,
        classes: int | None,
        text_dim: int | None,
        max_text_tokens: int,
        pooled_dim: int | None = None,
        features_dim: int | None = None,
    ) -> None:
        self.channels, self.classes, self.text_dim, self.pooled_dim = channels, classes, text_dim, pooled_dim
        self.features_dim = features_dim
        self.max_text_tokens = min(max_text_tokens, 12)
        self._buckets: list[Bucket] = []

    def select(
        self, split: str | None, buckets: Sequence[Bucket], where: Sequence[Where] = ()
    ) -> dict[str, np.ndarray]:
        """As FeatureSet.select. ConfigError: conditions, of which synthetic data meets none; another split."""
        if where:
            raise ConfigError(f"data.where: synthetic data has no column {where[0].column!r}")
        if split is not None and split not in self.SIZES:
            raise ConfigError(f"data: synthetic data has no split {split!r}; it has {', '.join(self.SIZES)}")
        numbers = [n for name, sizes in self.SIZES.items() if split in (None, name) for n in sizes]
        known = {b.key for b in self._buckets}
        self._buckets += [
            Bucket(frames=b.frames, height=b.height, width=b.width) for b in buckets if b.key not in known
        ]
        keys = [b.key for b in self._buckets]
        # The bucket in the upper digits of the id.
        return {b.key: np.array([keys.index(b.key) * 1000 + n for n in numbers]) for b in buckets}

    @property
    def empty_caption(self) -> EmptyCaption | None:
        """One word of zeros; None without text."""
        if not self.text_dim:
            return None
        return EmptyCaption(torch.zeros(1, self.text_dim), torch.zeros(self.pooled_dim) if self.pooled_dim else None)

    @property
    def captions(self) -> tuple[str, ...]:
        return (ORIGINAL,)

    def captions_of(self, id: int) -> tuple[str, ...]:
        return (ORIGINAL,)

    def sample(self, id: int, caption: str = ORIGINAL) -> Sample:
        bucket, number = self._buckets[int(id) // 1000], int(id) % 1000
        kinds = self.classes or 10
        kind = number % kinds
        generator = torch.Generator().manual_seed(number)
        t, y, x = torch.meshgrid(
            *(torch.linspace(0, 1, n) for n in (bucket.frames, bucket.height, bucket.width)), indexing="ij"
        )
        angle, phase = 2 * math.pi * kind / kinds, 2 * math.pi * torch.rand(self.channels, 1, 1, 1, generator=generator)
        wave = torch.sin(2 * math.pi * (2 * math.cos(angle) * x + 2 * math.sin(angle) * y + t) + phase)  # (C, T, H, W)
        # The class's own words, as many as its number says.
        words = torch.Generator().manual_seed(10_000 + kind)
        text = torch.randn(1 + kind % self.max_text_tokens, self.text_dim, generator=words) if self.text_dim else None
        pooled = torch.randn(self.pooled_dim, generator=words) if self.pooled_dim else None
        vision = None
        if self.features_dim:  # a random mixture of the wave's channels, of every second pixel
            mixed = torch.randn(self.features_dim, self.channels, generator=torch.Generator().manual_seed(20_000))
            vision = torch.einsum("dc,cthw->dthw", mixed, wave[:, :, ::2, ::2])
        return Sample(
            id=int(id),
            mean=wave,
            std=None,
            text=text,
            class_label=kind if self.classes else -1,
            fps=8.0 if bucket.frames > 1 else 0.0,
            height=bucket.height,
            width=bucket.width,
            caption=f"waves of kind {kind}",
            pooled=pooled,
            vision=vision,
        )
