"""Ranks: how a process learns which it is, what the ranks agree on, and how a run is asked to stop."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Exit code of a run that was asked to stop and has saved where it was: run the same command again.
STOPPED = 75
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and speaks."""
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums over all ranks, of each value (float64; also an agreement: every rank has the same result)."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def agree(self, on_first: Callable[[], T]) -> T:
        """What `on_first` returns, or raises, on rank 0: the same on every rank. For what only one rank may look up."""
        if self.size == 1:
            return on_first()
        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = on_first()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=0, device=self.device)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def joined(self, part: Tensor) -> Tensor:
        """Every rank's `part` (n, …), all of one shape, one after another by rank: (ranks · n, …)."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def leave() -> None:
    """Takes the process group down, after the last rank has come: a process that ends with it standing may abort."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """How many ranks there will be, before the process group exists (launchers say it in the environment)."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complete_environment() -> None:
    """What a launcher would have set, for plain `python stdit/train.py`: one rank on this machine."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        if os.environ["WORLD_SIZE"] != "1":
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but MASTER_PORT is not set; ranks need one port that all know"
            )
        os.environ["MASTER_PORT"] = str(free_port())


def share_cores() -> None:
    """Gives this rank its share of the machine's cores, unless OMP_NUM_THREADS says how many it takes."""
    if "OMP_NUM_THREADS" not in os.environ:
        here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", os.environ.get("WORLD_SIZE", 1))))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def join(initialise: Callable[[], None], accelerator: str) -> Ranks:
    """The ranks of this run. A process group that stands already (Ray Train's) is adopted; else `initialise` makes one.

    accelerator: "cuda" or "cpu".
    """
    if not dist.is_initialized():
        complete_environment()
        share_cores()
        initialise()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(accelerator, local_rank) if accelerator == "cuda" else torch.device(accelerator)
    if accelerator == "cuda":
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device)


# How long a rank waits for another: saving large checkpoints and hashing them takes rank 0 alone some minutes.
TIMEOUT = timedelta(minutes=60)


class Stop:
    """A request to stop, from a signal or from the death of the launcher. Only a flag: ranks get signals one after
    another, so that whoever acts at once (say, saves together with the others) waits for ranks that do not come."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def __bool__(self) -> bool:
        return self._event.is_set()

    def request(self, reason: str) -> None:
        if not self._event.is_set():
            self.reason = reason
            self._event.set()

    def listen(self) -> Stop:
        """Sets itself on SIGTERM, SIGINT or SIGUSR1 (a batch system's warning), and when the launcher is gone. Main
        thread only."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda n, _: self.request(signal.Signals(n).name))
        if "LOCAL_RANK" not in os.environ:
            # No launcher: the parent is a shell, which may go (nohup).
            return self
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        threading.Thread(target=self._watch, args=(os.getppid(), _launcher_of_launcher()), daemon=True).start()
        return self

    def _watch(self, parent: int, above: int | None) -> None:
        while not self:
            time.sleep(0.5)
            if os.getppid() != parent:
                self.request("the process that started this one is gone")
            elif above is not None and parent_of(parent) != above:
                # Killing `deepspeed` leaves its inner launcher and the ranks behind.
                self.request("the deepspeed command is gone")


def parent_of(process: int) -> int | None:
    """The parent of `process`, or None where that can't be known."""
    try:
        # The name, in parentheses, may hold spaces and parentheses itself.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None


def _launcher_of_launcher() -> int | None:
    """Where DeepSpeed's inner launcher is this process's parent, its own parent: the `deepspeed` command."""
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return parent_of(parent) if "deepspeed.launcher.launch" in command else None
