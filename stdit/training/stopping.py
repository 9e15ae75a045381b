"""Requests to stop a run: signals, and the launcher's death. Imports nothing heavy: a process listens from its first
moment.

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
from collections.abc import Sequence
from pathlib import Path

# Exit code of a run that was stopped or ended itself: the same command goes on.
STOPPED = 75
# SIGUSR1: batch systems' warning. SIGHUP: the terminal is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1
POLL_S = 0.5
_PARENT = os.getppid()
# DeepSpeed's programs: the command, and the inner launcher that it starts on each host, which starts the ranks.
DEEPSPEED = ("deepspeed", "ds", "deepspeed.pt", "deepspeed.launcher.runner")
INNER_LAUNCHER = "deepspeed.launcher.launch"
# Programs that start ranks by torch's elastic agent, which sets TORCHELASTIC_RUN_ID.
ELASTIC = ("torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate-launch")


class Stop:
    """A request to stop. Only a flag: requests reach ranks at different times, and a rank that acted on its own would
    leave the others waiting in a collective. Before training has begun (`start_training`) a request ends the
    process."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._save = threading.Event()
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

    def request_checkpoint(self) -> None:
        """Requests a checkpoint at the end of the step, after which training goes on."""
        self._save.set()

    def takes_checkpoint(self) -> bool:
        """Whether a checkpoint was requested since the last call."""
        requested = self._save.is_set()
        self._save.clear()
        return requested

    def wait(self, seconds: float) -> bool:
        """Waits up to `seconds` for a request; whether there is one."""
        return self._event.wait(seconds)

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
        above = ancestors()
        elastic = "TORCHELASTIC_RUN_ID" in os.environ
        launchers, missing = find_launchers(sys.argv, [_command(process) for process in above], elastic)
        if os.getppid() != _PARENT:
            missing = "the process that started this one"
        if missing:
            self.request(f"{missing} was gone from the start")
        while not self:
            time.sleep(POLL_S)
            with contextlib.suppress(OSError):  # of files, this process may have too many open
                if os.getppid() != _PARENT:
                    self.request("the process that started this one is gone")
                elif ancestors()[:launchers] != above[:launchers]:
                    # Killing `deepspeed` leaves its inner launcher and the ranks behind.
                    self.request("the deepspeed command is gone")


def parent_of(process: int | str) -> int | None:
    """Parent process id of `process` ("self": of this one), both as /proc numbers them; None: there is no such process,
    or no /proc."""
    try:
        # The name, in parentheses, may hold spaces and parentheses itself.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
        return None


def ancestors() -> tuple[int, ...]:
    """Process ids of this process's parent, of its parent and so on, as /proc numbers them, which may be of another
    namespace than os.getppid()'s (`unshare --pid`). () without /proc."""
    found: list[int] = []
    process: int | str = "self"
    while parent := parent_of(process):
        found.append(parent)
        process = parent
    return tuple(found)


def find_launchers(
    arguments: Sequence[str], commands: Sequence[Sequence[str]], elastic: bool = False
) -> tuple[int, str | None]:
    """How many of a rank's ancestors are its launchers, and which is missing (None: none, or launchers that are not
    known).

    Who adopts orphans is any program (a container's init, a user's systemd, any subreaper), so that a launcher is
    missed where it has to be. arguments: of this process. commands: command lines of the ancestors, the nearest first;
    () where none can be told. elastic: torch's elastic agent has started this process.
    """
    if not commands:
        return 1, None
    if not any(argument.startswith("--local_rank=") for argument in arguments):  # DeepSpeed's inner launcher adds it
        orphaned = elastic and not any(_runs(command, *ELASTIC) for command in commands)
        return 1, "the process that started this one" if orphaned else None
    inner = next((i for i, command in enumerate(commands) if _runs(command, INNER_LAUNCHER)), None)
    if inner is None:
        return 1, "the process that started this one"
    outer = next((i for i, command in enumerate(commands) if i > inner and _runs(command, *DEEPSPEED)), None)
    if outer is not None:
        return outer + 1, None
    several_hosts = any(argument.startswith("--node_rank") for argument in commands[inner])
    return inner + 1, None if several_hosts else "the deepspeed command"  # it may be on another host


def _runs(command: Sequence[str], *programs: str) -> bool:
    """Whether a command line is Python's with one of `programs`, a script or a module: an init has that of what it
    starts."""
    program = Path(command[0]).name if command else ""
    is_python = program.startswith("python") or program == Path(sys.executable).name
    return is_python and any(Path(argument).name in programs for argument in command[1:])


def _command(process: int) -> list[str]:
    """Command line of `process`; [] if unknown: of another user's, or gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def die_with_parent(parent: int) -> None:
    """In a child before exec: SIGTERM when `parent`, its parent, dies, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # died before it could be told
            os.kill(os.getpid(), signal.SIGTERM)


def _say(line: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") != "0":  # a host's first says it
        return
    rank = os.environ.get("RANK")
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, (f"[rank {rank}] {line}\n" if rank else f"{line}\n").encode())
