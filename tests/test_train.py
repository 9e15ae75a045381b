"""stdit/train.py as people start it: launchers, signals, full disks, wrong settings."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from stdit.config import ConfigError
from stdit.training import checkpoint
from stdit.training.divergence import Diverged
from stdit.training.saving import NotWritten
from stdit.training.stopping import STOPPED
from tests.support import forked
from tests.support.launches import environment, metrics, wait_for
from tests.support.paths import ROOT
from tests.support.rank_pool import free_port
from tests.support.runs import make_run, model_config

DEBUG = ["--config", "configs/debug.yaml"]
BIN = Path(sys.executable).parent


def train(*args: str) -> subprocess.CompletedProcess[str]:
    """`python stdit/train.py`, to its end."""
    return forked.run("stdit.train", *args, env=environment())


# What a test has started, with all that it started, ends with the test, whatever comes of it.
STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def _nothing_stays_running() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.wait(60)


def launch(*args: str, ranks: int = 2) -> subprocess.Popen[str]:
    command = [BIN / "deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "stdit/train.py", *args]
    return start(command)


def default_signals() -> None:
    """Undoes what a child inherits of tests that run under nohup or in a shell's background: signals that are
    ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(command: Sequence[str | Path]) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=default_signals,
    )  # fmt: skip
    STARTED.append(process)
    return process


def running(run_dir: Path) -> dict[int, int]:
    """{pid: rank} of the ranks that train into `run_dir`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        rank = [part for part in command if part.startswith("--local_rank=")]
        if (
            rank
            and {f"run_dir={run_dir}", f"--set=run_dir={run_dir}"} & set(command)
            and "deepspeed.launcher.launch" not in command
        ):
            found[int(entry.name)] = int(rank[0].partition("=")[2])
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_the_debug_config_shows_that_a_launch_works(tmp_path: Path) -> None:
    process = launch(*DEBUG, "--set", f"run_dir={tmp_path}")
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert found.name == "step-00000020"
    assert json.loads((found / "identity.json").read_text())["world_size"] == 2
    # The same again: nothing to do, one rank is enough to say so.
    again = train(*DEBUG, "--set", f"run_dir={tmp_path}")
    assert again.returncode == 0, again.stderr
    assert "done already, at step 20" in again.stderr
    assert metrics(tmp_path) == lines


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_blocks_train_as_plain_ones_do(stage: int, tmp_path: Path) -> None:
    losses = {}
    for compiled in ("false", "true"):
        settings = {
            "run_dir": tmp_path / compiled,
            # ZeRO-3 breaks a block's graph at each weight; sizes of a second bucket make that longer still.
            "model.depth": 1,
            "data.buckets": "[{frames: 4, height: 16, width: 16, batch_size: 4}]",
            "train.steps": 2,
            "train.zero_stage": stage,
            "train.compile": compiled,
        }
        process = launch(*DEBUG, *(f"--set={key}={value}" for key, value in settings.items()))
        output, _ = process.communicate(timeout=570)
        assert process.returncode == 0, output
        losses[compiled] = [line["loss"] for line in metrics(tmp_path / compiled)]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_the_end_of_the_deepspeed_command_stops_the_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    process = launch(
        *DEBUG, "--set", f"run_dir={tmp_path}", "--set", "train.steps=100000", "--set", "train.checkpoint_every=null"
    )
    try:
        wait_for(lambda: len(metrics(tmp_path)) >= 20)
        losses = [line["loss"] for line in metrics(tmp_path)]
        assert losses[19] < losses[0]
        ranks = running(tmp_path)
        assert sorted(ranks.values()) == [0, 1]
        # It dies at once; its inner launcher and the ranks stay behind.
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not running(tmp_path))
        found = checkpoint.find_latest(tmp_path)
        assert found is not None
        assert checkpoint.step_of(found) == metrics(tmp_path)[-1]["step"]
        assert json.loads((found / "identity.json").read_text())["world_size"] == 2
    finally:
        process.kill()
        for pid in running(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_ends_the_step_saves_and_exits_with_its_own_code(number: signal.Signals, tmp_path: Path) -> None:
    command = [sys.executable, "stdit/train.py", *DEBUG, "--set", f"run_dir={tmp_path}", "--set", "train.steps=100000"]
    process = start(command)
    wait_for(lambda: len(metrics(tmp_path)) >= 2)
    process.send_signal(number)
    said, _ = process.communicate(timeout=280)
    assert process.returncode == STOPPED, said
    assert number.name in said
    check_stopped(tmp_path)
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert checkpoint.step_of(found) == metrics(tmp_path)[-1]["step"]


def stdit_train(run_dir: Path, *settings: str, ranks: int = 2) -> subprocess.Popen[str]:
    """`stdit train --nproc`, with so many steps that it has to be stopped."""
    sets = [f"--set={setting}" for setting in (f"run_dir={run_dir}", "train.steps=100000", *settings)]
    command = [sys.executable, "-m", "stdit.cli", "train", "--nproc", str(ranks), *DEBUG, *sets]
    return start(command)


def end(process: subprocess.Popen[str], run_dir: Path) -> None:
    """Ends what a test has left running."""
    process.kill()
    for pid in running(run_dir):
        os.kill(pid, signal.SIGKILL)


def inner_launcher(process: subprocess.Popen[str]) -> int:
    """The process id of deepspeed.launcher.launch below `process`."""
    below = psutil.Process(process.pid).children(recursive=True)
    return next(p.pid for p in below if "deepspeed.launcher.launch" in p.cmdline())


def check_stopped(run_dir: Path) -> None:
    """The record on disk, the checkpoint and the last line of metrics agree."""
    found = checkpoint.find_latest(run_dir)
    assert found is not None
    assert json.loads((run_dir / "stopped.json").read_text())["checkpoint"] == found.name
    assert checkpoint.step_of(found) == metrics(run_dir)[-1]["step"]


@contextlib.contextmanager
def stopped_run(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """A `stdit train` of two ranks that has logged two steps. It has to end as one that was asked to stop."""
    process = stdit_train(run_dir)
    try:
        wait_for(lambda: len(metrics(run_dir)) >= 2)
        yield process
        output, _ = process.communicate(timeout=280)
        assert process.returncode == STOPPED, output
        check_stopped(run_dir)
    finally:
        end(process, run_dir)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stdit_train_that_is_stopped_ends_with_75(number: signal.Signals, tmp_path: Path) -> None:
    with stopped_run(tmp_path) as process:
        process.send_signal(number)


@pytest.mark.slow
@pytest.mark.distributed
def test_stdit_train_waits_for_ranks_whose_launcher_was_killed(tmp_path: Path) -> None:
    with stopped_run(tmp_path) as process:
        os.kill(inner_launcher(process), signal.SIGKILL)  # deepspeed itself then ends with code 0


@pytest.mark.slow
@pytest.mark.distributed
def test_a_save_of_more_than_thirty_seconds_is_waited_for(tmp_path: Path) -> None:
    with stopped_run(tmp_path) as process:
        main = next(pid for pid, rank in running(tmp_path).items() if rank == 0)
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: list(tmp_path.glob("checkpoints/*.partial")))
        os.kill(main, signal.SIGSTOP)  # a slow disk; DeepSpeed's launcher would kill it after 30 s
        time.sleep(36)
        assert not list(tmp_path.glob("checkpoints/step-*[0-9]")), "stopped too late to show anything"
        os.kill(main, signal.SIGCONT)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", ["deepspeed", "inner launcher"])
def test_ranks_whose_launcher_dies_while_they_import_end_at_once(victim: str, tmp_path: Path) -> None:
    process = launch(*DEBUG, "--set", f"run_dir={tmp_path}", "--set", "train.steps=100000")
    try:
        wait_for(lambda: len(running(tmp_path)) == 2)
        if victim == "deepspeed":
            process.kill()
        else:
            os.kill(inner_launcher(process), signal.SIGKILL)
        wait_for(lambda: not running(tmp_path), 30)
        assert not (tmp_path / "checkpoints").exists()
    finally:
        end(process, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_hangs_ends_the_run_with_75_and_is_named(tmp_path: Path) -> None:
    process = stdit_train(tmp_path, "train.step_timeout_s=8", "train.checkpoint_every=1")
    try:
        wait_for(lambda: len(metrics(tmp_path)) >= 2)
        os.kill(next(pid for pid, rank in running(tmp_path).items() if rank == 1), signal.SIGSTOP)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == STOPPED, output
        assert not running(tmp_path)
        report = (tmp_path / "stalled-rank-0.txt").read_text()
        assert "more than 8 s (train.step_timeout_s)" in report
        assert "[rank 0] step " in output
        again = stdit_train(tmp_path)
        wait_for(lambda: not (tmp_path / "stopped.json").exists() and len(running(tmp_path)) == 2)
        end(again, tmp_path)
    finally:
        end(process, tmp_path)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_that_is_stopped_before_its_first_step_ends_the_run_with_75(tmp_path: Path) -> None:
    process = stdit_train(tmp_path, "train.start_timeout_s=60")
    try:
        wait_for(lambda: len(running(tmp_path)) == 2)
        os.kill(next(pid for pid, rank in running(tmp_path).items() if rank == 1), signal.SIGSTOP)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == STOPPED, output
        said = "[rank 0] before the first step, waiting for the other ranks to start: more than 60 s (train.start_timeout_s)"
        assert said in output
        assert not running(tmp_path)
    finally:
        end(process, tmp_path)


class Ended(Exception):
    """The process would have ended."""


def say_error(error: Exception, rank: int, monkeypatch: pytest.MonkeyPatch, signalled: bool = False) -> int:
    """What main() makes of an error of train() on a rank; its exit code."""
    from stdit import train as verb
    from stdit.training.stopping import Stop

    def fail(*_: Any, stop: Stop) -> None:
        if signalled:
            stop.request("SIGTERM")
        raise error

    codes: list[int] = []

    def ended(code: int) -> None:
        codes.append(code)
        raise Ended

    monkeypatch.setattr(verb, "train", fail)
    monkeypatch.setattr(verb, "PEER_WAIT_S", 0.1)
    monkeypatch.setattr(Stop, "listen", lambda self: self)
    monkeypatch.setattr(os, "_exit", ended)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(Ended):
        verb.main(DEBUG)
    return codes[0]


@pytest.mark.parametrize(
    "error", [Diverged("step 4: loss"), NotWritten("no room"), OSError(28, "No space left", "done.json")]
)
def test_what_all_ranks_raise_is_one_line_of_rank_0(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    error.shared = True  # pyright: ignore[reportAttributeAccessIssue]  (of Ranks.broadcast)
    assert [say_error(error, rank, monkeypatch) for rank in (0, 1)] == [1, 1]
    assert capfd.readouterr().err == f"[rank 0] error: {error}\n"


def test_an_invalid_config_is_one_line_of_a_hosts_first_rank(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert say_error(ConfigError("data.x: no"), 0, monkeypatch) == 2
    # The launcher ends the others as soon as one has failed.
    assert say_error(ConfigError("data.x: no"), 1, monkeypatch, signalled=True) == 2
    assert capfd.readouterr().err == "[rank 0] error: data.x: no\n"
    # Unless it alone finds something wrong.
    assert say_error(ConfigError("data.x: no"), 1, monkeypatch) == 2
    assert capfd.readouterr().err == "[rank 1] error: data.x: no\n"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_same_command_at_once_after_torchrun_was_killed(tmp_path: Path) -> None:
    arguments = ["stdit/train.py", *DEBUG, f"--set=run_dir={tmp_path}", "--set=train.checkpoint_every=1"]

    def torchrun(steps: int) -> subprocess.Popen[str]:
        command = [BIN / "torchrun", "--nproc_per_node=2", f"--master_port={free_port()}", *arguments]
        return subprocess.Popen(
            [*command, f"--set=train.steps={steps}"],
            cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    for _ in range(2):
        before = len(metrics(tmp_path))
        process = torchrun(100_000)
        wait_for(lambda before=before: len(metrics(tmp_path)) >= before + 2)
        wait_for(lambda: list(tmp_path.glob("checkpoints/*.partial")))
        process.kill()  # its ranks are saving
    steps = metrics(tmp_path)[-1]["step"] + 3
    last = torchrun(steps)
    output, _ = last.communicate(timeout=280)
    assert last.returncode == 0, output
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, steps + 1))
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.list_checkpoints(tmp_path))
    assert not list(tmp_path.glob("checkpoints/*.partial"))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_while_saving_leaves_a_checkpoint_to_go_on_from(victim: int, tmp_path: Path) -> None:
    arguments = [*DEBUG, "--set", f"run_dir={tmp_path}", "--set", "train.checkpoint_every=1"]
    found = None
    for round_ in range(3):
        before = len(metrics(tmp_path))
        process = launch(*arguments, "--set", "train.steps=100000")
        wait_for(lambda before=before: len(metrics(tmp_path)) >= before + 3)
        # Nearly all of the time goes into saving.
        time.sleep(0.02 * (1 + 3 * round_))
        os.kill(next(pid for pid, rank in running(tmp_path).items() if rank == victim), signal.SIGKILL)
        process.communicate(timeout=280)
        assert process.returncode != 0
        assert not running(tmp_path)
        found = checkpoint.find_latest(tmp_path)
    assert found is not None
    steps = checkpoint.step_of(found) + 1
    last = launch(*arguments, "--set", f"train.steps={steps}")
    output, _ = last.communicate(timeout=280)
    assert last.returncode == 0, output
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, steps + 1))


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return done.returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs unshare -rm, for a small disk of its own")
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.distributed)])
def test_a_full_disk_ends_the_run_and_spares_the_checkpoint_before(ranks: int, tmp_path: Path) -> None:
    start = f"{sys.executable} stdit/train.py"
    if ranks == 2:
        start = f"{BIN}/deepspeed --num_gpus 2 --master_port {free_port()} stdit/train.py"
    settings = "--set train.checkpoint_every=2 --set train.keep_checkpoints=9 --set train.tensorboard=false --set train.steps=12"
    train = f"{start} --config configs/debug.yaml --set run_dir={tmp_path}/run {settings}"
    script = f"""
        mount -t tmpfs -o size=9m tmpfs {tmp_path} || exit 99
        {train}; echo "first=$?"
        ls {tmp_path}/run/checkpoints
        mount -o remount,size=64m {tmp_path}
        {train}; echo "second=$?"
        wc -l < {tmp_path}/run/metrics.jsonl
        ls {tmp_path}/run
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280
    )
    output = done.stdout + done.stderr
    assert "first=1" in done.stdout, output
    assert "the checkpoint could not be written" in output
    assert "resumes after step" in output
    assert "second=0" in done.stdout, output
    assert "\n12\n" in done.stdout
    assert "done.json" in done.stdout


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model.hidden_sise=64"], "configs/debug.yaml: model.hidden_sise: unknown key"),
        (["data.buckets=[{frames: 1, height: 15, width: 16, batch_size: 8}]"], "latent height 15 is not divisible by model.patch_size 2"),
    ],
)  # fmt: skip
def test_wrong_settings_are_reported_before_anything_begins(changes: list[str], said: str, tmp_path: Path) -> None:
    overrides = [part for change in [f"run_dir={tmp_path}/run", *changes] for part in ("--set", change)]
    done = train(*DEBUG, *overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_program_is_refused_untouched(tmp_path: Path) -> None:
    file = tmp_path / "checkpoints/step-1000/pytorch_model.bin"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"theirs")
    (tmp_path / "config.yaml").write_text("theirs: true\n")
    done = train(*DEBUG, "--set", f"run_dir={tmp_path}")
    assert done.returncode == 2
    assert "is no run of stdit; nothing was changed" in done.stderr
    assert "Traceback" not in done.stderr
    assert file.read_bytes() == b"theirs"
    assert (tmp_path / "config.yaml").read_text() == "theirs: true\n"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        "checkpoints",
        "config.yaml",
        "pytorch_model.bin",
        "step-1000",
    ]


def test_a_run_without_an_intact_checkpoint_ends_with_2_and_is_left_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model_config())
    weights = next(run.glob("checkpoints/*/transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    before = sorted(p for p in run.rglob("*") if p.name != ".lock")
    done = train(*DEBUG, "--set", f"run_dir={run}")
    assert done.returncode == 2, done.stderr
    assert "no checkpoint is intact" in done.stderr
    assert weights.name in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p for p in run.rglob("*") if p.name != ".lock") == before


def test_help_needs_no_torch() -> None:
    program = "import runpy, sys; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('stdit/train.py', run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
