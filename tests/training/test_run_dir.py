"""Whose a run directory is: a run's, an empty one, or something that is left alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from stdit.config import ConfigError
from stdit.training import run_dir
from stdit.training.adapters import weights_fingerprint
from stdit.training.distributed import Ranks
from tests.support.rank_jobs import config_of, settings

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    "file",
    [
        "checkpoints/step-1000/pytorch_model.bin", "checkpoints/step-00001000/manifest.json", "config.yaml", "metrics.jsonl",
        "done.json", "notes.txt", "model.safetensors", "stop", ".lock",
    ],
)  # fmt: skip
def test_a_folder_of_something_else_is_refused_untouched(file: str, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("model: {hidden_size: 8}\n")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"run_dir: .* is no run of stdit; nothing was changed"):
        run_dir.check(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.timeout(20)
def test_a_pipe_is_no_config_of_a_run(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")  # opened, it would wait for ever
    with pytest.raises(ConfigError, match=r"holds config.yaml and is no run of stdit"):
        run_dir.check(tmp_path)


@pytest.mark.timeout(20)
def test_a_pipe_among_weights_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match=r"x.safetensors: cannot be read \(not a regular file\)"):
        weights_fingerprint(tmp_path)


def test_new_empty_and_own_folders_are_taken(tmp_path: Path) -> None:
    for name in ("new/deep", "empty", "logs"):
        run_dir.check(tmp_path / name)
        if name != "new/deep":
            (tmp_path / name).mkdir(exist_ok=True)
            run_dir.check(tmp_path / name)
    (tmp_path / "logs/slurm-1.out").write_text("x")
    (tmp_path / "logs/.nfs0001").write_text("x")
    run_dir.check(tmp_path / "logs")
    # Killed between its lock and its config, and later.
    config = config_of(settings(tmp_path / "own"))
    with run_dir.lock(config, ALONE):
        run_dir.check(config.run_dir)
    run_dir.start(config)
    (config.run_dir / "notes.txt").write_text("of a person")
    run_dir.check(config.run_dir)


def test_what_can_be_no_run_dir_is_an_error_before_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match=r"file exists and is no folder"):
            run_dir.check(path)
    os.symlink(tmp_path / "gone", tmp_path / "link")
    with pytest.raises(ConfigError, match=r"link exists and is no folder"):
        run_dir.check(tmp_path / "link")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=rf"run_dir: {tmp_path} cannot be written"):
        run_dir.check(tmp_path / "run")


def test_what_became_of_a_run_is_told_until_it_goes_on(tmp_path: Path) -> None:
    config = config_of(settings(tmp_path))
    run_dir.start(config)
    run_dir.write_stopped(config, tmp_path / "checkpoints/step-00000007", "SIGTERM", ALONE)
    assert (tmp_path / "stopped.json").read_text() == '{"step": 7, "checkpoint": "step-00000007", "reason": "SIGTERM"}'
    run_dir.write_done(config, 20, 160, ALONE)
    run_dir.start(config)
    assert not (tmp_path / "stopped.json").exists()
    assert not (tmp_path / "done.json").exists()
