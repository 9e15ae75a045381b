"""stdit/train.py as people start it: launchers, signals, full disks, wrong settings."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stdit.training import checkpoint
from stdit.training.distributed import STOPPED
from tests.support.paths import ROOT
from tests.support.rank_pool import free_port

DEBUG = ["--config", "configs/debug.yaml"]
BIN = Path(sys.executable).parent
# What the tests' own environment may say of ranks and threads is not for the runs.
LEFT_OUT = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_ACCELERATOR",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
)


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in LEFT_OUT} | {"OMP_NUM_THREADS": "1"}


def python(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "stdit/train.py", *args]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)


def launch(*args: str, ranks: int = 2) -> subprocess.Popen[str]:
    command = [BIN / "deepspeed", "--num_gpus", str(ranks), "--master_port", str(free_port()), "stdit/train.py", *args]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def running(run_dir: Path) -> dict[int, int]:
    """{pid: rank} of the ranks that train into `run_dir`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        rank = [part for part in command if part.startswith("--local_rank=")]
        if rank and f"run_dir={run_dir}" in command and "deepspeed.launcher.launch" not in command:
            found[int(entry.name)] = int(rank[0].partition("=")[2])
    return found


def wait_for(condition: Any, timeout_s: float = 90.0) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)


@pytest.mark.distributed
def test_the_debug_config_shows_that_a_launch_works(tmp_path: Path) -> None:
    process = launch(*DEBUG, "--set", f"run_dir={tmp_path}")
    output, _ = process.communicate(timeout=120)
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
    again = python(*DEBUG, "--set", f"run_dir={tmp_path}")
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
            "train.steps": 3,
            "train.zero_stage": stage,
            "train.compile": compiled,
        }
        process = launch(*DEBUG, *(f"--set={key}={value}" for key, value in settings.items()))
        output, _ = process.communicate(timeout=570)
        assert process.returncode == 0, output
        losses[compiled] = [line["loss"] for line in metrics(tmp_path / compiled)]
    assert losses["true"] == pytest.approx(losses["false"], rel=1e-4)


@pytest.mark.distributed
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_the_end_of_the_deepspeed_command_stops_the_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    process = launch(
        *DEBUG, "--set", f"run_dir={tmp_path}", "--set", "train.steps=100000", "--set", "train.checkpoint_every=null"
    )
    try:
        wait_for(lambda: len(metrics(tmp_path)) >= 3)
        ranks = running(tmp_path)
        assert sorted(ranks.values()) == [0, 1]
        # It dies at once; its inner launcher and the ranks stay behind.
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not running(tmp_path))
        found = checkpoint.find_latest(tmp_path)
        assert found is not None
        assert checkpoint.step_of(found) == metrics(tmp_path)[-1]["step"]
    finally:
        process.kill()
        for pid in running(tmp_path):
            os.kill(pid, signal.SIGKILL)


def test_a_signal_ends_the_step_saves_and_exits_with_its_own_code(tmp_path: Path) -> None:
    command = [sys.executable, "stdit/train.py", *DEBUG, "--set", f"run_dir={tmp_path}", "--set", "train.steps=100000"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(metrics(tmp_path)) >= 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == STOPPED, said
    assert "SIGINT" in said
    found = checkpoint.find_latest(tmp_path)
    assert found is not None
    assert checkpoint.step_of(found) == metrics(tmp_path)[-1]["step"]


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
        process.communicate(timeout=90)
        assert process.returncode != 0
        assert not running(tmp_path)
        found = checkpoint.find_latest(tmp_path)
    assert found is not None
    steps = checkpoint.step_of(found) + 1
    last = launch(*arguments, "--set", f"train.steps={steps}")
    output, _ = last.communicate(timeout=90)
    assert last.returncode == 0, output
    assert [m["step"] for m in metrics(tmp_path)] == list(range(1, steps + 1))


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    done = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs unshare -rm, for a small disk of its own")
@pytest.mark.parametrize("ranks", [pytest.param(1), pytest.param(2, marks=[pytest.mark.slow, pytest.mark.distributed])])
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
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=180
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
def test_wrong_settings_are_told_before_anything_begins(changes: list[str], said: str, tmp_path: Path) -> None:
    overrides = [part for change in [f"run_dir={tmp_path}/run", *changes] for part in ("--set", change)]
    done = python(*DEBUG, *overrides)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_help_needs_no_torch() -> None:
    program = "import runpy, sys; sys.argv = ['train.py', '--help']\ntry: runpy.run_path('stdit/train.py', run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--config" in done.stdout
