from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.config import Config, validate
from stdit.training.distributed import Ranks
from stdit.training.validation import PADDING, Validator, shard_batches
from tests.support import rank_jobs, sample_grid
from tests.support.rank_jobs import settings as run_settings
from tests.support.rank_pool import Pool


@settings(deadline=None, max_examples=60)
@given(count=st.integers(0, 30), size=st.integers(1, 5), batch_size=st.integers(1, 6))
def test_ranks_share_samples_in_order_and_are_equally_busy(count: int, size: int, batch_size: int) -> None:
    parts = [shard_batches(count, Ranks(r, size, r, torch.device("cpu")), batch_size) for r in range(size)]
    # As many forward passes, of the same sizes, on every rank.
    assert len({tuple(len(batch) for batch in part) for part in parts}) == 1
    together = [n for batches in zip(*parts, strict=True) for batch in batches for n in batch]
    assert [n for n in together if n != PADDING] == list(range(count))
    # Fillers come last, fewer than there are ranks.
    assert together[count:] == [PADDING] * (len(together) - count)
    assert len(together) - count < size


def test_a_grid_of_fewer_samples_than_were_asked_for_is_remarked_on_once(tmp_path: Path) -> None:
    class Held:
        def select(self, split: str, buckets: Any, where: Any = ()) -> dict[str, np.ndarray]:
            return {bucket.key: np.arange(3) for bucket in buckets}

    class Tracker:
        said: list[str] = []  # noqa: RUF012

        def print(self, line: str) -> None:
            self.said.append(line)

    data = run_settings(tmp_path, samples={"every": 1, "count": 3})
    for count, said in ((3, []), (9, ["samples.count 9: 6 are drawn, one for each clip of split 'validation'"])):
        data["samples"]["count"] = count
        data["data"]["buckets"] = [{"frames": n, "height": 8, "width": 8, "batch_size": 2} for n in (1, 2)]
        config, tracker = validate(data, Config, "test"), Tracker()
        ranks = Ranks(0, 1, 0, torch.device("cpu"))
        validator = Validator(config, cast(Any, SimpleNamespace(source=Held())), cast(Any, None), ranks)
        for _ in range(2):
            validator._remark_count(cast(Any, tracker))
        assert tracker.said == said


def grid_of(pool: Pool, path: Path, stage: int, **changes: Any) -> tuple[np.ndarray, list[dict[str, Any]]]:
    wanted = {"every": 1, "count": 4, "sampler": {"steps": 4, "guidance_scale": 3.0}}
    data = run_settings(path, **{"samples": wanted, "train": {"zero_stage": stage}, **changes})
    if stage == 3:  # tiny parameters, too, are partitioned
        data["train"]["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    data["data"]["buckets"] = [{"frames": 2, "height": 8, "width": 8, "batch_size": 4 // pool.size}]
    picture, prepared = pool(sample_grid.grid, data)[0]
    assert picture is not None
    return picture.astype(int), prepared


@pytest.mark.distributed
def test_every_zero_stage_draws_the_same_grid(solo: Pool, pair: Pool, tmp_path: Path) -> None:
    """Up to ZeRO-2 a rank holds all weights and prepares conditions ahead; under ZeRO-3 it can't, and does without."""
    expected, prepared = grid_of(solo, tmp_path, 0)
    assert len(prepared) == 1
    assert expected.std() > 20
    for stage, times in ((2, 1), (3, 0)):
        found, prepared = grid_of(pair, tmp_path, stage)
        assert len(prepared) == times
        assert abs(found - expected).max() <= 1


@pytest.mark.distributed
def test_a_sample_grid_receives_its_own_size(solo: Pool, tmp_path: Path) -> None:
    """Not that of the clips whose captions it has; and once for the batch, guidance included."""
    bucket = {"frames": 1, "height": 16, "width": 24}
    samples = {"every": 1, "count": 2, "bucket": bucket, "sampler": {"steps": 2, "guidance_channels": 1}}
    _, told = grid_of(solo, tmp_path, 0, model={"micro_conditions": ["height", "width"]}, samples=samples)
    assert told == [{"height": [16.0] * 4, "width": [24.0] * 4}]


VALIDATION = {"every": 3, "samples": 12, "times": [0.2, 0.8], "raw": True}


def validated(pool: Pool, path: Path, **train: Any) -> dict[str, Any]:
    data = run_settings(path, validation=VALIDATION, train={"checkpoint_every": 3, "steps": 6, **train})
    data["data"]["buckets"] = rank_jobs.for_ranks(pool.size)
    return pool(rank_jobs.run, data)[0]


@pytest.mark.distributed
def test_validation_losses_are_told_by_time_and_bucket_and_of_both_weights(solo: Pool, tmp_path: Path) -> None:
    entry = validated(solo, tmp_path)["metrics"][-1]
    for prefix in ("", "raw_"):
        mean = entry[f"{prefix}validation_loss"]
        assert mean == pytest.approx(sum(entry[f"{prefix}validation_loss/t={t}"] for t in (0.2, 0.8)) / 2, rel=1e-5)
        # Six clips of each bucket.
        each = [entry[f"{prefix}validation_loss/{key}"] for key in ("2x8x8", "1x8x8")]
        assert mean == pytest.approx(sum(each) / 2, rel=1e-5)
        assert each[0] != each[1]
    assert entry["validation_loss"] != entry["raw_validation_loss"]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_training_and_inference_agree_at_every_checkpoint_on_any_number_of_ranks(
    solo: Pool, pair: Pool, tmp_path: Path, stage: int
) -> None:
    runs = [validated(pool, tmp_path / str(pool.size), zero_stage=stage) for pool in (solo, pair)]
    for run in runs:
        gaps = {e["step"]: e["inference_gap"] for e in run["metrics"] if "inference_gap" in e}
        assert set(gaps) == {3, 6}
        assert all(gap < 1e-5 for gap in gaps.values())
        assert "disagree" not in run["said"]
    one, two = (run["metrics"][-1] for run in runs)
    assert one["validation_loss/2x8x8"] == pytest.approx(two["validation_loss/2x8x8"], rel=1e-4)


@pytest.mark.distributed
def test_a_run_whose_sampler_computes_something_else_says_so(solo: Pool, tmp_path: Path) -> None:
    data = run_settings(tmp_path, train={"checkpoint_every": 3, "steps": 3})
    result = solo(rank_jobs.run_with_another_sampler, data)[0]
    assert "step 3: training and inference disagree: the loss of a fixed batch is" in result["said"]
    assert result["metrics"][-1]["inference_gap"] > 1e-3
    silent = data | {"run_dir": str(tmp_path / "off"), "validation": {"inference_check": False}}
    assert "inference_gap" not in solo(rank_jobs.run_with_another_sampler, silent)[0]["metrics"][-1]
