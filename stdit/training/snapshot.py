"""Snapshots of a rank's states in host memory, and full weights from the partitions of all ranks.

Nothing here communicates: a checkpoint is written from a snapshot while training goes on.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class HostCopies:
    """Copies nested states (dicts, lists, tuples of tensors and plain values) into host memory, pinned for a GPU's
    tensors.

    Memory is kept for the next snapshot: to allocate it, pinned memory above all, takes longer than to copy. Tensors
    that share a storage share its copy, so that torch.save writes the same bytes.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        if pinned:
            pin_exact_sizes()
        self._free: dict[int, list[Tensor]] = defaultdict(list)
        self._used: list[Tensor] = []
        # By the storage's identity; storages are held, so that no other one gets it.
        self._copied: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the last snapshot."""
        return sum(buffer.numel() for buffer in self._used)

    def begin(self) -> None:
        """Begins another snapshot in the memory of the last one."""
        for buffer in self._used:
            self._free[buffer.numel()].append(buffer)
        self._used.clear()

    @torch.no_grad()
    def copy(self, state: Any) -> Any:
        """A deep copy of `state`. A GPU's tensors are copied when `end` returns."""
        memo: dict[int, Any] = {id(tensor): self._copy(tensor) for tensor in _tensors(state)}
        return copy.deepcopy(state, memo)

    def end(self) -> None:
        """Waits for the copies; memory that this snapshot did not need is freed."""
        if self._pinned:
            torch.cuda.synchronize()
        self._copied.clear()
        self._free.clear()

    def _copy(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._copied:
            self._copied[key] = storage, self._copy_storage(storage)
        found = torch.empty(0, dtype=tensor.dtype)
        found.set_(self._copied[key][1], tensor.storage_offset(), tensor.size(), tensor.stride())
        if isinstance(tensor, nn.Parameter):
            found = nn.Parameter(found, tensor.requires_grad)
        found.requires_grad_(tensor.requires_grad)
        for name, value in tensor.__dict__.items():  # DeepSpeed's own attributes, which torch.save writes
            setattr(found, name, copy.deepcopy(value))
        return found

    def _copy_storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        size = storage.nbytes()
        if not size:
            return torch.UntypedStorage(0)
        free = self._free[size]
        buffer = free.pop() if free else torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        self._used.append(buffer)
        source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        buffer.copy_(source, non_blocking=self._pinned)
        return buffer.untyped_storage()


def pin_exact_sizes() -> None:
    """Sets torch's allocator of pinned memory to take what is asked for, and to free it: by default it rounds every
    size up to a power of two (17 GiB to 32) and keeps what is freed. Settings of PYTORCH_ALLOC_CONF stay, and win."""
    settings = torch._C._accelerator_getAllocatorSettings()
    if "pinned_max" not in settings:
        # In MB: smaller ones are still rounded and kept. A torch that does not know it rounds, as before.
        with suppress(RuntimeError, ValueError):
            ours = "pinned_max_cached_size_mb:1"
            torch._C._accelerator_setAllocatorSettings(f"{settings},{ours}" if settings else ours)


def _tensors(state: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if torch.is_tensor(state):
        yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


# ------------------------------------------------------------------------------------------- weights


class Fragment(NamedTuple):
    """Elements [start, start + numel) of a weight, flattened, at `offset` of one of a rank's master tensors."""

    master: int
    start: int
    offset: int
    numel: int


@dataclass(frozen=True)
class MasterLayout:
    """Where the master weights are. shapes: by name. fragments: by name, for each rank; where ranks hold the same, of
    rank 0 alone."""

    shapes: dict[str, torch.Size]
    fragments: list[dict[str, Fragment]]

    @property
    def partitioned(self) -> bool:
        """Whether ranks hold different parts."""
        return len(self.fragments) > 1


@torch.no_grad()
def full_weights(layout: MasterLayout, masters: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Full weights by name, from the master tensors (or others alike: their average) of every rank in the layout. Those
    that one rank holds whole are views."""
    found = {}
    for name, shape in layout.shapes.items():
        fragments = [(rank, theirs[name]) for rank, theirs in enumerate(layout.fragments) if name in theirs]
        parts = [masters[rank][f.master].view(-1)[f.offset : f.offset + f.numel] for rank, f in fragments]
        assert sum(part.numel() for part in parts) == shape.numel(), f"{name}: {len(parts)} parts are not all of it"
        if len(parts) == 1:
            found[name] = parts[0].detach().view(shape)
            continue
        flat = torch.empty(shape.numel(), dtype=parts[0].dtype)
        for (_, fragment), part in zip(fragments, parts, strict=True):
            flat[fragment.start : fragment.start + fragment.numel] = part
        found[name] = flat.view(shape)
    return found
