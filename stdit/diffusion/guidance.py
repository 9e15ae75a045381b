"""Classifier-free guidance (Ho & Salimans 2022) as a function from a model to a model.

A model is a callable `model(x_t, t, cond) -> prediction`; `cond` maps the names of conditions to tensors (B, …), and
`added_cond_kwargs` to a mapping of such.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stdit.held import Held

Model = Callable[[Tensor, Tensor, Mapping[str, Any]], Tensor]

# Conditions of one row per token, of which the longer is padded (with False, or with zeros that a mask shuts out).
TOKENS = ("encoder_hidden_states", "encoder_attention_mask")


def guided(
    model: Model, scale: float, negative: Mapping[str, Tensor] | None = None, channels: int | None = None
) -> Model:
    """A model that predicts u + scale (c - u): c with its condition, u with that dropped, or with `negative` in its place.

    Both are had from one call on a batch of 2B, in which `drop_condition` (2B,) tells them apart unless `negative` does;
    at scale 1 the model itself is returned. The doubled conditions are made once, and handed on as the same tensors for
    as long as `cond` and `negative` hold the same ones, not changed in place: a model may keep what it makes of them.

    channels: latent channels that are guided, from the first; None: all (diffusers, Latte), 3 (of 4) is what DiT's and
    PixArt's own code does. What is not guided, and a learned variance, (B, 2C, …), is that of c.
    ValueError: scale negative or not finite; more channels than the latents have.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance scale must be a finite number, 0 or more; found {scale}")
    if channels is not None and channels < 1:
        raise ValueError(f"guidance_channels must be 1 or more, found {channels}")
    if scale == 1:
        return model
    held: tuple[Held, dict[str, Any]] | None = None
    against = negative or {}

    def predict(x_t: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        nonlocal held
        check_channels(channels, x_t.shape[1])
        if held is None or not held[0].same(cond, against):
            held = (Held(cond, against), doubled(cond, negative, x_t.shape[0], x_t.device))
        times = t if t.ndim == 0 else _twice(t, t, x_t.shape[0])
        with_condition, without = model(torch.cat([x_t, x_t]), times, held[1]).chunk(2)
        count = channels or x_t.shape[1]
        noise, rest = with_condition[:, :count], with_condition[:, count:]
        noise = without[:, :count] + scale * (noise - without[:, :count])
        return torch.cat([noise, rest], dim=1) if rest.shape[1] else noise

    return predict


def check_channels(channels: int | None, latent: int) -> None:
    """ValueError where more channels are to be guided than there are."""
    if channels is not None and channels > latent:
        raise ValueError(f"guidance_channels {channels} is more than the {latent} latent channels")


def doubled(
    cond: Mapping[str, Any], negative: Mapping[str, Tensor] | None, batch: int, device: torch.device
) -> dict[str, Any]:
    """Conditions of a batch of 2B: `cond`, then `negative` (whose names replace cond's), or cond again and dropped."""
    both: dict[str, Any] = {}
    for name, value in cond.items():
        if name == "added_cond_kwargs":
            both[name] = {k: _twice(v, v, batch) for k, v in value.items()}
            continue
        other = value if negative is None else negative.get(name, value)
        if name in TOKENS:
            longest = max(value.shape[1], other.shape[1])
            value, other = _padded(value, longest), _padded(other, longest)
        both[name] = _twice(value, other, batch)
    if negative is None:
        both["drop_condition"] = torch.arange(2 * batch, device=device) >= batch
    return both


def _twice(value: Tensor, other: Tensor, batch: int) -> Tensor:
    """(2B, …): `value`, then `other`. What all samples share, (1, …) or expanded to (B, …), stays shared."""
    if other is value and (value.shape[0] == 1 or value.stride(0) == 0):
        return value[:1].expand(2 * batch, *value.shape[1:])
    if value.shape[0] == 1:
        value, other = (v.expand(batch, *v.shape[1:]) for v in (value, other))
    return torch.cat([value, other])


def _padded(tokens: Tensor, length: int) -> Tensor:
    """(B, L, …) -> (B, length, …)."""
    if tokens.shape[1] == length:
        return tokens
    return pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, length - tokens.shape[1]))
