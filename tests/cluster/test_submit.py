"""What is looked at before a job is sent, and what is sent."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cluster import submit
from stdit.config import ConfigError
from tests.support.paths import ROOT

PLAN = "configs/plans/tiny.yaml"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)


def given(*arguments: str):
    return submit.arguments().parse_args(["--plan", PLAN, *arguments])


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("http://10.0.0.1:8265", False),
        ("https://ray.example.com", False),
        ("http://127.0.0.1.example.com:8265", False),
    ],
)
def test_loopback_addresses_are_recognised(address: str, here: bool) -> None:
    assert submit.is_loopback(address) == here


def test_a_remote_server_without_a_token_is_refused(tmp_path: Path) -> None:
    args = given("--address", "http://10.0.0.1:8265", "--set", "run_dir=/shared/x")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1:8265 is not this machine, and there is no Ray token"):
        submit.check(args, {"HOME": str(tmp_path)})
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    submit.check(args, {"HOME": str(tmp_path)})
    submit.check(args, {"HOME": "/nowhere", "RAY_AUTH_TOKEN": "secret"})


def test_results_that_the_job_would_lose_are_refused() -> None:
    token = {"RAY_AUTH_TOKEN": "secret"}
    with pytest.raises(ConfigError, match=r"run_dir runs/tiny, extraction\.out runs/tiny/features"):
        submit.check(given("--address", "http://10.0.0.1:8265"), token)
    submit.check(given(), {})  # On this machine the job finds the checkout.


def test_a_plan_that_cannot_work_is_not_sent(capsys) -> None:
    assert submit.main(["--plan", PLAN, "--set", "stages.clips.after=nowhere"]) == 2
    assert "no stage is called 'nowhere'" in capsys.readouterr().err
    assert submit.main(["--plan", str(Path(PLAN).resolve())]) == 2
    assert "relative to the checkout" in capsys.readouterr().err


def test_the_command_survives_the_shell() -> None:
    args = given("--set", "extraction.where=[{column: a b, at_least: 1}]", "--allow-changes")
    assert shlex.split(submit.entrypoint(args)) == [
        "python", "-m", "pipelines.train_stages", "--plan", PLAN,
        "--set", "extraction.where=[{column: a b, at_least: 1}]", "--allow-changes",
    ]  # fmt: skip


def test_variables_are_given_or_taken_from_here() -> None:
    assert submit.variables(["A=1=2", "B"], {"B": "x"}) == {"A": "1=2", "B": "x"}
    with pytest.raises(ConfigError, match="--env C: C is not set here"):
        submit.variables(["C"], {})


def test_no_server_is_said_and_not_raised(capsys) -> None:
    assert submit.main(["--plan", PLAN, "--address", "http://127.0.0.1:9"]) == 2
    assert "no Ray job server at http://127.0.0.1:9" in capsys.readouterr().err
