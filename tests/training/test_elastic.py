"""global_batch: the samples of a step belong to the run, so that any number of ranks that divides them goes on with
it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st
from safetensors.torch import load_file

from stdit.config import Config, ConfigError, TrainBucket, validate
from stdit.training import checkpoint
from tests.support.rank_jobs import config_of, run_recorded, settings
from tests.support.rank_pool import Pool, RankError

# One epoch of 256 clips and 256 images: four steps of the one, two of the other. On one rank 5 micro-batches of 12 or
# 13 and 1 of 128; on two 3 of 10 or 11 and 1 of 64.
EPOCH = 6
BUCKETS = [
    {"frames": 2, "height": 8, "width": 8, "global_batch": 64, "batch_size": 15},
    {"frames": 1, "height": 8, "width": 8, "global_batch": 128},
]
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def elastic(path: Path, stage: int, steps: int = EPOCH, **train: Any) -> dict[str, Any]:
    extra = {"deepspeed": PARTITION_ALL} if stage == 3 else {}
    data = settings(path, train={"zero_stage": stage, "steps": steps, **extra, **train})
    data["data"]["buckets"] = BUCKETS
    return data


def samples(runs: list[list[dict[str, Any]]], sequence_parallel: int = 1) -> dict[tuple[int, str, int], Any]:
    """What was trained on by (step, position in the bucket's stream): id, timestep and noise; each once."""
    seen = [entry for run in runs for rank in run[::sequence_parallel] for entry in rank["samples"]]
    by_place = {entry[:3]: entry[3:] for entry in seen}
    assert len(by_place) == len(seen)
    return by_place


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run_dir / "checkpoints" / checkpoint.folder_of_step(step)
    return {
        f"{kind}.{name}": tensor
        for kind in ("transformer", "transformer_ema")
        for name, tensor in load_file(folder / kind / "diffusion_pytorch_model.safetensors").items()
    }


def check_as_if_nothing_had_happened(
    whole: list[dict[str, Any]], parts: list[list[dict[str, Any]]], folders: tuple[Path, Path], steps: int
) -> None:
    """The same samples with the same noise and timesteps; each of the epoch once; losses and weights up to rounding."""
    seen = samples(parts)
    assert seen == samples([whole])
    ids = Counter((bucket, entry[0]) for (_, bucket, position), entry in seen.items() if position < 256)
    assert set(ids.values()) == {1}
    assert len(ids) == 512
    losses = [m["loss"] for m in parts[-1][0]["metrics"]]
    assert losses == pytest.approx([m["loss"] for m in whole[0]["metrics"]], rel=1e-5)
    assert [m["samples_seen"] for m in parts[-1][0]["metrics"]] == [m["samples_seen"] for m in whole[0]["metrics"]]
    expected, found = (weights(folder, steps) for folder in folders)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_two_ranks_then_one_then_two_train_as_one_rank_does(pair: Pool, solo: Pool, stage: int, tmp_path: Path) -> None:
    whole = solo(run_recorded, elastic(tmp_path / "whole", stage))
    data = elastic(tmp_path / "parts", stage)
    parts = [pair(run_recorded, data, 2), solo(run_recorded, data, 4), pair(run_recorded, data)]
    check_as_if_nothing_had_happened(whole, parts, (tmp_path / "whole", tmp_path / "parts"), EPOCH)
    assert "ranks: 1 -> 2; the global batch is the same" in parts[-1][0]["said"]


@pytest.fixture(scope="module")
def quartet() -> Iterator[Pool]:
    """Four ranks."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_two_four_and_one_ranks_train_as_one_rank_does(
    quartet: Pool, pair: Pool, solo: Pool, stage: int, tmp_path: Path
) -> None:
    steps = 8
    whole = solo(run_recorded, elastic(tmp_path / "whole", stage, steps))
    data = elastic(tmp_path / "parts", stage, steps)
    parts = [solo(run_recorded, data, 2), pair(run_recorded, data, 4)]
    parts += [quartet(run_recorded, data, 6), solo(run_recorded, data)]
    check_as_if_nothing_had_happened(whole, parts, (tmp_path / "whole", tmp_path / "parts"), steps)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_resume_may_share_the_tokens_of_clips_instead(pair: Pool, solo: Pool, tmp_path: Path) -> None:
    whole = solo(run_recorded, elastic(tmp_path / "whole", 1))
    data = elastic(tmp_path / "parts", 1)
    shared = elastic(tmp_path / "parts", 1, sequence_parallel=2)
    parts = [solo(run_recorded, data, 2), pair(run_recorded, shared, 4)[:1], pair(run_recorded, data)]
    check_as_if_nothing_had_happened(whole, parts, (tmp_path / "whole", tmp_path / "parts"), EPOCH)


@quick(deadline=None)
@given(ranks=st.integers(1, 12), size=st.integers(1, 9) | st.none(), batch=st.integers(1, 96))
def test_a_step_is_shared_out_evenly_or_refused_with_what_works(ranks: int, size: int | None, batch: int) -> None:
    def bucket(samples: int) -> TrainBucket:
        return TrainBucket(frames=1, height=8, width=8, batch_size=size, global_batch=samples)

    try:
        micro = bucket(batch).micro_batches(ranks, 1)
    except ConfigError as error:
        assert batch < ranks or size == 1
        found = re.search(r"it goes with (.*) ranks, and they with a global_batch of (.*)$", str(error))
        assert found is not None
        for text in re.split(", | to ", found[1]):
            bucket(batch).micro_batches(int(text), 1)
        for text in found[2].split(" or "):
            bucket(int(text)).micro_batches(ranks, 1)
        return
    shares = ranks * micro.accumulation
    assert micro.samples == batch
    assert 1 <= batch // shares <= micro.size == -(-batch // shares) <= (size or batch)
    # One micro-batch fewer would have more samples than may be.
    assert micro.accumulation == 1 or -(-batch // (shares - ranks)) > (size or batch)


def test_impossible_sizes_are_refused_by_name(tmp_path: Path) -> None:
    data = elastic(tmp_path, 1)
    data["data"]["buckets"] = [{"frames": 1, "height": 8, "width": 8, "global_batch": 6, "batch_size": 1}]
    with pytest.raises(
        ConfigError,
        match=r"1x8x8: global_batch is 6, .* for 4 .* \(batch_size\); it goes with 1 to 3, 6 ranks, and they with a global_batch of 4 or 8",
    ):
        config_of(data).micro_batches(4)
    data["train"]["gradient_accumulation"] = 2
    with pytest.raises(
        ConfigError, match=r"train.gradient_accumulation is 2, which follows from the ranks where a global_batch \(6\)"
    ):
        config_of(data)
    with pytest.raises(ConfigError, match=r"bucket 1x8x8 states neither batch_size nor global_batch"):
        validate(
            elastic(tmp_path, 1)
            | {"data": {"features": "synthetic", "buckets": [{"frames": 1, "height": 8, "width": 8}]}},
            Config,
            "test",
        )


@pytest.mark.distributed
def test_the_ranks_there_are_decide_before_anything_is_written(pair: Pool, tmp_path: Path) -> None:
    data = elastic(tmp_path / "run", 1)
    data["data"]["buckets"] = [{"frames": 1, "height": 8, "width": 8, "global_batch": 1}]
    with pytest.raises(
        RankError, match="global_batch is 1, too few or not divisible for 2 data-parallel ranks"
    ) as error:
        pair(run_recorded, data)
    assert error.value.kind == "ConfigError"
    assert not (tmp_path / "run").exists()


@pytest.mark.timeout(20)
def test_an_impossible_division_of_billions_is_refused_at_once() -> None:
    bucket = TrainBucket(frames=1, height=8, width=8, global_batch=2_000_000_001, batch_size=1)
    with pytest.raises(
        ConfigError, match=r"goes with 1, 3 ranks, and they with a global_batch of 2000000000 or 2000000002"
    ):
        bucket.micro_batches(2, 1)
