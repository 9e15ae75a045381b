from __future__ import annotations

import json
import math
from typing import Any, cast

import pytest
import torch

from stdit.config import Bucket, TrainConfig
from stdit.data.loader import Batch
from stdit.training import saving
from stdit.training.bad_steps import BadSteps
from stdit.training.distributed import Ranks
from stdit.training.divergence import MAX_NAMED, Diverged, SkippedSteps, describe_bad_samples, find_bad_samples
from stdit.training.identity import SkippedStepCounts
from stdit.training.resume import TrainState
from tests.support.rank_jobs import config_of, settings


def count(skipped: SkippedSteps, steps: str, bucket: str = "a", first: int = 1) -> int | None:
    """Feeds steps, x a skipped one; the step at which the run ends, or None."""
    for step, kind in enumerate(steps, first):
        skipped.add(bucket, kind == "x")
        try:
            skipped.check(step)
        except Diverged:
            return step
    return None


def make(**limits: float) -> SkippedSteps:
    return SkippedSteps(TrainConfig(steps=9, **limits))  # pyright: ignore[reportArgumentType]


def test_a_row_of_skipped_steps_ends_the_run() -> None:
    assert count(make(max_bad_steps=2, max_bad_share=1), "xx.xx.xxx") == 9
    assert count(make(max_bad_steps=0), ".x") == 2


def test_a_share_of_skipped_steps_ends_the_run_though_never_two_in_a_row() -> None:
    # The fourth of seven; with a share of 0.6 never.
    assert count(make(max_bad_steps=3, max_bad_share=0.5), "x.x.x.x.") == 7
    assert count(make(max_bad_steps=3, max_bad_share=0.6), "x." * 200) is None
    # Only the last 100 count.
    assert count(make(max_bad_steps=3, max_bad_share=0.5), "x" * 3 + "." * 200 + "x..." * 50) is None


def test_each_bucket_has_its_share() -> None:
    skipped, ended = make(max_bad_steps=3, max_bad_share=0.5), None
    for step in range(1, 100):
        assert count(skipped, ".....", "good", step) is None
        ended = count(skipped, "x", "bad", step)
        if ended:
            break
    assert ended == 4
    assert skipped.summary() == "skipped steps, whose gradient was not finite: 4 of 4 of bucket bad"
    with pytest.raises(Diverged, match="4 of the last 4 steps of bucket bad"):
        skipped.check(4)


def test_a_short_run_of_mostly_skipped_steps_is_no_finished_one() -> None:
    skipped = make()
    assert count(skipped, ".xxxx") is None
    with pytest.raises(Diverged, match="4 of the last 5 steps of bucket a had"):
        skipped.check(5, last=True)
    skipped = make()
    count(skipped, ".x..")
    skipped.check(4, last=True)


def test_counts_go_on_from_a_checkpoint_as_if_there_had_been_none() -> None:
    limits = {"max_bad_steps": 3, "max_bad_share": 0.5}
    for steps in ("x.x.x.x.", "..xxxx", "x" * 3 + "." * 120 + "xx.x.x.xx"):
        whole = make(**limits)
        for step, kind in enumerate(steps):
            whole.add("ab"[step % 3 % 2], kind == "x")
        for half in range(len(steps)):
            skipped = make(**limits)
            for step, kind in enumerate(steps):
                if step == half:  # written to a checkpoint and read again
                    counts = json.loads(json.dumps(skipped.counts()))
                    SkippedStepCounts.model_validate(counts)
                    skipped = SkippedSteps(TrainConfig(steps=9, **limits), counts)  # pyright: ignore[reportArgumentType]
                skipped.add("ab"[step % 3 % 2], kind == "x")
            assert (skipped.counts(), skipped.summary()) == (whole.counts(), whole.summary())
        assert count(make(**limits), steps) == resumed(steps, limits)


def resumed(steps: str, limits: dict[str, float]) -> int | None:
    """As `count`, with a new process before every step."""
    counts: dict[str, Any] | None = None
    for step, kind in enumerate(steps, 1):
        skipped = SkippedSteps(TrainConfig(steps=9, **limits), counts)  # pyright: ignore[reportArgumentType]
        if count(skipped, kind, first=step):
            return step
        counts = skipped.counts()
    return None


def test_a_few_samples_are_named_and_the_rest_counted() -> None:
    assert describe_bad_samples([], ["sample 4, loss 9"]).endswith(
        "the gradient overflowed; the largest losses: sample 4, loss 9"
    )
    many = [f"sample {n}" for n in range(MAX_NAMED + 2)]
    assert describe_bad_samples(many, []).endswith("sample 7 and 2 more")


def batch(first: int) -> Batch:
    zeros, ids = torch.zeros(6), tuple(range(first, first + 6))
    return Batch(
        mean=torch.zeros(6, 1, 1, 2, 2), std=None, text=None, text_mask=None, class_labels=zeros.long(), fps=zeros, height=zeros,
        width=zeros, ids=ids, captions=("a wave",) * 6, paths=tuple(f"{id}.mp4" for id in ids), positions=ids,
        bucket=Bucket(frames=1, height=8, width=8),
    )  # fmt: skip


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_samples_are_named_whatever_is_not_finite(value: float) -> None:
    alone = Ranks(0, 1, 0, torch.device("cpu"))
    losses = [torch.arange(1.0, 7.0), torch.arange(7.0, 13.0)]
    # The gradient alone: the samples that most of it comes from.
    bad, largest = find_bad_samples([batch(10), batch(20)], losses, alone)
    assert bad == []
    assert largest[0] == "sample 25 (bucket 1x8x8, 25.mp4, 'a wave'), loss 12"
    assert len(largest) == MAX_NAMED
    losses[1][2] = value
    bad, largest = find_bad_samples([batch(10), batch(20)], losses, alone)
    assert (bad, largest) == (["sample 22 (bucket 1x8x8, 22.mp4, 'a wave')"], [])


class FullDisk(saving.Saver):
    """A checkpoint is on its way."""

    def __init__(self) -> None:
        self.finished = 0

    def finish(self) -> None:
        self.finished += 1
        raise saving.NotWritten("no room")


def test_an_error_of_all_ranks_waits_for_the_checkpoint_on_its_way_with_all_of_them() -> None:
    data = config_of(settings("runs/x", train={"max_bad_steps": 0}))
    bad_steps = BadSteps(data, Ranks(0, 1, 0, torch.device("cpu")), TrainState())
    bad_steps.skipped.add("1x8x8", True)
    saver = FullDisk()
    with pytest.raises(Diverged, match="1 consecutive steps"):
        bad_steps.check(3, cast(Any, None), math.nan, saver)
    assert saver.finished == 1
