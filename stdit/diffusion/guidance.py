"""Classifier-free guidance (Ho & Salimans 2022): a denoiser that is guided is a denoiser again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from stdit.diffusion.denoiser import Conditions, Denoiser, StepModel

# Conditions with one row per token; the shorter is padded (mask False, features zero).
TOKENS = ("encoder_hidden_states", "encoder_attention_mask")
# Conditions that `drop_condition` replaces by null.
DROPPED = ("encoder_hidden_states", "pooled_projections", "class_labels")


def guided(
    model: Denoiser,
    scale: float,
    negative: Conditions | None = None,
    channels: int | None = None,
    path_drop: bool = False,
) -> Denoiser:
    """Classifier-free guidance: u + scale (c - u), c with the conditions, u with them dropped or with `negative`.

    Both come from one call on a batch of 2B, in which `drop_condition` (2B,) tells them apart unless `negative` does.
    At scale 1 it is the model itself.

    channels: latent channels that are guided, from the first. None: all (diffusers, Latte); 3 (of 4) is what DiT's and
    PixArt's own code does. Channels that are not guided, and a learned variance (B, 2C, …), are those of c.
    path_drop: u is computed without the sparse blocks (SPRINT, arXiv 2510.21986), in a call of its own; each call is on
    a batch of B.
    ValueError: scale negative or not finite; more channels than the latents have.
    """
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"guidance scale must be a finite number, 0 or more; found {scale}")
    if channels is not None and channels < 1:
        raise ValueError(f"guidance_channels must be 1 or more, found {channels}")
    return model if scale == 1 else _Guided(model, scale, negative, channels, path_drop)


@dataclass(frozen=True)
class _Guided:
    model: Denoiser
    scale: float
    negative: Conditions | None
    channels: int | None
    path_drop: bool

    def bind(self, cond: Conditions, times: Tensor) -> StepModel:
        both = self._bind_halves(cond, times) if self.path_drop else self._bind_at_once(cond, times)

        def predict(x: Tensor, i: int) -> Tensor:
            check_channels(self.channels, x.shape[1])
            conditional, unconditional = both(x, i)
            count = self.channels or x.shape[1]
            c, u = conditional[:, :count], unconditional[:, :count]
            guided, rest = u + self.scale * (c - u), conditional[:, count:]
            return torch.cat([guided, rest], dim=1) if rest.shape[1] else guided

        return predict

    def _bind_at_once(self, cond: Conditions, times: Tensor) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
        step_model = self.model.bind(double_conditions(cond, self.negative, times.device), times)
        return lambda x, i: step_model(torch.cat([x, x]), i).chunk(2)

    def _bind_halves(self, cond: Conditions, times: Tensor) -> Callable[[Tensor, int], tuple[Tensor, ...]]:
        null: dict[str, Any] = {**cond, **(self.negative or {}), "path_drop": True}
        if self.negative is None and any(name in cond for name in DROPPED):
            null["drop_condition"] = torch.ones(_batch(cond), dtype=torch.bool, device=times.device)
        conditional, unconditional = self.model.bind(cond, times), self.model.bind(null, times)
        return lambda x, i: (conditional(x, i), unconditional(x, i))


def check_path_drop(path_drop: bool, sparse_dense: object) -> None:
    """ValueError: path-drop guidance of a model without sparse blocks."""
    if not isinstance(path_drop, bool):
        raise ValueError(f"path_drop must be True or False, found {path_drop!r:.80}")
    if path_drop and not sparse_dense:
        raise ValueError("path_drop (path-drop guidance) needs a model with sparse_dense; this one has none")


def check_channels(channels: int | None, latent: int) -> None:
    """ValueError unless None, or a number of the latents' channels."""
    if channels is None:
        return
    if isinstance(channels, bool) or not isinstance(channels, Integral) or channels < 1:
        raise ValueError(f"guidance_channels must be a whole number above 0, found {channels!r:.80}")
    if channels > latent:
        raise ValueError(f"guidance_channels {channels!r:.80} is more than the {latent} latent channels")


def double_conditions(cond: Conditions, negative: Conditions | None, device: torch.device) -> dict[str, Any]:
    """Conditions of a batch of 2B: `cond`, then `negative` (whose names replace cond's), or cond again and dropped."""
    added = cond.get("added_cond_kwargs", {})
    tensors = {name: value for name, value in cond.items() if name != "added_cond_kwargs"}
    batch = _batch(cond)
    both: dict[str, Any] = {}
    if added:
        both["added_cond_kwargs"] = {name: _twice(value, value, batch) for name, value in added.items()}
    for name, value in tensors.items():
        other = value if negative is None else negative.get(name, value)
        if name in TOKENS:
            longest = max(value.shape[1], other.shape[1])
            value, other = _padded(value, longest), _padded(other, longest)
        both[name] = _twice(value, other, batch)
    if negative is None and any(name in cond for name in DROPPED):
        both["drop_condition"] = torch.arange(2 * batch, device=device) >= batch
    return both


def _batch(cond: Conditions) -> int:
    """B, or 1 if the whole batch shares its conditions."""
    tensors = (value for name, value in cond.items() if name != "added_cond_kwargs")
    return max((value.shape[0] for value in (*tensors, *cond.get("added_cond_kwargs", {}).values())), default=1)


def _twice(value: Tensor, other: Tensor, batch: int) -> Tensor:
    """(2B, …): `value`, then `other`. What the batch shares, (1, …) or expanded to (B, …), stays shared."""
    if other is value and (value.shape[0] == 1 or value.stride(0) == 0):
        return value[:1].expand(2 * batch, *value.shape[1:])
    value, other = (v.expand(batch, *v.shape[1:]) if v.shape[0] == 1 else v for v in (value, other))
    return torch.cat([value, other])


def _padded(tokens: Tensor, length: int) -> Tensor:
    """(B, L, …) -> (B, length, …)."""
    if tokens.shape[1] == length:
        return tokens
    return pad(tokens, (0, 0) * (tokens.ndim - 2) + (0, length - tokens.shape[1]))
