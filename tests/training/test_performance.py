from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import Bucket
from stdit.data.loader import Loader, Step
from stdit.models.cost import model_cost
from stdit.training import performance
from stdit.training.data import open_data
from stdit.training.distributed import Ranks
from stdit.training.performance import Performance
from tests.support.rank_jobs import config_of, run, settings
from tests.support.rank_pool import Pool


class Clock:
    """time.perf_counter that advances only when told to sleep."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(performance, "time", clock)
    return clock


def make(folder: Path, ranks: Ranks, **train: Any) -> tuple[Performance, Callable[[], Step]]:
    config = config_of(settings(folder, train={"steps": 10, "peak_tflops": 1e-3, **train}))
    data = open_data(config)
    loader = Loader(data.source, config.data, config.seed, ranks=ranks.size)
    steps = iter(loader)
    return Performance(config, ranks, data, 512), lambda: next(steps)


ONE = Ranks(0, 1, 0, torch.device("cpu"))


def test_rates_are_of_training_and_sections_are_means_of_a_step(tmp_path: Path, clock: Clock) -> None:
    measured, next_step = make(tmp_path, ONE)
    steps = [next_step() for _ in range(2)]
    for step in steps:
        with measured.section("forward"):
            clock.sleep(1.0)
        with measured.section("backward"):
            clock.sleep(2.0)
        measured.count(step)
    with measured.section("validation"):
        clock.sleep(10.0)
    found = measured.metrics(2, 12)
    samples = sum(step.samples for step in steps)
    config = measured.config
    flops = sum(
        step.samples
        * model_cost(config.model, (Bucket.parse(step.key).frames, 4, 4), measured.data.text_tokens).training_flops
        for step in steps
    )
    tokens = sum(step.samples * Bucket.parse(step.key).frames * 16 for step in steps)
    assert found["samples_per_second"] == pytest.approx(samples / 6, rel=1e-5)  # validation is no training
    assert found["tokens_per_second"] == pytest.approx(tokens / 6, rel=1e-5)
    assert found["tflops_per_second"] == pytest.approx(flops / 6 / 1e12, rel=1e-5)
    assert found["mfu"] == pytest.approx(flops / 6 / 1e9, rel=1e-5)
    assert found["epoch"] == pytest.approx(12 / 512, rel=1e-5)
    assert found["hours_left"] == pytest.approx(8 * 8 / 3600, rel=1e-5)  # 16 s for two steps, eight are left
    assert (found["seconds_forward"], found["seconds_backward"], found["seconds_validation"]) == (1.0, 2.0, 10.0)
    assert "seconds_checkpoint" not in found
    # The next call begins anew.
    clock.sleep(1.0)
    assert measured.metrics(2, 12)["samples_per_second"] == 0
    assert measured.summary() == (
        "time: 17.0 s: forward 2.0 s (12%), backward 4.0 s (24%), validation 10.0 s (59%), other 1.0 s (6%)"
    )


def test_waiting_for_data_is_a_section(tmp_path: Path, clock: Clock) -> None:
    measured, next_step = make(tmp_path, ONE)

    def slow() -> Any:
        for _ in range(3):
            clock.sleep(0.5)
            yield next_step()

    for step in measured.waiting(slow()):
        clock.sleep(1.0)
        measured.count(step)
    assert measured.metrics(3, 12)["seconds_data"] == 0.5


def test_a_rank_that_is_slower_than_the_others_is_named(tmp_path: Path, clock: Clock) -> None:
    factors = [1.2, 3.0]

    class Others(Ranks):
        def gather(self, value: Any) -> list[Any]:
            seconds, *tokens = value
            return [(seconds * factor, *tokens) for factor in (1, 1.1, factors.pop(0), 1)]

    ranks = Others(0, 4, 0, torch.device("cpu"))
    measured, next_step = make(tmp_path, ranks)
    for named in (False, True):
        with measured.section("forward"):
            clock.sleep(1.0)
        measured.count(next_step())
        found = measured.metrics(1, 8)
        assert ("slow_rank" in found) is named
    assert (found["slow_rank"], found["slow_rank_seconds"]) == (2, 3.0)


def test_peak_is_configured_or_measured(tmp_path: Path) -> None:
    assert make(tmp_path, ONE, peak_tflops=2.0)[0].peak_flops == 2e12
    assert make(tmp_path, ONE, peak_tflops=None)[0].peak_flops > 1e8
    assert performance.peak_memory(ONE.device) > 50 * 2**20


@pytest.mark.slow
def test_a_run_writes_a_trace_of_the_configured_steps_and_says_where_its_time_went(solo: Pool, tmp_path: Path) -> None:
    (result,) = solo(run, settings(tmp_path, train={"steps": 5, "profile": {"start": 3, "steps": 2}}))
    assert "time: " in result["said"]
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "step-00000003-rank-0.json.gz"
    with gzip.open(file) as trace:
        events = json.load(trace)["traceEvents"]
    labels = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert labels.count("forward") == 2
    assert labels.count("optimizer") == 2
    for entry in result["metrics"]:
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["mfu"] < 1.5
