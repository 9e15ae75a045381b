"""Ranks: process group, and collectives on plain values."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.config import ConfigError
from stdit.cores import available_cores, local_ranks
from stdit.models.sequence_parallel import SequenceParallel

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process within the process group."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    # Ranks that share each clip's tokens (train.sequence_parallel), neighbours, which read the same samples.
    sequence_parallel: int = 1

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different samples."""
        return self.rank // self.sequence_parallel

    @property
    def sequence_rank(self) -> int:
        """This rank's number among those that share its clips' tokens."""
        return self.rank % self.sequence_parallel

    @property
    def data_size(self) -> int:
        """Number of ranks that read different samples."""
        return self.size // self.sequence_parallel

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    def all_reduce(self, *values: float) -> list[float]:
        """Sum of each value over all ranks, in float64; every rank gets the same."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def broadcast(self, compute: Callable[[], T]) -> T:
        """Runs `compute` on rank 0 and returns its result, or raises its error, on every rank, marked as `shared`: rank
        0 says it for all."""
        if self.size == 1:
            return compute()
        result: list[Any] = [None, None]  # value, error
        if self.is_main:
            try:
                result[0] = compute()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, device=self.device)
        if result[1] is not None:
            setattr(result[1], "shared", True)  # noqa: B010  (pyright knows no such attribute)
            raise result[1]
        return result[0]

    def all_gather(self, part: Tensor) -> Tensor:
        """Concatenates every data-parallel rank's `part` (n, …), all of one shape, by rank: (data_size · n, …)."""
        if self.size == 1:
            return part
        parts = [torch.empty_like(part) for _ in range(self.size)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts[:: self.sequence_parallel])

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def destroy_process_group() -> None:
    """Destroys the process group once all ranks are here, for which END_WAIT is waited: a process that exits with one
    may abort."""
    if dist.is_initialized():
        set_timeout(END_WAIT)
        with suppress(RuntimeError):  # a rank that was stopped, or died; the run is complete
            dist.barrier()
        dist.destroy_process_group()


def world_size() -> int:
    """Number of ranks; before the process group exists, from the launcher's environment."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def complete_environment() -> None:
    """Sets what a launcher sets, for plain `python stdit/train.py`: one rank on this machine."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        if os.environ["WORLD_SIZE"] != "1":
            raise ValueError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but MASTER_PORT is not set; all ranks need the same port"
            )
        os.environ["MASTER_PORT"] = "0"  # the system picks one when it is bound: no other process can take it before


def limit_threads() -> None:
    """Limits torch's threads to this rank's share of the cores, unless OMP_NUM_THREADS is set."""
    if "OMP_NUM_THREADS" not in os.environ:
        local = local_ranks() or int(os.environ.get("WORLD_SIZE", 1))
        torch.set_num_threads(max(1, available_cores() // local))


def choose_interface() -> None:
    """Has gloo use the interface by which this host and MASTER_ADDR reach each other, unless GLOO_SOCKET_IFNAME names
    one.

    By itself it takes the address that the host's name has here, in /etc/hosts often a loopback one (Debian's
    127.0.1.1), which no other host can connect to. ConfigError: MASTER_ADDR is one here, but there are several hosts.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or local_ranks() == int(os.environ["WORLD_SIZE"]):
        return
    master = os.environ["MASTER_ADDR"]
    try:
        family, _, _, _, target = socket.getaddrinfo(master, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing
            address = str(probe.getsockname()[0])
    except OSError:  # unknown, or no route: connecting says so
        return
    if not ip_address(address).is_loopback:
        use_interface_of(address)
    elif local_ranks() is not None:
        raise ConfigError(
            f"MASTER_ADDR {master} is {address} on this host, where the other hosts' ranks are not; "
            "set it to an address that all hosts reach, or GLOO_SOCKET_IFNAME to the network's interface on each host"
        )


def use_interface_of(address: str) -> None:
    """Has gloo use the interface of this host that has `address`, unless GLOO_SOCKET_IFNAME names one."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def init_process_group(initialise: Callable[[], None], accelerator: str, sequence_parallel: int = 1) -> Ranks:
    """Ranks of this run: of an existing process group (Ray Train's), else of one that `initialise` creates.

    accelerator: "cuda" or "cpu". sequence_parallel: must divide the number of ranks.
    """
    if not dist.is_initialized():
        complete_environment()
        limit_threads()
        if accelerator == "cpu":
            choose_interface()
        initialise()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(accelerator, local_rank) if accelerator == "cuda" else torch.device(accelerator)
    if accelerator == "cuda":
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), local_rank, device, sequence_parallel)


def sequence_group(ranks: Ranks) -> SequenceParallel | None:
    """This rank's group of neighbours that share a clip's tokens; None where each has its own. Collective."""
    size = ranks.sequence_parallel
    if size == 1:
        return None
    assert dist.group.WORLD is not None
    group = _neighbours(dist.group.WORLD, size)
    return SequenceParallel(group.group_name, ranks.sequence_rank, size)


@lru_cache(maxsize=8)
def _neighbours(world: dist.ProcessGroup, size: int) -> dist.ProcessGroup:
    """The group of `size` consecutive ranks that this rank is in; one for all runs in a process group."""
    group, _ = dist.new_subgroups(size, group=world, timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


# Rank 0 alone writes and hashes checkpoints, which takes minutes for large models; the others wait in a collective.
# Steps have a limit of their own (stdit.training.watchdog).
TIMEOUT = timedelta(minutes=60)
# For ranks that have completed their run.
END_WAIT = timedelta(seconds=60)


def set_timeout(timeout: timedelta) -> None:
    """Sets the time-out of every process group there is: those that libraries create have torch's default."""
    from torch.distributed import distributed_c10d

    for group in list(distributed_c10d._world.pg_map):
        if dist.get_rank(group) >= 0:
            distributed_c10d._set_pg_timeout(timeout, group)
