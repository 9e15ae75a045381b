from __future__ import annotations

import pytest

from stdit.config import TrainConfig
from stdit.training.divergence import MAX_NAMED, Diverged, SkippedSteps, describe_bad_samples


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


def test_a_few_samples_are_named_and_the_rest_counted() -> None:
    assert describe_bad_samples([]) == "every sample's loss is finite: the gradient overflowed"
    many = [f"sample {n}" for n in range(MAX_NAMED + 2)]
    assert describe_bad_samples(many).endswith("sample 7 and 2 more")
