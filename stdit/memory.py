"""Memory of this machine and of its GPUs, against which estimates are held before anything is allocated."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stdit.config import ConfigError

if TYPE_CHECKING:
    import torch

# Where the kernel says how much memory a container may take (cgroups 2 and 1).
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def host_memory() -> int:
    """Bytes of memory that this process may use."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):  # names that this system does not know
        import psutil

        found = int(psutil.virtual_memory().total)
    for path in CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:  # not in a container of this kind
            continue
        found = min(found, int(text)) if text.isdigit() else found
    return found


def device_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or that this process may use of the host's."""
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_properties(device).total_memory
    return host_memory()


def check_fits(what: str, needed: int, remedy: str = "", processes: int = 1) -> None:
    """ConfigError: `needed` bytes, of each of `processes`, are more than this machine's memory. what: the message's
    beginning, with its verb; remedy: its end."""
    available = host_memory()
    if needed * processes > available:
        several = f" for {processes} ranks" if processes > 1 else ""
        raise ConfigError(f"{what} {gib(needed)}; this machine has {gib(available)}{several}{remedy and f'. {remedy}'}")


def gib(size: float) -> str:
    """Bytes for messages: 1,234.5 GiB."""
    return f"{size / 2**30:,.1f} GiB"
