"""A rank that hangs says so and ends; so does one that was asked to stop and waits for others."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stdit.config import TrainConfig
from stdit.training import run_dir, watchdog
from stdit.training.checkpoint import unfinished_files
from stdit.training.stopping import STOPPED, Stop
from stdit.training.watchdog import Watchdog
from tests.support.paths import ROOT
from tests.support.rank_jobs import run_hanging_at_start, settings
from tests.support.rank_pool import Pool

# A thread that waits where Python runs no signal handler, as in a collective; the names are those of train().
HANGS = """
import ctypes, os, sys, threading
from pathlib import Path
from stdit.training import watchdog
from stdit.config import TrainConfig
from stdit.training.checkpoint import unfinished_files
from stdit.training.stopping import Stop
watchdog.STOP_GRACE_S = 0.5
class Engine:
    def step(self):
        while True:
            ctypes.CDLL(None).pause()
stop = Stop().listen()
dog = watchdog.Watchdog(3, Path(sys.argv[1]), TrainConfig(steps=9, step_timeout_s=float(sys.argv[2])), stop)
if sys.argv[3] == "training":
    stop.start_training()
    dog.start_step(17)
print("ready", flush=True)
Engine().step()
"""


def hang(folder: Path, limit_s: float, signal: int | None, when: str = "training") -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(folder), str(limit_s), when],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if signal is not None:
        os.kill(process.pid, signal)
    _, said = process.communicate(timeout=280)
    return process.returncode, said


@pytest.mark.parametrize(
    ("limit_s", "signal", "reason"),
    [(1.0, None, "more than 1 s (train.step_timeout_s)"), (1000.0, 15, "more than 0 s since the stop was requested (SIGTERM)")],
)  # fmt: skip
def test_a_hanging_rank_is_named_with_step_phase_and_stack(
    limit_s: float, signal: int | None, reason: str, tmp_path: Path
) -> None:
    code, said = hang(tmp_path, limit_s, signal)
    assert code == STOPPED
    for text in (said, (tmp_path / "stalled-rank-3.txt").read_text()):
        assert f"[rank 3] step 17, optimizer step: {reason}" in text
        assert "in step\n" in text
        assert "most recent call first" in text


def test_a_rank_that_hangs_before_its_first_step_ends_at_once_when_it_is_asked_to(tmp_path: Path) -> None:
    began = time.monotonic()
    code, said = hang(tmp_path, 1000.0, 15, "starting")
    assert time.monotonic() - began < 20
    assert (code, said) == (STOPPED, "stopped before training began (SIGTERM); the same command starts again\n")


def limits(step_s: float, start_s: float = 1000) -> TrainConfig:
    return TrainConfig(steps=9, step_timeout_s=step_s, start_timeout_s=start_s)


def dog(folder: Path, limit_s: float, stop: Stop | None = None) -> Watchdog:
    found = Watchdog(0, folder, limits(limit_s), Stop() if stop is None else stop)
    found.close()
    return found


def test_the_time_until_the_first_step_has_a_limit_of_its_own(tmp_path: Path) -> None:
    stop = Stop()
    watched = Watchdog(0, tmp_path, limits(10, 300), stop)
    watched.close()
    now = time.monotonic()
    assert watched._overdue(now + 299) is None
    assert watched._overdue(now + 301) == "more than 300 s (train.start_timeout_s)"
    # Under Ray no request ends the process: the checkpoint that is being loaded may take its time.
    stop.request("a file is there")
    assert watched._overdue(now + 299) is None
    watched.start_step(1)
    assert watched._overdue(now + 11) == "more than 10 s (train.step_timeout_s)"


@pytest.mark.distributed
def test_a_rank_that_hangs_while_it_starts_is_found_with_its_phase(solo: Pool, tmp_path: Path) -> None:
    found = solo(run_hanging_at_start, settings(tmp_path))[0]
    assert found == ["more than 0.1 s (train.start_timeout_s)", "building the model"]


def test_a_report_is_written_into_no_other_folder(tmp_path: Path) -> None:
    file = tmp_path / "stalled-rank-3.txt"
    assert run_dir.report_file(tmp_path, "stalled", 3) == file
    file.write_text("x")
    run_dir.check(tmp_path)  # the same command takes the folder
    file.unlink()
    assert run_dir.report_file(tmp_path / "none", "stalled", 3) is None
    (tmp_path / "thesis.tex").write_text("x")
    assert run_dir.report_file(tmp_path, "stalled", 3) is None


def test_a_report_names_the_ranks_that_have_written_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "OTHERS_S", 0.1)
    watched = dog(tmp_path, 10)
    files = [tmp_path / f"stalled-rank-{rank}.txt" for rank in range(3)]
    for file in files:
        file.write_text("x")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert watched._others(files[0], 10) is None
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "[rank 0] every rank reports that it waits" in str(watched._others(files[0], 10))
    os.utime(files[1], (0, 0))  # of an earlier launch
    assert "[rank 0] no report of rank 1: " in str(watched._others(files[0], 10))
    files[2].unlink()
    assert "[rank 0] no report of rank 1, 2: " in str(watched._others(files[0], 10))


class Validator:
    def run(self, watched: Watchdog, now: float) -> str | None:
        return watched._overdue(now)


def test_a_validation_is_given_its_time_to_end(tmp_path: Path) -> None:
    stop = Stop()
    watched = dog(tmp_path, 10_000, stop)
    watched.start_step(1)
    stop.request("SIGTERM")
    now = time.monotonic()
    assert watched._overdue(now + 11)
    assert Validator().run(watched, now + 290) is None
    assert Validator().run(watched, now + 310)


def wait_in_a_group_of_others() -> tuple[float, str]:
    """Seconds until a collective that rank 1 joins late fails on rank 0, under a time-out of 0.2 s."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from stdit.training.distributed import TIMEOUT, set_timeout
    from stdit.training.engine import init_distributed

    ranks = init_distributed()
    group = dist.new_group(timeout=timedelta(minutes=30))  # as a library's, with a time-out of its own
    began, said = time.monotonic(), ""
    set_timeout(timedelta(seconds=0.2))
    if ranks.is_main:
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(torch.ones(1), group=group)
            said = "it did not fail"
    else:
        time.sleep(0.8)
    seconds = time.monotonic() - began
    set_timeout(TIMEOUT)
    ranks.barrier()
    return seconds, said


@pytest.mark.distributed
def test_our_time_out_governs_the_groups_that_libraries_create(pair: Pool) -> None:
    seconds, said = pair(wait_in_a_group_of_others)[0]
    assert (seconds < 0.7, said) == (True, "")


def test_steps_that_end_in_time_are_left_alone(tmp_path: Path) -> None:
    watched = dog(tmp_path, 10)
    now = time.monotonic()
    watched.start_step(1)
    assert watched._overdue(now + 9) is None
    assert watched._overdue(now + 11)


def test_a_save_may_take_long_if_its_files_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason: ended.append(reason) or self.close())
    monkeypatch.setattr(watchdog, "POLL_S", 0.02)
    watched = Watchdog(0, tmp_path, limits(1.0), Stop())
    folder = tmp_path / "checkpoints/step-00000001.partial/transformer"
    folder.mkdir(parents=True)
    watched.start_step(1)
    with watched.saving():
        for number in range(20):
            (folder / f"{number}").write_bytes(b"x")
            time.sleep(0.1)
        assert not ended
        assert watched._closed.wait(20)
    assert ended == ["more than 1 s (train.step_timeout_s)"]


def test_files_that_vanish_while_they_are_looked_at_end_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints/step-00000001.partial/transformer"
    folder.mkdir(parents=True)
    (folder / "a").write_bytes(b"xyz")
    assert unfinished_files(tmp_path) == {(str(folder / "a"), 3)}

    def vanished(path: Any, *args: Any, **settings: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, "renamed meanwhile", str(path))

    for name in ("scandir", "stat"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, vanished)
            assert unfinished_files(tmp_path) == set()
    assert unfinished_files(tmp_path / "none") == set()


def test_a_save_on_a_disk_that_answers_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended, answers = threading.Event(), threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason: ended.set() or self.close())
    monkeypatch.setattr(watchdog, "POLL_S", 0.02)
    monkeypatch.setattr(watchdog, "unfinished_files", lambda run_dir: answers.wait(30) and set())
    watched = Watchdog(0, tmp_path, limits(0.2), Stop())
    watched.start_step(1)
    with watched.saving():
        assert ended.wait(10)
    answers.set()


def test_the_time_of_a_save_is_no_part_of_a_step(tmp_path: Path) -> None:
    watched = dog(tmp_path, 10)
    watched.start_step(1)
    since = watched._since
    with watched.saving():
        time.sleep(0.05)
    assert watched._since - since >= 0.05
    watched.start_step(2)
    assert watched._longest < 0.05


def test_long_steps_are_given_their_time_to_stop(tmp_path: Path) -> None:
    stop = Stop()
    watched = dog(tmp_path, 10_000, stop)
    watched.start_step(1)
    watched._longest = 100
    stop.request("SIGTERM")
    now = time.monotonic()
    assert watched._overdue(now + 490) is None
    assert "SIGTERM" in str(watched._overdue(now + 510))
