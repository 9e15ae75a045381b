"""Sampling each video over several ranks.

    torchrun --nproc_per_node 4 -m stdit.generate --run … --prompts … --out …

Every rank runs the same program on the same inputs; the transformer's tokens are divided among them
(stdit.models.sequence_parallel), and each has the whole result. Rank 0 alone writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from stdit.training.distributed import TIMEOUT, Ranks, destroy_process_group, init_process_group, world_size


@contextmanager
def launched_ranks(device: str | None = None) -> Iterator[Ranks]:
    """The ranks of a launcher (torchrun, deepspeed), which all share each video; without one, this process alone.

    device: "cpu" or "cuda"; None: cuda where there is one. The process group ends with the context, unless it was there
    before.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (size := world_size()) == 1:
        yield Ranks(0, 1, 0, torch.device(kind))
        return
    existed = dist.is_initialized()
    backend = "nccl" if kind == "cuda" else "gloo"
    yield init_process_group(lambda: dist.init_process_group(backend, timeout=TIMEOUT), kind, size)
    if not existed:  # after an error the others may never come
        destroy_process_group()
