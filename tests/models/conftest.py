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
    "text_tokens": 7,
}


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


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    """Compiled code belongs to functions, not models, and torch keeps eight a function: begin each test without any."""
    torch._dynamo.reset()
