"""Other programs of a plan: one that ends with the plan, and what Ray's own start says when it fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

# A child that was asked to end is killed after this.
GRACE_S = 10.0


class Terminated(Exception):
    """SIGTERM or SIGHUP, while a child was running."""


def run(command: Sequence[str]) -> int:
    """Runs `command`; its exit code. What ends this process ends it too, with all that it has started.

    Terminated: SIGTERM or SIGHUP. KeyboardInterrupt: SIGINT.
    """

    def terminate(number: int, _: object) -> None:
        raise Terminated(signal.Signals(number).name)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, terminate) for number in numbers}
    # A session of its own, so that its process group is all that it has started.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


# Shows a file unless it is told that all went well before its stdin ends.
_SHOW = """
import os, sys
if sys.stdin.buffer.read() != b"fine":
    with open(sys.argv[1], "rb") as file:
        sys.stderr.buffer.write(file.read())
os.unlink(sys.argv[1])
"""


@contextmanager
def stderr_on_failure() -> Iterator[None]:
    """Holds back what this process, C code included, writes to stderr; shows it if the block raises or the process
    dies."""
    sys.stderr.flush()
    number, name = tempfile.mkstemp(prefix="stdit-stderr-")
    # A process of its own: after an abort nothing of this one runs any more.
    shower = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _SHOW, name], stdin=subprocess.PIPE, start_new_session=True, cwd=Path("/")
    )
    assert shower.stdin is not None
    saved = os.dup(2)
    os.dup2(number, 2)
    try:
        yield
        shower.stdin.write(b"fine")
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)
        os.close(number)
        shower.stdin.close()
        shower.wait()
