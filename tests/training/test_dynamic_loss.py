"""Training for less compute: the loss, its config, and runs of dynamic models."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from stdit.config import Config, ConfigError, DynamicConfig, merge, validate
from stdit.models.dynamic import ComputeStats
from stdit.training.dynamic_loss import flops_loss, flops_target
from stdit.training.inputs import Inputs
from tests.support.paths import ROOT
from tests.support.rank_jobs import config_of, for_ranks, numbers, run, run_stopping_on_rank_1, settings
from tests.support.rank_pool import Pool

CPU = torch.device("cpu")
DYNAMIC: dict[str, Any] = {
    "model": {"dynamic_width": True, "dynamic_tokens": True, "drop_path": 0.1, "exit_depths": [[0.8, 1]]},
    "train": {"dynamic": {"target_flops_ratio": 0.5, "full_model_prob": 0.3}},
}
NONE = torch.zeros(2, dtype=torch.bool)


def used(compute: list[float], tokens: list[list[float]]) -> ComputeStats:
    return ComputeStats(torch.tensor(compute, requires_grad=True), torch.tensor(tokens, requires_grad=True))


def test_the_loss_is_the_square_of_what_the_mean_misses() -> None:
    config = DynamicConfig(target_flops_ratio=0.5, weight=3.0)
    loss, share = flops_loss(config, used([0.6, 0.8], [[1.0, 1.0]]), NONE, 1)
    assert share.item() == pytest.approx(0.7)
    assert loss.item() == pytest.approx(3 * 0.2**2)


def test_too_few_tokens_in_a_block_cost_as_many_as_are_missing() -> None:
    config = DynamicConfig(target_flops_ratio=1.0, weight=2.0, min_token_ratio=0.2, min_token_weight=5.0)
    loss, _ = flops_loss(config, used([1.0, 1.0], [[0.0, 0.1], [0.3, 0.9], [0.2, 0.0]]), NONE, 1)
    assert loss.item() == pytest.approx(2 * 5 * (0.15 + 0.1))


def test_complete_samples_do_not_count() -> None:
    config, complete = DynamicConfig(target_flops_ratio=0.5, min_token_ratio=0.0), torch.tensor([True, False])
    loss, share = flops_loss(config, used([1.0, 0.4], [[1.0, 0.3]]), complete, 1)
    assert share.item() == pytest.approx(0.4)
    assert loss.item() == pytest.approx(0.01)
    loss, share = flops_loss(config, used([1.0, 1.0], [[1.0, 1.0]]), ~NONE, 1)
    assert (loss.item(), share.item()) == (0, 0)
    loss.backward()  # every rank has a gradient, zeros here


def test_the_target_falls_from_one() -> None:
    config = DynamicConfig(target_flops_ratio=0.4, warmup_steps=4)
    assert [round(flops_target(config, step), 6) for step in (1, 2, 4, 9)] == [0.85, 0.7, 0.4, 0.4]
    assert flops_target(DynamicConfig(target_flops_ratio=0.4), 1) == 0.4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"train": {"dynamic": {"target_flops_ratio": 0.0}}},
            r"train.dynamic.target_flops_ratio.*greater than 0.*found 0",
        ),
        (
            {"train": {"dynamic": {"target_flops_ratio": 1.2}}},
            r"train.dynamic.target_flops_ratio.*less than or equal to 1.*found 1.2",
        ),
        ({"train": {"dynamic": {"target_flops_ratio": 0.5, "weight": -1.0}}}, r"weight.*found -1"),
        ({"train": {"dynamic": {"target_flops_ratio": 0.5, "full_model_prob": 2.0}}}, r"full_model_prob.*found 2"),
        ({"train": {"dynamic": {"tarjet": 0.5}}}, r"train.dynamic.tarjet: unknown key"),
        (
            {"model": {"dynamic_width": False, "dynamic_tokens": False}},
            "target_flops_ratio 0.5, but the model is static",
        ),
        ({"train": {"lora": {"rank": 2}}, "init": {"source": "x"}}, "train.lora and train.dynamic"),
        ({"train": {"control": {}}, "init": {"source": "x"}}, "train.control and train.dynamic"),
    ],
)
def test_wrong_settings_are_refused_with_the_value(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        validate(merge(merge(settings("runs/x"), DYNAMIC), changes), Config, "test")


def test_exits_go_by_a_thousand_steps() -> None:
    exits = {"model": {"exit_depths": [[0.8, 1]]}, "diffusion": {"objective": "ddpm"}}
    fine = merge(settings("runs/x"), exits)
    validate(fine, Config, "test")
    validate(merge(fine, {"diffusion": {"objective": "flow", "num_train_timesteps": 100}}), Config, "test")
    with pytest.raises(
        ConfigError, match=r"exit_depths goes by times on 0 to 1000, .*num_train_timesteps is 100: make"
    ):
        validate(merge(fine, {"diffusion": {"num_train_timesteps": 100}}), Config, "test")


def test_a_target_of_its_own_is_no_config() -> None:
    with pytest.raises(ValidationError):
        DynamicConfig(target_flops_ratio=float("nan"))


def test_choices_are_each_samples_own() -> None:
    def choices(data: dict[str, Any], step: int, positions: tuple[int, ...]) -> dict[str, Any]:
        config = config_of(merge(settings("runs/x"), data))
        statistics = {"shift": [0.0], "scale": [1.0]}
        return Inputs(config, statistics, CPU).router_inputs(step, positions)

    assert choices({}, 1, (0, 1)) == {}
    assert set(choices({"model": {"drop_path": 0.1}}, 1, (0,))) == {"generator"}
    whole, later = choices(DYNAMIC, 3, tuple(range(40))), choices(DYNAMIC, 4, tuple(range(40)))
    halves = [choices(DYNAMIC, 3, tuple(range(20))), choices(DYNAMIC, 3, tuple(range(20, 40)))]
    assert torch.equal(whole["force_full"], torch.cat([half["force_full"] for half in halves]))
    assert 2 <= int(whole["force_full"].sum()) <= 22
    drawn, again, other = (
        [torch.rand(1, generator=g).item() for g in generators]
        for generators in (
            whole["generator"], halves[0]["generator"] + halves[1]["generator"], later["generator"],
        )
    )  # fmt: skip
    assert drawn == again
    assert set(drawn).isdisjoint(other)


# ----------------------------------------------------------------------------------------------------- runs


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_dynamic_run_resumes_bitwise(pair: Pool, tmp_path: Path, stage: int) -> None:
    more = {"train": {"zero_stage": stage, "activation_checkpointing": True}, "validation": {"every": 3, "samples": 4}}

    def data(name: str) -> dict[str, Any]:
        made = merge(settings(tmp_path / name), merge(DYNAMIC, more))
        made["data"]["buckets"] = for_ranks(2)
        return made

    whole = pair(run, data("whole"))[0]["metrics"]
    assert all(0.2 < line["flops_ratio"] <= 1 for line in whole)
    pair(run_stopping_on_rank_1, data("broken"), 3)
    assert numbers(pair(run, data("broken"))[0]["metrics"]) == numbers(whole)


@pytest.mark.distributed
def test_drop_path_resumes_bitwise(solo: Pool, tmp_path: Path) -> None:
    changes = {"model": {"drop_path": 0.5}}
    whole = solo(run, merge(settings(tmp_path / "whole"), changes))[0]["metrics"]
    assert "flops_ratio" not in whole[0]
    solo(run, merge(settings(tmp_path / "broken"), changes), 3)
    assert numbers(solo(run, merge(settings(tmp_path / "broken"), changes))[0]["metrics"]) == numbers(whole)


@pytest.mark.distributed
def test_a_static_run_goes_on_dynamic_and_learns_its_target(solo: Pool, tmp_path: Path) -> None:
    static = settings(tmp_path / "static", train={"steps": 2})
    solo(run, static)
    changes = {
        "model": {"dynamic_width": True, "dynamic_tokens": True},
        "train": {
            "dynamic": {"target_flops_ratio": 0.6, "weight": 50.0},
            "steps": 40,
            "optimizer": {"learning_rate": 3e-2, "warmup_steps": 0},
        },
        "init": {"source": str(tmp_path / "static"), "allow": ["add_dynamic"]},
        "validation": {"every": 40, "samples": 4},
    }
    seen = solo(run, merge(settings(tmp_path / "dynamic"), changes))[0]
    assert "newly initialised: blocks.*.dynamic.heads.weight" in seen["said"]
    shares = [line["flops_ratio"] for line in seen["metrics"]]
    assert shares[0] > 0.95
    assert sum(shares[-10:]) / 10 == pytest.approx(0.6, abs=0.1)
    assert seen["metrics"][-1]["validation_loss"] < 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = ROOT / "benchmarks" / "dynamic.py"
    monkeypatch.setattr("sys.argv", [str(script), "--quick", "--threads", "1", "--out", str(tmp_path)])
    runpy.run_path(str(script), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 10
