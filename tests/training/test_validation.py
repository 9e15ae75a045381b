from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.training.distributed import Ranks
from stdit.training.validation import PADDING, shard_batches
from tests.support import sample_grid
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
def test_a_grid_is_told_the_size_that_it_draws(solo: Pool, tmp_path: Path) -> None:
    """Not that of the clips whose captions it has; and once for the batch, guidance included."""
    bucket = {"frames": 1, "height": 16, "width": 24}
    samples = {"every": 1, "count": 2, "bucket": bucket, "sampler": {"steps": 2, "guidance_channels": 1}}
    _, told = grid_of(solo, tmp_path, 0, model={"micro_conditions": ["height", "width"]}, samples=samples)
    assert told == [{"height": [16.0] * 4, "width": [24.0] * 4}]
