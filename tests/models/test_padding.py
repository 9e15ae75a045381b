"""Latents that patches do not fill: padded with zeros and cropped, where the config says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stdit.config import ConfigError, token_grid
from stdit.models.stdit import STDiT

Tiny = Callable[..., STDiT]
Noise = Callable[..., Tensor]
VARIANTS: dict[str, dict[str, Any]] = {
    "factorized": {},
    "rescaled": {"position_base": 4},
    "full, RoPE": {"attention": "full", "positions": "rope", "hidden_size": 48},
    "learned": {"positions": "learned", "position_grid": (6, 6), "position_frames": 4},
    "windows": {"window_size": 2},
    "pixels": {"position_reference": 32, "learned_variance": True},
}


@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 3)])
@pytest.mark.parametrize("kind", VARIANTS)
def test_padding_is_that_of_latents_padded_by_hand(
    tiny: Tiny, noise: Noise, kind: str, patch: tuple[int, int, int]
) -> None:
    model = tiny(patch_size=patch, pad_latents=True, **VARIANTS[kind])
    x, t = noise(2, 3, 3, 7, 11), torch.tensor([10.0, 700.0])
    clean = torch.tensor([[True, False, False], [False, False, True]])
    inputs = {"added_cond_kwargs": {"height": 56, "width": 88}}
    pads = [-size % p for size, p in zip(x.shape[2:], patch, strict=True)]
    whole = torch.nn.functional.pad(x, (0, pads[2], 0, pads[1], 0, pads[0]))
    frames = torch.nn.functional.pad(clean, (0, pads[0]), value=True)
    with torch.no_grad():
        ours = model(x, t, conditioning_frames=clean, **inputs).sample
        by_hand = model(whole, t, conditioning_frames=frames, **inputs).sample
    assert ours.shape[2:] == x.shape[2:]
    assert torch.equal(ours, by_hand[:, :, :3, :7, :11])


def test_latents_that_fill_patches_do_not_change(tiny: Tiny, noise: Noise) -> None:
    x = noise(2, 3, 2, 8, 12)
    with torch.no_grad():
        padded, plain = (tiny(pad_latents=pad)(x, 300.0).sample for pad in (True, False))
    assert torch.equal(padded, plain)


def test_latents_that_patches_do_not_fill_are_refused_by_default(tiny: Tiny, noise: Noise) -> None:
    with pytest.raises(ValueError, match="width 11 is not divisible by patch_size 2"):
        tiny()(noise(1, 3, 1, 8, 11), 300.0)
    with pytest.raises(
        ConfigError, match=r"here: latent height 45 is not divisible by model.patch_size 2 .model.pad_latents"
    ):
        token_grid((1, 45, 80), (1, 2, 2), "here")
    assert token_grid((1, 45, 80), (1, 2, 2), "here", pad=True) == (1, 23, 40)
