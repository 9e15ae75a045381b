"""Starts the ranks of one machine under DeepSpeed's launcher, and tells what became of the run.

DeepSpeed's own command, when it is signalled, kills ranks that are still saving after 30 seconds, and its exit code is
then not the run's (-2, -15, 1; 0 if its inner launcher was killed). Here signals go to the ranks alone, which take the
time that they need, and the exit code is what the run directory says.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from stdit.config import Config
from stdit.console import echo
from stdit.files import FolderLock
from stdit.training.checkpoint import STOPPED_FILE, is_done
from stdit.training.stopping import SIGNALS, STOPPED, die_with_parent

SCRIPT = Path(__file__).parents[1] / "train.py"
POLL_S = 0.2
# Ranks that have outlived their launcher are waited for as long as a save may take.
SAVE_S = 3600.0


def launch(ranks: int, arguments: Sequence[str], config: Config) -> int:
    """Runs stdit/train.py with `arguments`, which are of `config`, on `ranks` ranks of this machine.

    Exit code: 0 complete; 75 stopped, and the same command goes on; 2 invalid config; else an error. The first signal
    asks the ranks to save and end; the second ends everything at once.
    """
    before = _modified(config.run_dir / STOPPED_FILE)
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(_free_port()),
        str(SCRIPT), *arguments,
    ]  # fmt: skip
    # A session of its own: Ctrl-C in a terminal then reaches this process alone.
    # DeepSpeed's launcher would count Apple's GPU, of which there is one, and set its environment for the ranks.
    environment = {"DS_ACCELERATOR": "cpu", **os.environ} if sys.platform == "darwin" else None
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, preexec_fn=partial(die_with_parent, os.getpid())
    )
    signals: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in handlers.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, _: signals.append(number))
    try:
        sent = 0
        while (code := process.poll()) is None:
            if len(signals) > sent:
                sent = len(signals)
                _stop(process.pid) if sent == 1 else _kill(process.pid)
            time.sleep(POLL_S)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if code in (2, STOPPED):
        return code
    if signals and code != 1:  # else a rank's own error: a last save that failed
        # Asked while there were no ranks, or while they began, it ended by a signal.
        code = STOPPED
    return _outcome(config, before, code or 1)


def _stop(launcher: int) -> None:
    """Asks the ranks to save and end; the launcher too, if it has none yet."""
    echo("stopping after a checkpoint; once more to stop at once", file=sys.stderr, flush=True)
    if os.path.lexists("/proc/self") and os.readlink("/proc/self") != str(os.getpid()):
        # /proc is another PID namespace's: no rank can be told. This ends the launchers, whose death the ranks notice,
        # too.
        os.killpg(launcher, signal.SIGUSR1)
        return
    ranks = _ranks(launcher)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank, signal.SIGTERM)
    if not ranks:
        _kill(launcher)


def _kill(launcher: int) -> None:
    os.killpg(launcher, signal.SIGKILL)


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks below `launcher`."""
    import psutil

    found = []
    for process in psutil.Process(launcher).children(recursive=True):
        try:
            if any(part.startswith("--local_rank=") for part in process.cmdline()):
                found.append(process.pid)
        except psutil.Error:  # ended meanwhile
            continue
    return found


def _outcome(config: Config, before: int | None, code: int) -> int:
    """What the run directory says once no rank holds its lock, else `code`. before: when it last said that the run was
    stopped."""
    run_dir = config.run_dir
    if (run_dir / ".lock").is_file():
        lock = FolderLock(run_dir)
        with contextlib.suppress(BlockingIOError):
            lock.acquire(SAVE_S)
        lock.release()
    if _modified(run_dir / STOPPED_FILE) not in (None, before):
        return STOPPED
    return 0 if is_done(run_dir, config.train.steps) else code


def _modified(file: Path) -> int | None:
    """Modification time in nanoseconds; None if there is no such file."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
