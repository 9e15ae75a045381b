"""Who is asked to stop a run by the launcher's death: any program may adopt the ranks, in any PID namespace. What a
launch that was stopped, or whose ranks died, ends with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stdit.training import launcher, stopping
from stdit.training.stopping import STOPPED, ancestors, die_with_parent, find_launchers
from tests.support.paths import ROOT
from tests.support.runs import make_run, model_config

RANK = ["stdit/train.py", "--local_rank=0", "--config", "x"]
INNER = ["/usr/bin/python3.11", "-u", "-m", "deepspeed.launcher.launch", "--world_info=e30=", *RANK]
COMMAND = ["/usr/bin/python3", "/usr/bin/deepspeed", "--num_gpus", "2", *RANK]
MODULE = [sys.executable, "-m", "deepspeed.launcher.runner", *RANK]
SHELL = ["bash", "-c", "deepspeed stdit/train.py"]
# Programs that adopt: none of them is told by its name.
ADOPTERS = [
    ["/sbin/init"], ["/usr/bin/tini", "--", "deepspeed", *RANK], ["/sbin/docker-init", "--", *INNER], ["/lib/systemd/systemd", "--user"],
    ["python3", "service.py"], SHELL, ["/usr/bin/s6-svscan"], [],
]  # fmt: skip


@pytest.mark.parametrize(
    ("commands", "launchers"),
    [
        ([INNER, COMMAND, SHELL], 2),
        ([INNER, MODULE], 2),
        ([["nsys", "profile"], INNER, ["timeout", "9"], COMMAND], 4),
        ([[*INNER, "--node_rank=1"], ["sshd"]], 1),
        ([[*INNER, "--node_rank=1"], COMMAND, SHELL], 2),  # --no_ssh
    ],
)
def test_launchers_are_found_among_the_ancestors(commands: list[list[str]], launchers: int) -> None:
    assert find_launchers(RANK, commands) == (launchers, None)


@pytest.mark.parametrize("adopter", ADOPTERS, ids=lambda command: Path(command[0]).name if command else "unknown")
def test_a_launcher_that_has_died_is_missed_whoever_adopts(adopter: list[str]) -> None:
    assert find_launchers(RANK, [adopter, ["/sbin/init"]])[1] == "the process that started this one"
    assert find_launchers(RANK, [INNER, adopter, ["/sbin/init"]])[1] == "the deepspeed command"


@pytest.mark.parametrize("parent", [*ADOPTERS, ["python", "torchrun", *RANK], ["slurmstepd: [7.0]"]], ids=str)
def test_ranks_of_other_launchers_may_have_any_parent(parent: list[str]) -> None:
    assert find_launchers(["stdit/train.py"], [parent]) == (1, None)
    assert find_launchers(RANK, []) == (1, None)  # no /proc


@pytest.mark.parametrize("adopter", ADOPTERS, ids=lambda command: Path(command[0]).name if command else "unknown")
def test_an_elastic_agent_that_has_died_is_missed_whoever_adopts(adopter: list[str]) -> None:
    rank, found = ["stdit/train.py"], (1, "the process that started this one")
    assert find_launchers(rank, [adopter, ["/sbin/init"]], elastic=True) == found
    for agent in (["/usr/bin/torchrun"], ["-m", "torch.distributed.run"], ["/usr/bin/accelerate", "launch"]):
        command = ["/usr/bin/python3", *agent, *rank]
        assert find_launchers(rank, [command, adopter], elastic=True) == (1, None)
        assert find_launchers(rank, [SHELL, command], elastic=True) == (1, None)  # torchrun --no-python
    assert find_launchers(rank, [], elastic=True) == (1, None)


def test_ancestors_end_with_the_first_process() -> None:
    found = ancestors()
    assert found[0] == os.getppid()
    assert len(set(found)) == len(found)
    assert stopping.parent_of(found[-1]) == 0


def test_a_child_of_a_parent_that_died_before_it_was_told_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(stopping.ctypes, "CDLL", lambda _: type("C", (), {"prctl": lambda *_: 0})())
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    die_with_parent(os.getppid())
    assert not sent
    die_with_parent(os.getppid() + 1)
    assert sent == [(os.getpid(), signal.SIGTERM)]


# A process that adopts (PID 1 of a namespace, or a subreaper) starts a launcher, which starts a rank and dies: before
# the rank has imported anything of ours, or when it trains. The rank's exit code is that of the whole.
ADOPTS = """
import ctypes, os, subprocess, sys
ctypes.CDLL(None).prctl(36, 1)
launcher = subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]])
while True:
    process, status = os.wait()
    if process != launcher.pid:
        os._exit(os.waitstatus_to_exitcode(status))
"""
LAUNCHES = """
import os, subprocess, sys
ours, theirs = os.pipe()
subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:], str(theirs)], pass_fds=[theirs])
os.close(theirs)
os.read(ours, 1)
os._exit(0)
"""
TRAINS = """
import os, sys, time
when, *_, ready = sys.argv[1:]
parent = os.getppid()
if when == "before":
    os.write(int(ready), b"x")
    while os.getppid() == parent:
        time.sleep(0.01)
from stdit.training import launcher, stopping
stopping.POLL_S = 0.05
stopping.ctypes.CDLL = lambda _: type("C", (), {"prctl": lambda *_: 0})()  # by what it sees alone
stop = stopping.Stop().listen()
if when == "later":
    time.sleep(0.3)
    stop.start_training()
    assert not stop, stop.reason
    os.write(int(ready), b"x")
if when == "before":
    time.sleep(10)  # it is ended meanwhile
assert stop.wait(10)
print(stop.reason, file=sys.stderr)
os._exit(3)
"""


@cache
def can_unshare() -> bool:
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "--fork", "--pid", "true"]).returncode


@pytest.mark.skipif(sys.platform != "linux", reason="adoption is Linux's")
@pytest.mark.parametrize("namespace", [False, True])
@pytest.mark.parametrize("when", ["before", "later"])
def test_the_launchers_death_is_noticed_under_any_adopter(when: str, namespace: bool) -> None:
    if namespace and not can_unshare():
        pytest.skip("needs unshare --pid")
    # Without --mount-proc: /proc is of the outer namespace.
    prefix = ["unshare", "--fork", "--pid", "--kill-child"] if namespace else []
    mark = ["--local_rank=0"] if when == "before" else []
    done = subprocess.run(
        [*prefix, sys.executable, "-c", ADOPTS, LAUNCHES, TRAINS, when, *mark],
        cwd=ROOT, env={**os.environ, "LOCAL_RANK": "0", "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    if when == "before":
        assert done.returncode == STOPPED, done.stderr
        assert (
            "stopped before training began (the process that started this one was gone from the start)" in done.stderr
        )
    else:
        assert (done.returncode, done.stderr) == (3, "the process that started this one is gone\n")


def test_where_ranks_cannot_be_told_their_launchers_are_ended_by_a_signal_that_ranks_save_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "readlink", lambda path: "1")  # /proc is of another PID namespace
    monkeypatch.setattr(os, "killpg", lambda *call: sent.append(call))
    launcher._stop(7)
    assert sent == [(7, signal.SIGUSR1)]
    assert signal.SIGUSR1 in stopping.SIGNALS


def config(run_dir: Path, steps: int) -> Any:
    return SimpleNamespace(run_dir=run_dir, train=SimpleNamespace(steps=steps))


@pytest.mark.parametrize(
    ("ended", "signals", "code"),
    [
        (-9, 1, STOPPED),  # no rank there yet: the launcher was ended
        (-9, 2, STOPPED),
        (241, 1, STOPPED),  # a rank that did not listen yet
        (1, 1, 1),  # a rank's own error: its last save failed
        (-9, 0, -9),
        (1, 0, 1),
    ],
)
def test_a_launch_that_was_asked_to_stop_ends_with_75_unless_a_rank_failed(
    ended: int, signals: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[int] = []

    class Launcher:
        pid = 7
        left = signals

        def poll(self) -> int | None:
            if not self.left:
                return ended
            self.left -= 1
            os.kill(os.getpid(), signal.SIGTERM)
            return None

    monkeypatch.setattr(launcher.subprocess, "Popen", lambda *_, **__: Launcher())
    monkeypatch.setattr(launcher, "POLL_S", 0.01)
    monkeypatch.setattr(launcher, "_ranks", lambda _: [])
    monkeypatch.setattr(os, "killpg", lambda pid, _: killed.append(pid))
    before = signal.getsignal(signal.SIGTERM)
    assert launcher.launch(2, [], config(tmp_path, 20)) == code
    assert killed == [7] * signals
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_launch_is_complete_by_done_json_of_its_last_step_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model_config(), step=20)
    assert launcher._outcome(config(run, 20), None, 9) == 9
    (run / "done.json").write_text(json.dumps({"step": 20, "samples_seen": 160, "checkpoint": "step-00000020"}))
    assert [launcher._outcome(config(run, steps), None, 9) for steps in (10, 20, 40)] == [0, 0, 9]
    (run / "done.json").write_text("{")
    assert launcher._outcome(config(run, 20), None, 9) == 9
