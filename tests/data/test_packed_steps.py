"""Packed steps: filled to their tokens, in proportion to the buckets' shares, and shared out evenly."""

from __future__ import annotations

from itertools import islice

import pytest
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from stdit.config import ConfigError
from stdit.config.token_budget import PackingBudget, check_packing_budget
from stdit.data.loader import Loader, Step, Synthetic
from stdit.data.packing import fill_step, micro_batches_of
from stdit.training.derive import complete
from tests.support.rank_jobs import config_of, settings

BUCKETS = [
    {"frames": frames, "height": side, "width": 8, "weight": w} for frames, side, w in ((3, 8, 1), (1, 8, 3), (1, 4, 2))
]
BUDGET = PackingBudget(700, 150)  # samples of 48, 16 and 8 tokens

tokens_of = st.lists(st.integers(1, 300), min_size=1, max_size=5)


@quick(deadline=None, max_examples=100)
@given(
    tokens=tokens_of,
    shares=st.lists(st.floats(0.1, 1000), min_size=5, max_size=5),
    budget=st.integers(300, 3000),
    steps=st.integers(1, 4),
)
def test_a_step_takes_from_the_bucket_furthest_behind_until_the_next_sample_does_not_fit(
    tokens: list[int], shares: list[float], budget: int, steps: int
) -> None:
    by_key = {str(i): n for i, n in enumerate(tokens)}
    share = dict(zip(by_key, shares, strict=False))
    position, own = dict.fromkeys(by_key, 0), dict.fromkeys(by_key, 0)
    for _ in range(steps):
        found, left = fill_step(position, share, by_key, budget), budget
        for key in found:
            assert key == min(own, key=lambda k: (own[k] + 1) / share[k])
            own[key] += 1
            position[key] += 1
            left -= by_key[key]
        after = min(own, key=lambda k: (own[k] + 1) / share[k])
        assert 0 <= left < by_key[after]


@quick(deadline=None, max_examples=200)
@given(tokens=tokens_of, ranks=st.integers(1, 5), spare=st.integers(0, 2000), most=st.none() | st.integers(600, 1200))
def test_every_rank_has_as_many_micro_batches_and_none_is_empty_or_too_large(
    tokens: list[int], ranks: int, spare: int, most: int | None
) -> None:
    by_key = {str(i): n for i, n in enumerate(tokens)}
    budget = PackingBudget(ranks * max(tokens) + spare, most)
    check_packing_budget(by_key, budget, ranks)
    sizes = [by_key[key] for key in fill_step(dict.fromkeys(by_key, 0), dict.fromkeys(by_key, 1.0), by_key, budget[0])]
    shares = micro_batches_of(sizes, ranks, most)
    assert len({len(own) for own in shares}) == 1
    assert sorted(i for own in shares for batch in own for i in batch) == list(range(len(sizes)))
    assert all(batch and sum(sizes[i] for i in batch) <= (most or sum(sizes)) for own in shares for batch in own)


def test_what_might_leave_a_rank_without_samples_is_refused() -> None:
    check_packing_budget({"a": 48, "b": 16}, PackingBudget(48, 48), 1)
    with pytest.raises(ConfigError, match=r"tokens_per_step is 150; .* on 4 data-parallel ranks it takes 192 or more"):
        check_packing_budget({"a": 48, "b": 16}, PackingBudget(150, None), 4)
    with pytest.raises(
        ConfigError, match=r"tokens_per_micro_batch is 90; .* 96 or more, as a sample of bucket a has 48"
    ):
        check_packing_budget({"a": 48, "b": 16}, PackingBudget(900, 90), 2)


def loader(rank: int = 0, ranks: int = 1, position: dict[str, int] | None = None, workers: int = 0) -> Loader:
    data = settings("x", train={"packing": True, "tokens_per_step": BUDGET[0], "tokens_per_micro_batch": BUDGET[1]})
    data["data"] |= {"buckets": BUCKETS, "workers": workers}
    config = complete(config_of(data))
    source = Synthetic(1, 4, 8, 12)
    return Loader(source, config.data, 0, rank, ranks, position=position, packing=config.train.packing_budget)


def samples(steps: list[Step]) -> set[tuple[str, int, int]]:
    """(bucket, id, position) of each sample."""
    parts = [part for step in steps for part in step.parts]
    found = [(part.bucket.key, *both) for part in parts for both in zip(part.ids, part.positions, strict=True)]
    assert len(set(found)) == len(found)
    return set(found)


def test_steps_are_the_same_on_any_number_of_ranks_and_after_a_resume() -> None:
    whole = list(islice(loader(), 6))
    pair = [list(islice(loader(rank, 2, workers=2), 3)) for rank in range(2)]
    later = list(islice(loader(position=whole[2].position), 3))
    for i in range(3):
        assert samples([whole[i]]) == samples([own[i] for own in pair])
        assert samples([whole[3 + i]]) == samples([later[i]])
        assert pair[0][i].samples_by_bucket == whole[i].samples_by_bucket
        assert pair[0][i].position == whole[i].position
        assert pair[0][i].imbalance < 0.1


def test_positions_that_seed_samples_are_unique_over_the_run_and_buckets_keep_their_shares() -> None:
    steps = list(islice(loader(), 40))
    positions = sorted(position for _, _, position in samples(steps))
    assert positions == list(range(len(positions)))
    taken = steps[-1].position
    assert sum(step.samples for step in steps) == sum(taken.values()) == len(positions)
    for key, share in zip(taken, (1, 3, 2), strict=True):
        assert taken[key] / len(positions) == pytest.approx(share / 6, rel=0.02)


def test_steps_use_their_tokens_and_micro_batches_weigh_by_their_samples() -> None:
    for step in islice(loader(), 20):
        sizes = {"3x8x8": 48, "1x8x8": 16, "1x4x8": 8}
        total = sum(sizes[key] * n for key, n in step.samples_by_bucket.items())
        assert 700 - 48 < total <= 700
        for batch in step.batches:
            assert sum(sizes[part.bucket.key] * len(part) for part in batch.parts) <= 150
            assert batch.weight == pytest.approx(len(batch) * len(step.batches) / step.samples)
        assert len(step.batches) == 5
