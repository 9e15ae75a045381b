"""Exponential moving average of the weights, held beside the float32 weights that the optimizer steps.

Under ZeRO every rank averages its own partition only: no communication, and memory / ranks. bfloat16 weights move in
steps too coarse for a decay of 0.9999, so it is never those that are averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from stdit.config import EMAConfig


def decay_at(config: EMAConfig, step: int) -> float:
    """Decay of the update after step `step` = 1, 2, …: short at first, so that the average leaves the initial weights."""
    return min(config.decay, (1 + step) / (10 + step)) ** config.every


class EMA:
    """The average of what `masters` returns: float32 tensors of this rank, which their owner updates in place.

    It begins as a copy of them. To take up an average that was saved, make them it, then this, then load them.
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
    def swapped(self, publish: Callable[[], None] | None = None) -> Iterator[None]:
        """The average in the masters' place, and back to the last bit. `publish` is called after either exchange,
        to carry the masters into the weights that the forward pass uses."""
        self._exchange()
        try:
            if publish:
                publish()
            yield
        finally:
            self._exchange()
            if publish:
                publish()

    @torch.no_grad()
    def _exchange(self) -> None:
        for master, average in zip(self.masters(), self.average, strict=True):
            held = master.detach().clone()
            master.detach().copy_(average)
            average.copy_(held)
