"""Exponential moving average (EMA) of the float32 master weights.

Under ZeRO every rank averages its own partition: no communication, memory / ranks. bfloat16 weights are never averaged:
their steps are too coarse for a decay of 0.9999.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stdit.config import EMAConfig


def decay_at(config: EMAConfig, step: int) -> float:
    """Decay at step 1, 2, …: smaller at first, so that the average forgets the initial weights."""
    return min(config.decay, (1 + step) / (10 + step)) ** config.every


class EMA:
    """EMA of the tensors that `masters` returns (float32, this rank's, updated in place), starting as a copy of them.

    To resume, create it while the masters hold the saved average, then load the masters.
    """

    def __init__(self, masters: Callable[[], Sequence[Tensor]], config: EMAConfig) -> None:
        self.config = config
        self.masters = masters
        self.average = [m.detach().clone() for m in masters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- decay · average + (1 - decay) · masters, every `every` steps."""
        if step % self.config.every == 0:
            masters = [m.detach() for m in self.masters()]
            torch._foreach_lerp_(self.average, masters, 1 - decay_at(self.config, step))  # pyright: ignore

    @contextmanager
    def swapped(self, sync: Callable[[], None] | None = None) -> Iterator[None]:
        """Puts the average into the masters within the context, and restores them bit for bit. `sync` is called after
        either exchange, to copy the masters into the model weights."""
        self._exchange()
        try:
            if sync:
                sync()
            yield
        finally:
            self._exchange()
            if sync:
                sync()

    @torch.no_grad()
    def _exchange(self) -> None:
        for master, average in zip(self.masters(), self.average, strict=True):
            saved = master.detach().clone()
            master.detach().copy_(average)
            average.copy_(saved)
