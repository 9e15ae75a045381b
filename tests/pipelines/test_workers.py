"""Where work runs: environment, deadlines, and what is said meanwhile. No Ray is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import workers
from pipelines.plan import Resources
from pipelines.progress import Clock, StepLine
from stdit.config import Config, validate
from stdit.training.stopping import STOPPED
from tests.support.paths import ROOT


def test_a_worker_gets_its_threads_and_its_accelerator() -> None:
    cpu = workers.environment(Resources(workers=2, cpus_per_worker=3))
    assert (cpu["OMP_NUM_THREADS"], cpu["DS_ACCELERATOR"]) == ("3", "cpu")
    assert "DS_ACCELERATOR" not in workers.environment(Resources(use_gpu=True))
    assert Resources(workers=2, cpus_per_worker=3).cpus == 6


def test_the_exit_code_of_a_stopped_plan_is_that_of_a_stopped_run() -> None:
    from pipelines import train_stages

    assert train_stages.STOPPED == STOPPED


def test_a_local_ray_goes_without_the_cleaner_that_waits_for_a_dashboard(monkeypatch) -> None:
    def callbacks() -> list[str]:
        trainer = workers._trainer_class()(lambda: None)
        return [type(callback).__name__ for callback in trainer._create_default_callbacks()]

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    whole = callbacks()
    assert "PlacementGroupCleanerCallback" in whole
    monkeypatch.delenv("RAY_ADDRESS")
    assert callbacks() == [name for name in whole if name != "PlacementGroupCleanerCallback"]


def test_what_ray_s_start_writes_is_shown_only_if_it_fails(monkeypatch, capfd) -> None:
    import ray

    def start(fails: bool) -> Callable[..., None]:
        def init(**options: object) -> None:
            os.write(2, b"raylet: no space left\n")
            if fails:
                raise ConnectionError("the cluster is gone")

        return init

    for name, value in (("RAY_ADDRESS", "10.0.0.1:6379"), ("RAY_CHDIR_TO_TRIAL_DIR", "0")):
        monkeypatch.setenv(name, value)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_BACKEND_LOG_LEVEL"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start(False))
    assert workers.connect() == "joined"
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(ray, "init", start(True))
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        workers.connect()
    assert "raylet: no space left" in capfd.readouterr().err


def test_a_deadline_is_kept_though_training_never_ends() -> None:
    began = time.monotonic()
    with pytest.raises(workers.StageFailed, match=r"stage s: not ended after its deadline of 1 s"):
        workers._wait(lambda: time.sleep(60), "s", 1, lambda: None)
    assert time.monotonic() - began < 10


def test_of_several_errors_the_one_that_caused_the_others_is_reported() -> None:
    class GroupError(Exception):
        worker_failures = {  # noqa: RUF012
            0: RuntimeError("long trace\n\nRuntimeError: [../gloo] Connection closed by peer [127.0.0.1]:1"),
            1: RuntimeError("Traceback …\nstdit.config.ConfigError: model.in_channels is 3"),
        }

    def fit() -> None:
        raise GroupError("wrapped")

    with pytest.raises(workers.StageFailed) as caught:
        workers._wait(fit, "s", None, lambda: None)
    assert str(caught.value) == "stage s: rank 1: stdit.config.ConfigError: model.in_channels is 3"


def test_rays_own_death_is_told_from_that_of_the_training(tmp_path: Path, monkeypatch, capsys) -> None:
    from ray.exceptions import ActorDiedError, RayTaskError

    def fit(error: Exception) -> None:
        raise error

    with pytest.raises(workers.RayLost):
        workers._wait(lambda: fit(ActorDiedError()), "s", None, lambda: None)
    with pytest.raises(workers.StageFailed) as caught:
        workers._wait(lambda: fit(RayTaskError("run", "trace", ValueError("x"))), "s", None, lambda: None)
    assert type(caught.value) is workers.StageFailed


def test_a_stage_whose_ray_dies_is_started_again_a_bounded_number_of_times(tmp_path: Path, monkeypatch, capsys) -> None:
    from types import SimpleNamespace
    from typing import Any, cast

    from pipelines.runner import PlanRunner

    deaths: list[str] = []

    def die(*_: object) -> None:
        deaths.append("died")
        if len(deaths) <= fatal:
            raise workers.RayLost("stage s: the actor died")

    monkeypatch.setattr(workers, "train_stage", die)
    monkeypatch.setattr(workers, "disconnect", lambda: deaths.append("disconnected"))
    runner = cast(Any, PlanRunner.__new__(PlanRunner))
    runner.plan = SimpleNamespace(resources=Resources(max_failures=1), run_dir=tmp_path)
    runner.clock, runner.connect = Clock(), lambda: deaths.append("connected")
    stage, progress = cast(Any, SimpleNamespace(config=None)), cast(Any, SimpleNamespace(tick=None))
    fatal = 1
    runner._train(stage, progress)
    assert deaths == ["died", "disconnected", "connected", "died"]
    assert "restart 1 of 1" in capsys.readouterr().out
    deaths.clear()
    fatal = 9
    with pytest.raises(workers.RayLost):
        runner._train(stage, progress)
    assert deaths.count("died") == 2


def test_the_first_signal_asks_and_the_second_is_the_usual_one(tmp_path: Path, capsys) -> None:
    file = tmp_path / "run" / "stop"
    # A shell's background job begins with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with workers._request_stop_on_signal(file):
            os.kill(os.getpid(), signal.SIGINT)
            assert file.exists()
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "once more to stop at once" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- progress


def test_progress_tells_new_steps_only(tmp_path: Path, capsys) -> None:
    data = {
        "name": "s", "run_dir": str(tmp_path), "model": {"size": "S"}, "train": {"steps": 100},
        "data": {"features": "synthetic", "buckets": [{"frames": 1, "height": 8, "width": 8, "batch_size": 1}]},
    }  # fmt: skip
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 40, "loss": 2.0}\n')
    line = StepLine(validate(data, Config, "test"), Clock())
    line._every_s = 0
    line.tick()
    assert capsys.readouterr().out == "", "step 40 was there before"
    for step in (50, 60):
        metrics.write_text(f'{{"step": {step}, "loss": null}}\n')
        line.tick()
        time.sleep(0.01)
        line.tick()
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2
    assert "s: step 60/100, loss not a number, " in told[1]


@pytest.mark.slow
@pytest.mark.ray
def test_a_local_ray_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    script = (
        "import ray\nfrom pipelines import workers\nassert workers.connect(1) == 'started'\n"
        "print(ray.get(ray.remote(lambda: 6 * 7).remote()))\nworkers.disconnect()\n"
    )
    own = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {**own, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.split() == ["42"], done.stderr
    assert not (tmp_path / ".ray").exists()


def test_a_ray_that_did_not_start_in_time_is_started_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        if len(calls) <= failures:
            raise Exception("The current node timed out during startup. This could happen because …")

    monkeypatch.setattr(workers, "disconnect", lambda: calls.append({"disconnected": True}))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    failures = 1
    assert workers._init(init, 2) == "started"
    first, between, second = calls
    assert first == second
    assert between == {"disconnected": True}
    calls.clear()
    failures = 9
    with pytest.raises(Exception, match="timed out during startup"):
        workers._init(init, 2)
    assert sum("address" in call for call in calls) == 2


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_ray_that_cannot_start_has_written_is_shown(
    fails: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import ray

    def init(**_: Any) -> None:
        os.write(2, b"raylet: no port left\n")  # as its C++ side does
        if fails:
            raise ConnectionError("the node did not come up")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(workers, "_own_token", lambda: None)
    for name in ("RAY_ADDRESS", "RAY_USAGE_STATS_ENABLED", "RAY_BACKEND_LOG_LEVEL", "RAY_CHDIR_TO_TRIAL_DIR"):
        monkeypatch.setenv(name, "")
    if fails:
        with pytest.raises(ConnectionError, match="did not come up"):
            workers.connect(1)
    else:
        assert workers.connect(1) == "started"
    assert ("raylet: no port left" in capfd.readouterr().err) is fails


KILL_RAYLET = """
import sys
from pathlib import Path
import psutil
from pipelines import workers
from pipelines.plan import Resources
from stdit.config import Config, load_config

out = Path(sys.argv[1])
config = load_config("configs/debug.yaml", Config, [f"run_dir={out / 'run'}", "train.steps=100000", "name=stage"])
killed = False

def tick():
    global killed
    log = out / "run" / "metrics.jsonl"
    if killed or not log.is_file() or log.read_text().count("\\n") < 2:
        return
    for process in psutil.Process().children(recursive=True):
        if process.name() == "raylet":
            process.kill()
            killed = True

workers.connect(2)
try:
    workers.train_stage(config, Resources(workers=2, deadline_s=240), out / "ray", tick)
except workers.RayLost as lost:
    print("lost", killed, lost)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_dead_raylet_ends_the_stage_as_a_lost_ray(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILL_RAYLET, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )  # fmt: skip
    assert "lost True stage stage: " in done.stdout, done.stdout + done.stderr
