from __future__ import annotations

import errno
import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from stdit import metrics_log
from stdit.config import ConfigError
from stdit.training.performance import Performance
from stdit.training.tracking import Tracker, check_trackers
from tests.support.rank_jobs import config_of, metrics, settings


class Measured(Performance):
    """A performance of known values."""

    def __init__(self) -> None:
        pass

    def metrics(self, step: int, samples_seen: int) -> dict[str, float]:
        return {"mfu": 0.5, "slow_rank": 1.0, "slow_rank_seconds": 2.0}


def test_a_logged_step_has_its_performance_and_names_a_slow_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(config_of(settings(tmp_path, train={"log_every": 2})), 0, True)
    logged = [tracker.step({"step": step, "loss": 1.0, "samples_seen": 8}, Measured()) for step in (1, 2)]
    tracker.close()
    assert logged == [False, True]
    assert [line["mfu"] for line in metrics(tmp_path)] == [0.5]
    assert "step 2: rank 1 is slow: 2 s a step for data and forward" in capsys.readouterr().err


def test_a_tracker_writes_valid_json_pictures_and_tensorboard(tmp_path: Path) -> None:
    config = config_of(settings(tmp_path, train={"tensorboard": True}))
    tracker = Tracker(config, 0, True)
    tracker.log({"step": 1, "loss": math.nan, "bucket": "1x8x8"})
    tracker.log({"step": 2, "loss": 0.5})
    tracker.image("samples", Image.new("RGB", (4, 4)), 2)
    tracker.close()
    assert metrics(tmp_path) == [{"step": 1, "loss": None, "bucket": "1x8x8"}, {"step": 2, "loss": 0.5}]
    assert Image.open(tmp_path / "samples/step-00000002.png").size == (4, 4)
    assert list((tmp_path / "tensorboard").glob("events*"))
    # Another one, later, goes on in the same file.
    again = Tracker(config, 1, True)
    again.log({"step": 2, "loss": 0.25})
    again.close()
    assert [json.loads(line)["loss"] for line in (tmp_path / metrics_log.FILE).read_text().splitlines()] == [None, 0.25]


def test_a_full_disk_costs_no_step_and_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Tracker(config_of(settings(tmp_path)), 0, True)
    assert tracker._log is not None
    with open("/dev/full", "wb", buffering=0) as full:
        disk, tracker._log._file = tracker._log._file, full
        for step in (1, 2):
            tracker.step({"step": step, "loss": 1.0, "samples_seen": 8}, Measured())
    (tmp_path / "samples").write_text("no folder")
    tracker.image("samples", Image.new("RGB", (4, 4)), 2)
    tracker._log._file = disk
    tracker.step({"step": 3, "loss": 1.0, "samples_seen": 8}, Measured())
    tracker.close()
    said = capsys.readouterr().err
    assert said.count("training goes on, and says so once") == 2
    assert said.count(f"{tmp_path / metrics_log.FILE}: ") == 1
    assert "No space left on device" in said
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3]


class Gone(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    def flush(self) -> None:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_is_gone_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", Gone())
        tracker = Tracker(config_of(settings(tmp_path)), 0, True)
        tracker.print("x")
        tracker.step({"step": 1, "loss": 1.0, "samples_seen": 8}, Measured())
        tracker.close()
    assert [entry["step"] for entry in metrics(tmp_path)] == [1]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(config_of(settings(tmp_path)), 0, False)
    tracker.log({"step": 1})
    tracker.image("samples", Image.new("RGB", (4, 4)), 1)
    tracker.step({"step": 1, "loss": 1.0, "samples_seen": 8}, Measured())
    tracker.print("x")
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_wandb_is_reported_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.wandb_project: 'p', but wandb is not installed"):
        check_trackers(config_of(settings(tmp_path, train={"wandb_project": "p"})))
