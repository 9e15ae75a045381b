"""Exponential moving average (EMA) of the float32 master weights.

Under ZeRO every rank averages its own partition: no communication, memory / ranks. bfloat16 weights are never averaged:
their steps are too coarse for a decay of 0.9999.

Profiles are power-function averages (Karras et al. 2024, section 3): at step t weights of step s count as the integral
of (gamma + 1) s^gamma / t^(gamma + 1) over that step, so that the width of the average grows with the training.
stdit.training.post_hoc_ema makes averages of other widths from snapshots of them (stdit.training.ema_snapshots).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from stdit.config import EMAConfig


def decay_at(config: EMAConfig, step: int) -> float:
    """Decay at step 1, 2, …: smaller at first, so that the average forgets the initial weights."""
    return min(config.decay, (1 + step) / (10 + step)) ** config.every


def power_function_exponent(sigma_rel: float) -> float:
    """gamma of the profile whose standard deviation is this share of the training so far: the positive root of
    sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3))."""
    inverse = sigma_rel**-2
    return float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max())


def power_function_decay(sigma_rel: float, step: int, every: int) -> float:
    """Decay of a profile at an update, `every` steps after the last one; 0 at the first one."""
    return (1 - every / step) ** (power_function_exponent(sigma_rel) + 1)


class EMA:
    """EMA of the tensors that `masters` returns (float32, this rank's, updated in place), starting as a copy of them.

    profiles: averages alike, by their sigma_rel; the first update makes them the weights.
    To resume, create it while the masters hold the saved average, set the profiles, then load the masters.
    """

    def __init__(self, masters: Callable[[], Sequence[Tensor]], config: EMAConfig) -> None:
        self.config = config
        self.masters = masters
        self.average = [m.detach().clone() for m in masters()]
        self.profiles = {sigma_rel: [m.detach().clone() for m in masters()] for sigma_rel in config.widths}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- decay · average + (1 - decay) · masters, every `every` steps; so are the profiles, each with its
        own decay."""
        every = self.config.every
        if step % every == 0:
            masters = [m.detach() for m in self.masters()]
            torch._foreach_lerp_(self.average, masters, 1 - decay_at(self.config, step))  # pyright: ignore
            for sigma_rel, average in self.profiles.items():
                torch._foreach_lerp_(average, masters, 1 - power_function_decay(sigma_rel, step, every))  # pyright: ignore

    def averages(self) -> list[Tensor]:
        """The tensors of the average and of all profiles."""
        return [*self.average, *(tensor for average in self.profiles.values() for tensor in average)]

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
