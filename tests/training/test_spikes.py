"""Loss spikes: what is one, and what marking, skipping and rewinding do to a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import TrainConfig
from stdit.training import checkpoint
from stdit.training.distributed import Ranks
from stdit.training.spikes import LEAST, LossSpikes
from tests.support.rank_jobs import run_with_spike, run_with_spike_before_a_checkpoint_is_written, settings
from tests.support.rank_pool import Pool, RankError

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def watch(*losses: float, bucket: str = "a", **train: Any) -> list[float | None]:
    spikes = LossSpikes(TrainConfig(steps=1, **train), ALONE, {})
    return [spikes.add(bucket, loss) for loss in losses]


def test_a_loss_far_above_the_last_ones_of_its_bucket_is_a_spike() -> None:
    noisy = [1.0 + 0.1 * (i % 5 - 2) for i in range(40)]
    assert watch(*noisy) == [None] * 40
    found = watch(*noisy, 9.0, 1.0, 2.0)
    assert found[40:] == [pytest.approx(8.0 / 0.14826), None, None]
    assert watch(*noisy, 2.0, spike_threshold=5.0)[-1] == pytest.approx(1.0 / 0.14826)
    # Losses that are all equal, or zero, divide by nothing.
    assert watch(*[0.0] * 30, 1.0)[-1] == pytest.approx(1e12)
    # Too few to tell; and what is not a number has its own treatment.
    assert watch(*noisy[: LEAST - 1], 9.0)[-1] is None
    assert watch(*noisy, float("nan"), float("inf"))[-2:] == [None, None]


def test_each_bucket_is_compared_with_itself_and_a_resumed_run_knows_its_losses() -> None:
    spikes = LossSpikes(TrainConfig(steps=1), ALONE, {"low": [1.0, 1.1] * 20, "high": [9.0, 9.1] * 20})
    assert spikes.add("high", 9.05) is None
    assert spikes.add("low", 9.05) == pytest.approx(8.0 / (1.4826 * 0.05))
    again = LossSpikes(TrainConfig(steps=1), ALONE, json.loads(json.dumps(spikes.recent)))
    assert again.recent == spikes.recent
    assert again.add("low", 9.05) is not None


def data_for(path: Path, action: str, steps: int = 26, **train: Any) -> dict[str, Any]:
    data = settings(path, train={"steps": steps, "zero_stage": 2, "on_spike": action, "checkpoint_every": 8, **train})
    data["data"]["buckets"] = [{"frames": 1, "height": 8, "width": 8, "global_batch": 8, "batch_size": 2}]
    return data


AT = 23


@pytest.mark.distributed
def test_warn_marks_a_spike_and_trains_on_it(pair: Pool, tmp_path: Path) -> None:
    found = pair(run_with_spike, data_for(tmp_path, "warn"), AT)[0]
    assert [m["step"] for m in found["metrics"] if "spike" in m] == [AT]
    assert f"step {AT}: loss " in found["said"]
    assert "is a spike, " in found["said"]
    assert found["changed"][AT]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_skip_leaves_the_weights_of_all_ranks_alone(pair: Pool, stage: int, tmp_path: Path) -> None:
    ranks = pair(run_with_spike, data_for(tmp_path, "skip", zero_stage=stage), AT)
    for found in ranks:
        assert [step for step, changed in found["changed"].items() if not changed] == [AT]
    (marked,) = (m for m in ranks[0]["metrics"] if "spike" in m)
    assert (marked["step"], marked["bad_steps"], "bad_samples" in marked) == (AT, 1, False)
    assert "no weights were updated" in ranks[0]["said"]


@pytest.mark.distributed
def test_rewind_goes_back_to_the_checkpoint_and_leaves_the_samples_out(pair: Pool, tmp_path: Path) -> None:
    found = pair(run_with_spike, data_for(tmp_path, "rewind"), AT)[0]
    first = (AT - 1) * 8
    (rewind,) = json.loads((tmp_path / "rewinds.json").read_text())["rewinds"]
    assert rewind.pop("loss") > 10
    assert rewind == {"step": AT, "bucket": "1x8x8", "position": first, "samples": 8}
    # Once more from step 16, and at step 23 the samples that come after those of the spike.
    assert [m["step"] for m in found["metrics"]] == list(range(1, 27))
    assert not any("spike" in m for m in found["metrics"])
    assert [m.get("rewinds") for m in found["metrics"]] == [None] * 16 + [1] * 10
    taken = found["positions"]
    assert [step for step, _ in taken] == [*range(1, AT + 1), *range(17, 27)]
    assert taken[16:22] == taken[AT : AT + 6]
    assert [first for _, first in taken[AT + 6 :]] == [first + 8 * n for n in range(1, 5)]
    position = checkpoint.read_identity(tmp_path)["data_position"]
    assert position == {"1x8x8": 27 * 8}
    assert f"step {AT}: back to the newest checkpoint" in found["said"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_checkpoint_on_its_way_is_the_one_that_a_rewind_goes_back_to(pair: Pool, tmp_path: Path) -> None:
    found = pair(run_with_spike_before_a_checkpoint_is_written, data_for(tmp_path, "rewind", steps=24), AT, 16)[0]
    assert [step for step, _ in found["positions"]] == [*range(1, AT + 1), *range(17, 25)]


@pytest.mark.distributed
def test_rewinds_are_counted(solo: Pool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"a spike, after 1 rewinds; train.max_rewinds is 1") as error:
        solo(run_with_spike, data_for(tmp_path, "rewind", max_rewinds=1), AT, 2)
    assert error.value.kind == "Diverged"
