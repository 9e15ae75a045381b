"""`stdit plan-compute`: its ladder spends what it says, goes on where it stopped, and its proposal is a config that
trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stdit import metrics_log
from stdit.config import Config, load_config
from stdit.models.cost import parameter_count
from stdit.plan_compute import Rung, arguments, main, plan
from stdit.training.scaling_law import ScalingLaw
from tests.support.paths import ROOT

SIZE = "model={hidden_size: 96, depth: 4, num_heads: 6, num_classes: 10, text_dim: null}"
LAW = ScalingLaw(irreducible=0.3, model=0.2, alpha=0.4, data=0.2, beta=0.3, scale=(3e5, 1e6))


def options(out: Path, *sets: str, budget: str = "1e15") -> list[str]:
    given = ["--config", str(ROOT / "configs/debug.yaml"), "--budget", budget, "--out", str(out)]
    for text in ("train.steps=400", SIZE, *sets):
        given += ["--set", text]
    return given


def pretend(rung: Rung, processes: int) -> int:
    """A run whose loss is the law's."""
    run = rung.config.run_dir
    run.mkdir()
    loss = LAW.loss(rung.parameters, rung.flops)
    row = {"step": rung.config.train.steps, "loss": 1.0, "validation_loss": loss}
    (run / metrics_log.FILE).write_text(json.dumps(row) + "\n")
    (run / "done.json").write_text("{}")
    return 0


@pytest.fixture(autouse=True)
def _pretended(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of `pretend` are finished when it says so."""
    if "slow" not in request.keywords:
        finished = "stdit.training.resume.is_finished"
        monkeypatch.setattr(finished, lambda config, *_: (config.run_dir / "done.json").is_file())


def test_a_ladder_proposes_the_size_and_steps_of_least_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs: list[Rung] = []

    def run(rung: Rung, processes: int) -> int:
        runs.append(rung)
        return pretend(rung, processes)

    sets = "data.buckets=[{frames: 1, height: 16, width: 16, batch_size: 6}]"
    out = tmp_path / "a, b: [c]"
    assert plan(arguments().parse_args(options(out, sets)), run) == 0
    tmp_path = out
    assert [rung.config.model.dimensions[0] for rung in runs[:3]] == [96, 64, 48]
    assert [rung.config.model.dimensions[1] for rung in runs[:3]] == [4, 3, 2]
    own = runs[0].flops
    for number, rung in enumerate(runs):
        share = (1.0, 0.5, 0.25)[number // 3]
        assert rung.flops == pytest.approx(share * own, rel=0.02)
        assert rung.config.validation.every == rung.config.train.steps
    found = json.loads((tmp_path / "ladder.json").read_text())
    assert found["largest_run"]["predicted"] == pytest.approx(found["largest_run"]["measured"], rel=1e-2)
    config = load_config(tmp_path / "proposal.yaml", Config, [])
    best = LAW.best_parameters(1e15)
    assert parameter_count(config.model) == pytest.approx(best, rel=0.35)  # widths are multiples of a head's
    assert config.model.dimensions[0] % 16 == 0
    assert config.data.buckets[0].batch_size == 6, "the ladder's own settings"
    assert found["parameters_interval"][0] <= found["parameters_interval"][1]
    assert (tmp_path / "ladder.png").stat().st_size > 5000
    assert "80 %" in capsys.readouterr().out


def test_runs_that_are_done_are_kept_and_a_stopped_one_stops_the_ladder(tmp_path: Path) -> None:
    calls = 0

    def run(rung: Rung, processes: int) -> int:
        nonlocal calls
        calls += 1
        return 75 if calls == 4 else pretend(rung, processes)

    assert plan(arguments().parse_args(options(tmp_path)), run) == 75
    assert not (tmp_path / "ladder.json").exists()
    assert plan(arguments().parse_args(options(tmp_path)), run) == 0
    assert calls == 4 + 6


@pytest.mark.parametrize(
    ("sets", "budget", "message"),
    [
        (
            ("model={hidden_size: 32, depth: 2, num_heads: 2}",),
            "1e15",
            "hidden_size 32 of heads 16 wide has no two smaller",
        ),
        (("train.steps=20",), "1e15", "train.steps 20: a run of .* of its FLOPs has"),
        (("init.source=runs/other",), "1e15", "a ladder begins with new weights"),
        (("train.lora={rank: 4}", "init.source=runs/other"), "1e15", "a ladder trains whole models"),
        (("data.validation_split=test",), "1e15", "synthetic data has no split 'test'"),
        ((), "-1", "--budget -1"),
        ((), "inf", "--budget inf"),
    ],
)
def test_what_no_ladder_can_be_made_of_is_refused_before_any_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], sets: tuple[str, ...], budget: str, message: str
) -> None:
    import re

    assert main(options(tmp_path / "ladder", *sets, budget=budget)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "ladder").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_real_ladder_predicts_its_largest_run(tmp_path: Path) -> None:
    small = ("train.steps=48", "train.optimizer.learning_rate=3e-3", "train.ema.decay=0.9")
    code = main(options(tmp_path, *small))  # 2: in so few steps the smallest model may be the best, at any budget
    found = json.loads((tmp_path / "ladder.json").read_text())["largest_run"]
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.2)
    assert main(options(tmp_path, *small)) == code, "nothing is trained again"
    assert main(options(tmp_path, *small, "train.optimizer.betas=[0.9, 0.99]")) == 2, "runs of other settings"
