"""A run goes on at another ZeRO stage: with the same weights, average and optimizer, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.errors import CheckpointError
from stdit.models.stdit import STDiT
from stdit.training.universal import States
from tests.support.rank_jobs import config_of, for_ranks, restored, run, settings
from tests.support.rank_pool import Pool

pytestmark = pytest.mark.distributed

PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
MUON: dict[str, Any] = {"optimizer": {"name": "muon"}}


def data_for(path: Path, stage: int, ranks: int = 2, **train: Any) -> dict[str, Any]:
    extra = {"deepspeed": PARTITION_ALL} if stage == 3 else {}
    data = settings(path, train={"zero_stage": stage, **extra, **train})
    data["data"]["buckets"] = for_ranks(ranks)
    return data


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(
        found[part].keys() == expected[part].keys()
        and all(torch.equal(found[part][name], tensor) for name, tensor in expected[part].items())
        for part in expected
        if part in ("weights", "ema", "exp_avg", "exp_avg_sq") or part.startswith("sigma_rel")
    )


# Conversion starts a process, some three seconds; the others are alike.
FAST = [(0, 3, "fp32")]
ALL = [(a, b, p) for a in range(4) for b in range(4) for p in ("fp32", "bf16") if a != b]


@pytest.mark.parametrize(
    ("before", "after", "precision"), [*FAST, *(pytest.param(*c, marks=pytest.mark.slow) for c in ALL if c not in FAST)]
)
def test_every_stage_takes_the_states_of_every_other_one(
    pair: Pool, before: int, after: int, precision: str, tmp_path: Path
) -> None:
    pair(run, data_for(tmp_path, before, precision=precision), 3)
    expected = pair(restored, data_for(tmp_path, before, precision=precision))[0]
    found = pair(restored, data_for(tmp_path, after, precision=precision))[0]
    assert found["step"] == expected["step"] == 3
    assert found["steps"] == expected["steps"] == {3.0}
    assert expected["notes"] == []
    assert f"train.zero_stage: {before} -> {after}" in found["notes"]
    assert same(found, expected)


def test_a_new_run_begins_with_the_same_weights_at_every_stage(pair: Pool, tmp_path: Path) -> None:
    expected, *others = (pair(restored, data_for(tmp_path / str(stage), stage))[0] for stage in (0, 2, 3))
    for found in others:
        assert all(torch.equal(found[part][n], w) for part in ("weights", "ema") for n, w in expected[part].items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_odd_number_of_trained_parameters_trains_alike_at_every_stage(
    pair: Pool, solo: Pool, stage: int, precision: str, ranks: int, tmp_path: Path
) -> None:
    """DeepSpeed (stage_1_and_2.py) asserts that allgather_bucket_size, which was the number of parameters, is even."""

    def losses(zero: int) -> list[float]:
        data = data_for(tmp_path / str(zero), zero, ranks, precision=precision)
        data["model"] |= {"patch_size": [1, 1, 1]}
        data["train"]["steps"] = 2
        return [entry["loss"] for entry in (solo if ranks == 1 else pair)(run, data)[0]["metrics"]]

    model = STDiT(**config_of(settings(tmp_path, model={"patch_size": [1, 1, 1]})).model.model_dump())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) % 2 == 1
    assert losses(stage) == pytest.approx(losses(0), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 3), (0, 2)])
def test_and_with_another_number_of_ranks(pair: Pool, solo: Pool, before: int, after: int, tmp_path: Path) -> None:
    pair(run, data_for(tmp_path, before), 3)
    expected = pair(restored, data_for(tmp_path, before))[0]
    assert same(solo(restored, data_for(tmp_path, after, 1))[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after", "precision"), [(0, 3, "fp32"), (3, 2, "bf16"), (2, 1, "fp32"), (1, 0, "bf16")]
)
def test_profiles_of_the_ema_go_along(
    pair: Pool, solo: Pool, before: int, after: int, precision: str, tmp_path: Path
) -> None:
    train: dict[str, Any] = {"checkpoint_every": 1, "precision": precision}
    train["ema"] = {"profiles": {"sigma_rel": [0.05, 0.2], "every": 1}}
    pair(run, data_for(tmp_path, before, **train), 3)
    expected = pair(restored, data_for(tmp_path, before, **train))[0]
    assert not any(torch.equal(expected["sigma_rel-0.2"][name], ema) for name, ema in expected["ema"].items())
    assert same(pair(restored, data_for(tmp_path, after, **train))[0], expected)
    assert same(solo(restored, data_for(tmp_path, after, 1, **train))[0], expected)


@pytest.mark.parametrize(("before", "after"), [(0, 2), pytest.param(3, 0, marks=pytest.mark.slow)])
def test_muons_momentum_goes_along(pair: Pool, before: int, after: int, tmp_path: Path) -> None:
    pair(run, data_for(tmp_path, before, **MUON), 3)
    expected = pair(restored, data_for(tmp_path, before, **MUON))[0]
    assert same(pair(restored, data_for(tmp_path, after, **MUON))[0], expected)


@pytest.mark.slow
def test_adapters_go_along(pair: Pool, tmp_path: Path) -> None:
    base = {"init": {"source": str(tmp_path / "base")}}
    lora: dict[str, Any] = {"lora": {"rank": 4}}
    pair(run, data_for(tmp_path / "base", 1, steps=2))
    pair(run, {**data_for(tmp_path / "run", 2, **lora), **base}, 3)
    expected = pair(restored, {**data_for(tmp_path / "run", 2, **lora), **base})[0]
    for after in (0, 3):
        assert same(pair(restored, {**data_for(tmp_path / "run", after, **lora), **base})[0], expected)


@pytest.mark.slow
def test_a_run_through_all_stages_has_the_losses_of_one(pair: Pool, solo: Pool, tmp_path: Path) -> None:
    whole = pair(run, data_for(tmp_path / "whole", 0, steps=8))[0]["metrics"]
    for stage, until in ((0, 2), (3, 4), (1, 6)):
        pair(run, data_for(tmp_path / "run", stage, steps=8), until)
    found = solo(run, data_for(tmp_path / "run", 2, 1, steps=8))[0]
    assert [m["loss"] for m in found["metrics"]] == pytest.approx([m["loss"] for m in whole], rel=1e-5)
    assert [m["samples_seen"] for m in found["metrics"]] == [m["samples_seen"] for m in whole]
    assert "train.zero_stage: 1 -> 2" in found["said"]
    assert not list((tmp_path / "run").glob("checkpoints/.universal"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_states_offloaded_to_the_cpu_train_and_resume_alike(
    pair: Pool, precision: str, tmp_path: Path
) -> None:
    cpu = {"device": "cpu"}
    zero = {**PARTITION_ALL["zero_optimization"], "offload_param": cpu, "offload_optimizer": cpu}
    offloaded: dict[str, Any] = {"precision": precision, "deepspeed": {"zero_optimization": zero}}
    whole = pair(run, data_for(tmp_path / "whole", 3, precision=precision))[0]["metrics"]
    pair(run, data_for(tmp_path / "run", 3, **offloaded), 3)
    found = pair(run, data_for(tmp_path / "run", 3, **offloaded))[0]["metrics"]
    assert [m["loss"] for m in found] == [m["loss"] for m in whole]


def test_a_weight_without_its_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "zero/a").mkdir(parents=True)
    torch.save(torch.zeros(3), tmp_path / "zero/a/fp32.pt")
    with pytest.raises(CheckpointError, match="holds no exp_avg of a"):
        States(tmp_path, ["a"], 1.0)["a"]
