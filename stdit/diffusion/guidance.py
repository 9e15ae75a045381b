"""Classifier-free guidance (Ho & Salimans 2022) as a function from a model to a model.

A model is a callable `model(x_t, t, cond) -> prediction`; `cond` maps the names of conditions to tensors (B, …).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

Model = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]

# Conditions of one row per token, of which the longer is padded (with False, or with zeros that a mask shuts out).
TOKENS = ("encoder_hidden_states", "encoder_attention_mask")


def guided(model: Model, scale: float, negative: Mapping[str, Tensor] | None = None) -> Model:
    """A model that predicts u + scale (c - u): c with its condition, u with that dropped, or with `negative` in its place.

    Both are had from one call on a batch of 2B, in which `drop_condition` (2B,) tells them apart; at scale 1 the model
    itself is returned. Of a prediction with learned variance, (B, 2C, …), the noise is guided and the variance is
    that of c. ValueError: scale negative or not finite.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance scale must be a finite number, 0 or more; found {scale}")
    if scale == 1:
        return model

    def predict(x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        both = doubled(cond, negative, x_t.shape[0], x_t.device)
        times = t if t.ndim == 0 else torch.cat([t, t])
        with_condition, without = model(torch.cat([x_t, x_t]), times, both).chunk(2)
        channels = x_t.shape[1]
        noise, rest = with_condition[:, :channels], with_condition[:, channels:]
        noise = without[:, :channels] + scale * (noise - without[:, :channels])
        return torch.cat([noise, rest], dim=1) if rest.shape[1] else noise

    return predict


def doubled(
    cond: Mapping[str, Tensor], negative: Mapping[str, Tensor] | None, batch: int, device: torch.device
) -> dict[str, Tensor]:
    """Conditions of a batch of 2B: `cond`, then `negative` (whose names replace cond's), or cond again and dropped."""
    both: dict[str, Tensor] = {}
    for name, value in cond.items():
        other = value if negative is None else negative.get(name, value)
        if name in TOKENS:
            longest = max(value.shape[1], other.shape[1])
            value, other = _padded(value, longest), _padded(other, longest)
        both[name] = torch.cat([value, other])
    drop = torch.zeros(2 * batch, dtype=torch.bool, device=device)
    drop[batch:] = negative is None
    return {**both, "drop_condition": drop}


def _padded(tokens: Tensor, length: int) -> Tensor:
    """(B, L, …) -> (B, length, …)."""
    return pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, length - tokens.shape[1]))
