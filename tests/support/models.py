"""Tiny models whose every weight matters, and inputs for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from stdit.config import ModelConfig
from stdit.models.stdit import STDiT

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "depth": 2,
    "num_heads": 4,
    "in_channels": 3,
    "patch_size": (1, 2, 2),
    "max_text_tokens": 7,
}


@pytest.fixture(autouse=True)
def reset_compiler() -> None:
    """Compiled code belongs to functions, not models, and torch keeps eight a function: each test begins without
    any."""
    torch._dynamo.reset()


@pytest.fixture
def settings() -> Callable[..., ModelConfig]:
    """A tiny ModelConfig with changes."""
    return lambda **changes: ModelConfig(**{**TINY, **changes})


def shaken(model: STDiT, seed: int = 0, std: float = 0.1) -> STDiT:
    """`model` with nothing left at zero, so that no law holds only because a gate is shut."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def tiny(settings: Callable[..., ModelConfig]) -> Callable[..., STDiT]:
    """A tiny shaken model in eval mode, with changes to its config."""
    return lambda **changes: shaken(STDiT.from_settings(settings(**changes))).eval()


@pytest.fixture
def noise() -> Callable[..., torch.Tensor]:
    """Standard normal numbers of a shape, from a seed."""
    return lambda *shape, seed=0: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# One config of each kind of model.
CONDITIONINGS = ("in_context", "cross_attention", "adaln", "adaln_zero", "adaln_single", "joint")
MEMBERS: dict[str, dict[str, Any]] = {
    f"{conditioning}-{attention}": {
        "conditioning": conditioning,
        "attention": attention,
        "text_dim": 6,
        "num_classes": 3,
    }
    for conditioning in CONDITIONINGS
    for attention in ("factorized", "alternating", "full")
    if (conditioning, attention) != ("joint", "alternating")
}
MEMBERS |= {
    "unconditional": {"conditioning": "adaln_zero", "temporal": False},
    "classes": {"conditioning": "adaln_zero", "temporal": False, "num_classes": 3, "learned_variance": True},
    "latte": {"conditioning": "adaln_zero", "attention": "alternating", "num_classes": 3, "temporal_position_injection": "residual"},
    "latte-text": {"attention": "alternating", "text_dim": 6, "temporal_position_injection": "residual", "temporal_text": False},
    "open-sora-1": {"text_dim": 6, "temporal_norm": False, "temporal_position_injection": "first_attention", "null_text": "sequence"},
    "open-sora-1.2": {
        "attention": "alternating",
        "text_dim": 6,
        "temporal_positions": "rope",
        "qk_norm": "rms",
        "position_reference": 32,
        "micro_conditions": ("fps",),
        "null_text": "sequence",
    },
    "pixart-1024": {"temporal": False, "text_dim": 6, "micro_conditions": ("size",), "hidden_size": 24},
    "pixart-sigma": {"temporal": False, "text_dim": 6, "qk_norm": "layer", "kv_compress": 2, "kv_compress_blocks": (1,)},
    "windows": {"window_size": 2, "window_blocks": (0,), "relative_positions": True},
    "sd3": {
        "conditioning": "joint",
        "attention": "full",
        "text_dim": 6,
        "text_projection": "linear",
        "pooled_dim": 5,
        "qk_norm": "rms",
        "position_grid": (6, 6),
        "position_base": 4,
        "null_text": "empty",
    },
    "learned": {"positions": "learned", "position_grid": (5, 6), "position_frames": 4},
    "rope-in-context": {"conditioning": "in_context", "attention": "full", "positions": "rope", "text_dim": 6, "hidden_size": 48},
    "rope-over-time": {"attention": "full", "temporal_positions": "rope"},
    "swiglu": {"mlp": "swiglu"},
    "conv2d": {"mlp": "conv2d", "conditioning": "adaln_zero"},
    "conv3d": {"mlp": "conv3d"},
    "rineau": {
        "conditioning": "adaln_zero",
        "temporal": False,
        "mlp": "conv2d",
        "positions": "learned",
        "position_grid": (4, 4),
        "timestep_width": None,
        "timestep_freq_shift": 1,
        "timestep_activation": "gelu",
        "num_classes": 3,
        "null_class": False,
    },
    "everything-told": {"micro_conditions": ("fps", "frames", "height", "width"), "text_dim": 6, "pooled_text": True},
}  # fmt: skip


def conditions_for(config: ModelConfig, batch: int, noise: Callable[..., torch.Tensor]) -> dict[str, Any]:
    """Conditions of every kind that `config` has: ragged captions, a null class."""
    given: dict[str, Any] = {"timestep": torch.linspace(200.0, 800.0, batch)}
    if config.text_dim:
        given["encoder_hidden_states"] = noise(batch, 5, config.text_dim, seed=1)
        given["encoder_attention_mask"] = torch.arange(5) < torch.tensor([[2], [4], [3]])[:batch]
    if config.num_classes:
        given["class_labels"] = torch.tensor([1, -1, 0])[:batch]
    if config.pooled_dim:
        given["pooled_projections"] = noise(batch, config.pooled_dim, seed=2)
    if config.micro_conditions or config.position_reference:
        fps = torch.tensor([8.0, 24.0, 30.0])[:batch]
        given["added_cond_kwargs"] = {"fps": fps, "frames": 5.0, "height": 32.0, "width": 48.0}
    return given
