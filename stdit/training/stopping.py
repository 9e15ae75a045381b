"""Requests to stop a run: signals, and the launcher's death. Imports nothing heavy: a process listens from its first moment.

The process that launched this one is looked at when this module is imported, since it may be gone before torch is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

# Exit code of a run that was stopped or ended itself: the same command goes on.
STOPPED = 75
# SIGUSR1: batch systems' warning. SIGHUP: the terminal is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
POLL_S = 0.5
# Programs that adopt processes whose parent has died.
ADOPTERS = ("init", "systemd", "tini", "dumb-init", "docker-init", "catatonit")
_PARENT = os.getppid()


class Stop:
    """A request to stop. Only a flag: requests reach ranks at different times, and a rank that acted on its own would
    leave the others waiting in a collective. Before training has begun (`start_training`) a request ends the process."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._training = threading.Event()
        self._listens = False
        self.reason = ""
        # time.monotonic() of the request.
        self.since: float | None = None

    def __bool__(self) -> bool:
        return self._event.is_set()

    def request(self, reason: str) -> None:
        """Requests a stop; the first reason counts."""
        if not self._event.is_set():
            self.reason, self.since = reason, time.monotonic()
            self._event.set()
        if self._listens and not self._training.is_set():
            # Nothing to save; and a rank that went on would wait for others, on a port that the next launch needs.
            _say(f"stopped before training began ({reason}); the same command starts again")
            os._exit(STOPPED)

    def start_training(self) -> None:
        """From now on a request is met at the end of a step, with a checkpoint."""
        self._training.set()

    def listen(self) -> Stop:
        """Requests a stop on SIGNALS and on the launcher's death. Main thread only.

        Signals are read by a thread: Python's own handlers do not run while the main thread waits in a collective.
        """
        self._listens = True
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._sockets = reader, writer
        for number in SIGNALS:
            # nohup has SIGHUP ignored, and so it stays.
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: None)
        threading.Thread(target=self._read_signals, args=(reader,), daemon=True, name="signals").start()
        if "LOCAL_RANK" in os.environ:  # else the parent is a shell, which may exit (nohup)
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            threading.Thread(target=self._watch_launcher, daemon=True, name="launcher").start()
        return self

    def _read_signals(self, reader: socket.socket) -> None:
        while numbers := reader.recv(64):
            for number in numbers:
                if number in SIGNALS:
                    self.request(signal.Signals(number).name)

    def _watch_launcher(self) -> None:
        above = _deepspeed_command(_PARENT)
        if _has_adopted(_PARENT):
            self.request("the process that started this one was gone from the start")
        elif above is not None and _has_adopted(above):
            self.request("the deepspeed command was gone from the start")
        while not self:
            time.sleep(POLL_S)
            if os.getppid() != _PARENT:
                self.request("the process that started this one is gone")
            elif above is not None and parent_of(_PARENT) != above:
                # Killing `deepspeed` leaves its inner launcher and the ranks behind.
                self.request("the deepspeed command is gone")


def parent_of(process: int) -> int | None:
    """Parent process id of `process`; None if unknown."""
    try:
        # The name, in parentheses, may hold spaces and parentheses itself.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _command(process: int) -> list[str]:
    """Command line of `process`; [] if unknown."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _deepspeed_command(launcher: int) -> int | None:
    """Process id of the `deepspeed` command, where `launcher` is its inner launcher."""
    return parent_of(launcher) if "deepspeed.launcher.launch" in _command(launcher) else None


def _has_adopted(parent: int) -> bool:
    """Whether `parent` adopted this process: it is an init, and its command is no launcher's."""
    command = _command(parent)
    if any(name in part for part in command for name in ("train.py", "torchrun", "deepspeed", "torch.distributed")):
        return False
    return parent == 1 or (bool(command) and Path(command[0]).name in ADOPTERS)


def die_with_parent() -> None:
    """In a child before exec: SIGTERM when the parent dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _say(line: str) -> None:
    rank = os.environ.get("RANK")
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, (f"[rank {rank}] {line}\n" if rank else f"{line}\n").encode())
