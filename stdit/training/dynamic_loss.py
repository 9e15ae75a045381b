"""What a dynamic model's choices cost, in the loss (Zhao et al. 2025, DyDiT, section 3.3, and their code)."""

from __future__ import annotations

from torch import Tensor

from stdit.config import DynamicConfig
from stdit.models.dynamic import Used


def target_at(config: DynamicConfig, step: int) -> float:
    """The share of the complete model's compute that is aimed at in `step` (from 1): from 1 down to the target."""
    progress = min(1.0, step / config.target_steps) if config.target_steps else 1.0
    return 1 - (1 - config.target) * progress


def compute_loss(config: DynamicConfig, used: Used, complete: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """What is added to the loss, and the mean share of compute, () each.

    complete (B,) bool: samples that went through the complete model, and do not count; 0 and 0 where all did.
    """
    counts = (~complete).float()
    count = counts.sum().clamp(min=1)
    share = (used.compute * counts).sum() / count
    tokens = (used.tokens * counts).sum(1) / count  # (depth,)
    too_few = (config.least_tokens - tokens).clamp(min=0).sum()
    missed = (share - target_at(config, step)).square() + config.least_tokens_weight * too_few
    return config.weight * counts.max() * missed, share.detach()
