"""A rank whose connection to another one has ended: whether that one failed, which says why and ends the run, or is
gone, and the run goes on by the same command.

    failed-rank-N.txt     in the run directory: rank N ended by an error of its own, this one; gone when the run is
                          started again
"""

from __future__ import annotations

import re
import time
import traceback
from contextlib import suppress
from pathlib import Path

from stdit.training.run_dir import report_file, reports

# What gloo, whose errors have no type, and NCCL say.
_LOST = (
    re.compile(r"gloo/transport/\S+ ([^\n]*?(?:closed by peer|reset by peer|Broken pipe|imed out|unreachable|No route)[^\n]*?)(?:\. This|\n|$)"),
    re.compile(r"(ncclRemoteError[^\n]*)"),
)  # fmt: skip
# For another rank's record of its failure, which it writes before it ends.
RECORD_S = 3.0
POLL_S = 0.2


class LostRank(RuntimeError):
    """The connection to another rank has ended while the run trained."""


def lost_connection(error: BaseException | None) -> str | None:
    """What a collective said of a connection that has ended, if that is what caused `error`."""
    from torch.distributed import DistNetworkError  # late: an error may come before torch is there

    while error is not None:
        if isinstance(error, DistNetworkError):
            return str(error).partition("\n")[0]
        found = [match[1] for pattern in _LOST if (match := pattern.search(str(error)))]
        if found and isinstance(error, RuntimeError):
            return found[0]
        error = error.__cause__
    return None


def record_failure(run_dir: Path, rank: int, error: Exception) -> None:
    """Writes for the other ranks that this one ends by `error`, if the folder is a run's."""
    with suppress(OSError):
        if path := report_file(run_dir, "failed", rank):
            last = traceback.format_exception_only(error)[-1].strip()
            path.write_text(f"{last}\n\n{''.join(traceback.format_exception(error))}")


def find_failure(run_dir: Path, rank: int) -> str | None:
    """Which other rank has failed, and how; waits for its record. None: there is none."""
    until = time.monotonic() + RECORD_S
    while True:
        with suppress(OSError):
            for other in sorted(reports(run_dir, "failed") - {rank}):
                if path := report_file(run_dir, "failed", other):
                    return f"rank {other} failed: {path.read_text().splitlines()[0]}"
        if time.monotonic() > until:
            return None
        time.sleep(POLL_S)
