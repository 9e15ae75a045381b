"""A job's way back to the checkout it was sent from."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import job as jobs
from stdit.config import ConfigError


@pytest.fixture
def job(tmp_path: Path, monkeypatch):
    """A job's copy of a checkout (the working directory), and the checkout, where `ray start` was run."""
    checkout, copy = tmp_path / "checkout", tmp_path / "copy"
    for folder in (checkout, copy):
        folder.mkdir()
        (folder / "plan.yaml").write_text("name: p\n")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"working_dir": "gcs://x.zip"}}')
    monkeypatch.setattr(jobs, "_raylet_directory", lambda: checkout)
    return checkout


def test_a_job_goes_to_the_checkout_it_was_sent_from(job: Path) -> None:
    assert jobs.go_to_checkout(Path("plan.yaml")) == job
    assert Path.cwd() == job


def test_a_checkout_with_another_plan_is_not_the_one(job: Path) -> None:
    here = Path.cwd()
    (job / "plan.yaml").write_text("name: other\n")
    assert jobs.go_to_checkout(Path("plan.yaml")) is None
    assert Path.cwd() == here


def test_outside_a_job_nothing_moves(job: Path, monkeypatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    here = Path.cwd()
    assert jobs.go_to_checkout(Path("plan.yaml")) is None
    assert Path.cwd() == here


def test_relative_results_of_a_job_are_refused_by_key() -> None:
    jobs.require_absolute_paths({"run_dir": Path("/shared/x")})
    with pytest.raises(ConfigError, match=r"run_dir runs/x.*--set run_dir="):
        jobs.require_absolute_paths({"run_dir": Path("runs/x"), "extraction.out": Path("/shared/f")})
