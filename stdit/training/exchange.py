"""Times what ranks exchange under ZeRO: reductions of gradients, gathers of weights.

DeepSpeed calls every collective through one object, in whose place a `TimedBackend` stands while a run trains. Those of
sequence parallelism are not seen: autograd calls them without Python (`train.profile` has them in its trace).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch

Section = Callable[[], AbstractContextManager[None]]
# Methods of deepspeed.comm.torch.TorchBackend that send tensors to other ranks.
COLLECTIVES = frozenset({
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all", "all_to_all_single",
})  # fmt: skip


@contextmanager
def timed_collectives(section: Section) -> Iterator[None]:
    """Has DeepSpeed's collectives, and the waits for those that are asynchronous, run within `section()`."""
    from deepspeed.comm import comm

    module: Any = comm
    backend = module.cdb
    module.cdb = TimedBackend(backend, section)
    try:
        yield
    finally:
        module.cdb = backend


class TimedBackend:
    """A backend of deepspeed.comm whose collectives run within `section()`."""

    def __init__(self, backend: Any, section: Section) -> None:
        self._backend, self._section = backend, section

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._backend, name)
        return _timed(found, self._section) if name in COLLECTIVES else found


class TimedWork:
    """A collective that is under way, and is waited for within `section()`."""

    def __init__(self, work: Any, section: Section) -> None:
        self._work, self._section = work, section

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self._section():
            return self._work.wait(*args, **kwargs)


def _timed(collective: Callable[..., Any], section: Section) -> Callable[..., Any]:
    @torch.compiler.disable  # ZeRO-3 gathers weights within compiled blocks
    @wraps(collective)
    def run(*args: Any, **kwargs: Any) -> Any:
        with section():
            work = collective(*args, **kwargs)
        return TimedWork(work, section) if hasattr(work, "wait") else work

    return run
