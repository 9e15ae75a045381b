"""A rank that hangs says so and ends; so does one that was asked to stop and waits for others."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from stdit.training import watchdog
from stdit.training.checkpoint import unfinished_files
from stdit.training.stopping import STOPPED, Stop
from stdit.training.watchdog import Watchdog
from tests.support.paths import ROOT

# A thread that waits where Python runs no signal handler, as in a collective; the names are those of train().
HANGS = """
import ctypes, os, sys, threading
from pathlib import Path
from stdit.training import watchdog
from stdit.training.checkpoint import unfinished_files
from stdit.training.stopping import Stop
watchdog.STOP_GRACE_S = 0.5
class Engine:
    def step(self):
        while True:
            ctypes.CDLL(None).pause()
stop = Stop().listen()
stop.start_training()
dog = watchdog.Watchdog(3, Path(sys.argv[1]), float(sys.argv[2]), stop)
dog.start_step(17)
print("ready", flush=True)
Engine().step()
"""


def hang(folder: Path, limit_s: float, signal: int | None) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(folder), str(limit_s)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if signal is not None:
        os.kill(process.pid, signal)
    _, said = process.communicate(timeout=60)
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


def dog(folder: Path, limit_s: float, stop: Stop | None = None) -> Watchdog:
    found = Watchdog(0, folder, limit_s, Stop() if stop is None else stop)
    found.close()
    return found


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
    watched = Watchdog(0, tmp_path, 1.0, Stop())
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
    watched = Watchdog(0, tmp_path, 0.2, Stop())
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
