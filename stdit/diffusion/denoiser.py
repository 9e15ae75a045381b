"""What is sampled from: a denoiser is bound to its conditions and timesteps once, then called with x_t and a step's
number.

step_model = guided(denoiser, 4.0).bind(cond, times)
prediction = step_model(x_t, i)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

# Conditions by the keywords of the model's forward: (B, …), or (1, …) where the batch shares one; `added_cond_kwargs`
# is a mapping of such.
Conditions = Mapping[str, Any]
# (x_t (B, C, T, H, W), step) -> the model's prediction at that step's timestep.
StepModel = Callable[[Tensor, int], Tensor]


class Denoiser(Protocol):
    """A model that can be sampled from, of any kind: stdit.models.sampling.CachedConditions is one."""

    def bind(self, cond: Conditions, times: Tensor) -> StepModel:
        """The model under these conditions at these timesteps (N,); neither is changed while it is in use."""
        ...


@dataclass(frozen=True)
class FunctionDenoiser:
    """A function (x_t, t (B,), cond) -> prediction as a denoiser that precomputes nothing."""

    predict: Callable[[Tensor, Tensor, Conditions], Tensor]

    def bind(self, cond: Conditions, times: Tensor) -> StepModel:
        return lambda x, i: self.predict(x, times[i].expand(x.shape[0]), cond)
