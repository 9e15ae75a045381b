from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stdit.config import ConfigError, merge
from stdit.config.diff import flatten
from stdit.training import run_dir, saving
from stdit.training.distributed import Ranks
from stdit.training.resume import check_resumable
from tests.support.rank_jobs import config_of, settings


def identity(data: dict[str, Any], world_size: int = 2) -> dict[str, Any]:
    return {"config": config_of(data).model_dump(mode="json"), "world_size": world_size, "features": "f", "step": 7}


def changed(change: dict[str, Any], world_size: int = 2) -> list[str]:
    old = settings("runs/x")
    return check_resumable(identity(old), config_of(merge(old, change)), world_size, "f")


def test_the_same_settings_resume_without_a_word() -> None:
    assert changed({}) == []


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"}, {"run_dir": "elsewhere"}, {"train": {"steps": 9}}, {"train": {"log_every": 5}},
        {"validation": {"every": 2}}, {"samples": {"every": 2}}, {"data": {"workers": 3}}, {"train": {"compile": True}},
        {"train": {"matmul_precision": "high"}}, {"train": {"deepspeed": {"log_level": "info"}}}, {"data": {"features": "elsewhere"}},
    ],
    ids=str,
)  # fmt: skip
def test_harmless_changes_are_noted(change: dict[str, Any]) -> None:
    (key,) = flatten(change)
    assert any(note.startswith(f"{key}:") for note in changed(change))


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"model": {"qk_norm": "rms"}}, {"diffusion": {"flow_shift": 2.0}}, {"train": {"ema": {"decay": 0.5}}}, {"train": {"precision": "bf16"}}],
    ids=str,
)  # fmt: skip
def test_changes_that_make_another_run_are_refused_with_both_values(change: dict[str, Any]) -> None:
    flat = flatten(change)
    (key,) = flat
    with pytest.raises(ConfigError, match=rf"{key}: .* -> {flat[key]}"):
        changed(change)


def test_the_source_of_a_base_may_move_and_of_a_whole_model_may_not() -> None:
    old = {**settings("runs/x"), "init": {"source": "there"}}
    new = config_of(merge(old, {"init": {"source": "here"}}))
    (note,) = check_resumable({**identity(old), "base": {"folder": "/there", "fingerprint": "f"}}, new, 2, "f")
    assert note == "init.source: there -> here"
    with pytest.raises(ConfigError, match="init.source: there -> here"):
        check_resumable({**identity(old), "base": None}, new, 2, "f")


def test_all_wrong_keys_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        changed({"seed": 1, "model": {"depth": 5}})
    assert "seed: 0 -> 1" in str(error.value)
    assert "model.depth: 2 -> 5" in str(error.value)


def test_batches_may_be_cut_otherwise_if_a_step_stays_as_large() -> None:
    halved = [
        {"frames": 2, "height": 8, "width": 8, "batch_size": 2},
        {"frames": 1, "height": 8, "width": 8, "batch_size": 4},
    ]
    assert changed({"data": {"buckets": halved}}, 4)
    assert changed({"data": {"buckets": halved}, "train": {"gradient_accumulation": 2}}, 2)
    with pytest.raises(ConfigError, match="data.buckets.0.batch_size: 4 -> 2"):
        changed({"data": {"buckets": halved}}, 2)
    # Other ranks alone: that is what an elastic cluster does. It is said.
    (note,) = changed({}, 1)
    assert "global batch: {'2x8x8': 8, '1x8x8': 16} on 2 ranks -> {'2x8x8': 4, '1x8x8': 8} on 1 ranks" in note


def test_features_extracted_anew_are_other_data() -> None:
    old = settings("runs/x")
    with pytest.raises(ConfigError, match="data.features: not the features of the checkpoint"):
        check_resumable(identity(old), config_of(old), 2, "g")


def test_two_runs_in_one_run_dir_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(run_dir, "LOCK_WAIT_S", 0.1)
    config, alone = config_of(settings(tmp_path)), Ranks(0, 1, 0, torch.device("cpu"))
    with run_dir.lock(config, alone):
        with pytest.raises(ConfigError, match=r"another run is training there \(process \d+ on "):
            run_dir.lock(config, alone).__enter__()
        assert f"{tmp_path}: waiting for process" in capsys.readouterr().err
    with run_dir.lock(config, alone):
        pass


def test_a_failed_save_names_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    died = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert "another rank has died" in saving._cause(died, folder)
    assert "room" not in saving._cause(died, folder)
    assert saving._cause(ValueError("shapes differ"), folder) == "ValueError: shapes differ"
    hidden = RuntimeError("Parent directory runs/x does not exist.")
    for code, cause in (
        (errno.EROFS, "Read-only file system"),
        (errno.ENOSPC, r"No space left on device; .* free: make room"),
    ):

        def fail(*_: Any, code: int = code) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(saving, "atomic_write", fail)
        assert re.fullmatch(cause, saving._cause(hidden, folder))
