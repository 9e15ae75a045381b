"""DeepSpeed under every stage and precision: one result."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.models.stdit import STDiT
from tests.support.rank_jobs import config_of, engine_steps, for_ranks, settings
from tests.support.rank_pool import Pool

pytestmark = pytest.mark.distributed

# Tiny models lie below ZeRO-3's threshold for parameters that are kept whole: here all are partitioned.
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def data_for(path: Path, stage: int, precision: str = "fp32", ranks: int = 2, accumulation: int = 1) -> dict[str, Any]:
    data = settings(path, train={"zero_stage": stage, "precision": precision, "gradient_accumulation": accumulation})
    data["data"]["buckets"] = for_ranks(ranks * accumulation)
    if stage == 3:
        data["train"]["deepspeed"] = PARTITION_ALL
    return data


@pytest.fixture(scope="module")
def reference(solo: Pool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, no ZeRO, float32."""
    return solo(engine_steps, data_for(tmp_path_factory.mktemp("run"), 0, ranks=1), 0)[0]


@pytest.fixture(scope="module")
def steps(pair: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], list[dict[str, Any]]]:
    """Two ranks at a stage and precision, spoiled on rank 1; each combination runs once."""
    return cache(
        lambda stage, precision: pair(engine_steps, data_for(tmp_path_factory.mktemp("run"), stage, precision), 1)
    )


Steps = Callable[[int, str], list[dict[str, Any]]]
COMBINATIONS = [(stage, precision) for stage in range(4) for precision in ("fp32", "bf16")]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_at_every_zero_stage_equal_one_rank(steps: Steps, reference: dict[str, Any], stage: int) -> None:
    found, other = steps(stage, "fp32")
    # Libraries' groups have no time-out of their own, which would come before the watchdog's.
    assert found["time_outs"] == reference["time_outs"] == {timedelta(minutes=60)}
    assert found["losses"] == pytest.approx(other["losses"], rel=0, abs=0, nan_ok=True)
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5, nan_ok=True)
    assert found["norms"][:3] == pytest.approx(reference["norms"][:3], rel=1e-4)
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("stage", "accumulation"), [(0, 2), (2, 4), (3, 2)])
def test_accumulated_micro_batches_equal_one_batch(
    pair: Pool, reference: dict[str, Any], stage: int, accumulation: int, tmp_path: Path
) -> None:
    found = pair(engine_steps, data_for(tmp_path, stage, accumulation=accumulation), 1)[0]
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5, nan_ok=True)
    assert found["norms"][:3] == pytest.approx(reference["norms"][:3], rel=1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_stays_near_float32_and_its_masters_begin_unrounded(
    steps: Steps, reference: dict[str, Any], stage: int
) -> None:
    found = steps(stage, "bf16")[0]
    assert found["live"] == "torch.bfloat16"
    assert found["start_error"] == 0.0
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-2, nan_ok=True)


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_weights_joined_from_the_partitions_are_those_that_deepspeed_gathers(
    steps: Steps, stage: int, precision: str
) -> None:
    found = steps(stage, precision)[0]
    assert found["assembled"].keys() == found["after"].keys()
    assert all(torch.equal(found["assembled"][name], weight) for name, weight in found["after"].items())


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_the_average_of_the_partitions_is_the_average_of_the_weights(steps: Steps, stage: int, precision: str) -> None:
    found = steps(stage, precision)[0]
    for name, expected in found["average"].items():
        torch.testing.assert_close(found["averaged"][name], expected, rtol=1e-5, atol=1e-6)
        # Swapped back to the last bit.
        assert torch.equal(found["after"][name], found["weights"][name])
    # The forward pass under the average is that of a model which has it as its weights.
    model = STDiT.from_settings(config_of(settings("run")).model).eval()
    for state, made in ((found["averaged"], found["made_by_average"]), (found["weights"], found["made"])):
        model.load_state_dict(state)
        x = torch.linspace(-1, 1, 128).reshape(1, 1, 2, 8, 8)
        whole = model(x, torch.tensor([500.0]), class_labels=torch.tensor([1])).sample
        torch.testing.assert_close(made, whole, rtol=0, atol=1e-5 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_a_nan_on_one_rank_changes_no_weight_on_any(steps: Steps, stage: int, precision: str) -> None:
    # Step 4: not-a-number gradients behind a finite loss; step 5: the loss itself.
    found = steps(stage, precision)
    for rank in found:
        assert [math.isfinite(n) for n in rank["norms"]] == [True, True, True, False, False]
        assert [math.isfinite(n) for n in rank["losses"]] == [True, True, True, True, False]
    assert found[0]["unchanged"] == [False, False, False, True, True]
