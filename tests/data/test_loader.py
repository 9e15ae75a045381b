"""The order of the data: a function of the seed, the same for any number of ranks, whole and without doubles."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.config import Bucket, ConfigError, DataConfig, Where
from stdit.data.features import Sample
from stdit.data.loader import Loader, Step, Synthetic, collate
from stdit.data.order import Stream


class Numbered:
    """A source whose samples are their ids; `counts` samples a bucket, in the order of the buckets."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def select(self, split: Any, buckets: Any, where: Any = ()) -> dict[str, np.ndarray]:
        starts = np.cumsum((0, *self.counts))
        return {b.key: np.arange(starts[i], starts[i + 1]) for i, b in enumerate(buckets)}

    captions = ("original",)

    def captions_of(self, id: int) -> tuple[str, ...]:
        return self.captions

    def sample(self, id: int, caption: str = "original") -> Sample:
        return Sample(int(id), torch.full((1, 1, 2, 2), float(id)), None, None, -1, 8.0, 2, 2, str(id))


def data(*buckets: tuple[int, float], workers: int = 0) -> DataConfig:
    """`buckets`: (batch size, weight)."""
    listed = [
        {"frames": i + 1, "height": 2, "width": 2, "batch_size": size, "weight": weight}
        for i, (size, weight) in enumerate(buckets)
    ]
    return DataConfig.model_validate({"features": "synthetic", "buckets": listed, "workers": workers})


def ids(step: Step) -> list[int]:
    return [int(c) for batch in step.parts for c in batch.captions]


def of_step(
    number: int, counts: tuple[int, ...], config: DataConfig, ranks: int, accumulation: int, seed: int = 0
) -> list[Step]:
    """Step `number` of every rank."""
    loaders = [Loader(Numbered(*counts), config, seed, r, ranks, accumulation) for r in range(ranks)]
    return [next(islice(iter(loader), number, None)) for loader in loaders]


@settings(deadline=None, max_examples=40)
@given(
    ranks=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    size=st.integers(1, 3),
    number=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_rank_shards_are_disjoint_and_cover_and_do_not_depend_on_the_cut(
    ranks: int, accumulation: int, size: int, number: int, seed: int
) -> None:
    total = ranks * accumulation * size
    counts = (50, 31)
    parts = of_step(number, counts, data((size, 1.0), (size, 1.0)), ranks, accumulation, seed)
    (whole,) = of_step(number, counts, data((total, 1.0), (total, 1.0)), 1, 1, seed)
    positions = [p for part in parts for batch in part.parts for p in batch.positions]
    assert sorted(positions) == sorted(whole.parts[0].positions)
    assert Counter(i for part in parts for i in ids(part)) == Counter(ids(whole))
    # Every rank has the same bucket, and knows the same of where the data stand.
    assert len({part.key for part in parts}) == 1
    assert all(part.position == whole.position and part.samples == total for part in parts)


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_epoch_has_every_sample_once(count: int, epochs: int, seed: int) -> None:
    stream = Stream(np.arange(count), seed, Bucket(frames=1, height=2, width=2))
    for epoch in range(epochs):
        assert sorted(stream.at(epoch * count + i) for i in range(count)) == list(range(count))
    # Going back gives what was given before.
    assert [stream.at(i) for i in range(count)] == [
        Stream(np.arange(count), seed, Bucket(frames=1, height=2, width=2)).at(i) for i in range(count)
    ]


def test_other_seeds_epochs_and_buckets_are_ordered_otherwise() -> None:
    def order(seed: int, epoch: int, frames: int) -> list[int]:
        stream = Stream(np.arange(50), seed, Bucket(frames=frames, height=2, width=2))
        return [stream.at(epoch * 50 + i) for i in range(50)]

    orders = [order(0, 0, 1), order(1, 0, 1), order(0, 1, 1), order(0, 0, 2)]
    assert len({tuple(o) for o in orders}) == 4


@settings(deadline=None, max_examples=30)
@given(
    counts=st.tuples(st.integers(20, 90), st.integers(20, 90)),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    weight=st.sampled_from([0.5, 1.0, 3.0]),
)
def test_buckets_take_turns_by_weight_per_sample(
    counts: tuple[int, int], sizes: tuple[int, int], weight: float
) -> None:
    loader = Loader(Numbered(*counts), data((sizes[0], 1.0), (sizes[1], weight)), 0)
    last = list(islice(iter(loader), 400))[-1]
    first, second = last.position.values()
    # How often each sample was seen, up to a step's worth.
    slack = max(sizes[0] / counts[0], sizes[1] / counts[1] / weight) + 1e-9
    assert abs(first / counts[0] - second / counts[1] / weight) <= slack


def test_it_goes_on_where_it_stood_with_another_number_of_ranks_too() -> None:
    config, counts = data((4, 1.0), (2, 1.0)), (30, 21)
    steps = list(islice(iter(Loader(Numbered(*counts), config, 3)), 12))
    resumed = Loader(Numbered(*counts), config, 3, position=steps[4].position)
    assert [ids(s) for s in islice(iter(resumed), 7)] == [ids(s) for s in steps[5:]]
    halves = data((2, 1.0), (1, 1.0))
    pair = [Loader(Numbered(*counts), halves, 3, r, 2, position=steps[4].position) for r in (0, 1)]
    for expected, *found in zip(steps[5:], *(islice(iter(loader), 7) for loader in pair), strict=True):
        assert ids(found[0]) + ids(found[1]) == ids(expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_reading_ahead_changes_nothing(workers: int) -> None:
    plain = list(islice(iter(Loader(Numbered(17, 9), data((4, 1.0), (2, 1.0)), 1, accumulation=2)), 20))
    ahead = list(
        islice(iter(Loader(Numbered(17, 9), data((4, 1.0), (2, 1.0), workers=workers), 1, accumulation=2)), 20)
    )
    assert [ids(s) for s in ahead] == [ids(s) for s in plain]
    assert [s.position for s in ahead] == [s.position for s in plain]


def test_a_reader_that_fails_is_heard() -> None:
    class Broken(Numbered):
        def sample(self, id: int, caption: str = "original") -> Sample:
            raise ConfigError(f"shard of {id} is gone")

    with pytest.raises(ConfigError, match="is gone"):
        next(iter(Loader(Broken(9), data((2, 1.0), workers=2), 0)))


def test_a_bucket_smaller_than_a_step_goes_round() -> None:
    (step,) = of_step(0, (3,), data((8, 1.0)), 1, 1)
    assert Counter(ids(step)).most_common() == [(i, n) for i, n in Counter(ids(step)).most_common() if n in (2, 3)]
    assert step.parts[0].positions == tuple(range(8))


def test_a_bucket_without_samples_is_named() -> None:
    with pytest.raises(
        ConfigError, match=r"data.buckets\[1\]: synthetic holds no sample of bucket 2x2x2 in split 'train'"
    ):
        Loader(Numbered(4, 0), data((1, 1.0), (1, 1.0)), 0)


def sample(text: int | None, frames: int = 1, std: bool = False) -> Sample:
    mean = torch.zeros(1, frames, 2, 2)
    tokens = None if text is None else torch.ones(text, 5)
    return Sample(0, mean, mean if std else None, tokens, 3, 8.0, 2, 2, "c")


def test_text_is_as_long_as_the_longest_of_the_batch() -> None:
    bucket = Bucket(frames=1, height=2, width=2)
    batch = collate([sample(2), sample(4)], [0, 1], bucket)
    assert batch.text is not None
    assert batch.text_mask is not None
    assert batch.text.shape == (2, 4, 5)
    assert batch.text_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.text[0, 2:].abs().sum() == 0
    assert batch.class_labels.tolist() == [3, 3]
    assert len(batch) == 2


def test_pooled_vectors_and_the_clips_size_come_with_the_batch() -> None:
    bucket = Bucket(frames=5, height=2, width=2)
    batch = collate([replace(sample(2), pooled=torch.full((3,), float(i))) for i in range(2)], [0, 1], bucket)
    assert batch.pooled is not None
    assert batch.pooled.tolist() == [[0.0] * 3, [1.0] * 3]
    assert batch.frames.tolist() == [5.0, 5.0]
    assert batch.height.tolist() == batch.width.tolist() == [2.0, 2.0]
    assert collate([sample(2)], [0], bucket).pooled is None
    with pytest.raises(ValueError, match="1 of 2 samples have a pooled vector"):
        collate([sample(2), replace(sample(2), pooled=torch.zeros(3))], [0, 1], bucket)


def test_synthetic_clips_have_pooled_vectors_and_an_empty_caption_where_asked() -> None:
    source = Synthetic(3, 4, 8, 20, 5)
    (first, *_) = source.select("train", [Bucket(frames=1, height=4, width=4)])["1x4x4"]
    pooled, empty = source.sample(first).pooled, source.empty_caption
    assert pooled is not None
    assert pooled.shape == (5,)
    assert empty is not None
    assert empty.pooled is not None
    assert (empty.text.shape, empty.pooled.shape) == ((1, 8), (5,))
    assert Synthetic(3, 4, None, 20).empty_caption is None


def test_samples_that_do_not_fit_together_are_refused() -> None:
    bucket = Bucket(frames=1, height=2, width=2)
    with pytest.raises(ValueError, match="several shapes"):
        collate([sample(1), sample(1, frames=2)], [0, 1], bucket)
    with pytest.raises(ValueError, match="1 of 2 samples have text"):
        collate([sample(1), sample(None)], [0, 1], bucket)


def test_synthetic_clips_are_the_same_at_every_call_and_splits_are_apart() -> None:
    source = Synthetic(3, 4, 8, 20)
    bucket = Bucket(frames=2, height=4, width=6)
    train, held = (source.select(split, [bucket])[bucket.key] for split in ("train", "validation"))
    assert not set(train) & set(held)
    one, again = source.sample(train[5]), source.sample(train[5])
    assert one.mean.shape == (3, 2, 4, 6)
    assert torch.equal(one.mean, again.mean)
    assert one.text is not None
    assert again.text is not None
    assert torch.equal(one.text, again.text)
    assert one.mean.abs().max() <= 1
    with pytest.raises(ConfigError, match="no split 'test'"):
        source.select("test", [bucket])
    with pytest.raises(ConfigError, match="no column 'score'"):
        source.select("train", [bucket], [Where(column="score", at_least=1)])
