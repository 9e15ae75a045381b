"""CPU cores of this machine that this process may use, by which threads, worker processes and Ray's CPUs are counted,
and the ranks that share the machine."""

from __future__ import annotations

import os
from pathlib import Path

# Where the kernel says how much CPU time a container may take: "quota period" in one file (cgroup 2), or one each
# (cgroup 1).
CGROUP_QUOTAS = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def available_cores() -> int:
    """Cores of this process's affinity mask, where the system has one (macOS has none), and no more than its
    container's quota of CPU time, rounded up. At least 1."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota() or allowed))


def local_ranks() -> int | None:
    """Ranks of this host, by torchrun, Ray and SLURM's script (LOCAL_WORLD_SIZE) or DeepSpeed's launcher (LOCAL_SIZE).
    None: no launcher has said it."""
    said = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return None if said is None else int(said)


def _quota() -> int | None:
    """Cores whose time the container may take; None: as many as there are."""
    for files in CGROUP_QUOTAS:
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
        except (OSError, ValueError):  # not there, or not of this form
            continue
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1: no limit
            return -(-int(quota) // int(period))
    return None
