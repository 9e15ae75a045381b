"""Compute loss of a dynamic model (Zhao et al. 2025, DyDiT, section 3.3, and their code)."""

from __future__ import annotations

from torch import Tensor

from stdit.config import DynamicConfig
from stdit.models.dynamic import ComputeStats


def flops_target(config: DynamicConfig, step: int) -> float:
    """Target share of the full model's FLOPs at `step` (from 1): falls from 1 to `target_flops_ratio`."""
    progress = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return 1 - (1 - config.target_flops_ratio) * progress


def flops_loss(config: DynamicConfig, stats: ComputeStats, force_full: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The compute loss and the mean share of the full model's FLOPs, () each.

    force_full (B,) bool: samples that ran the full model and do not count; loss and share are 0 if all did.
    """
    counts = (~force_full).float()
    count = counts.sum().clamp(min=1)
    ratio = (stats.compute * counts).sum() / count
    tokens = (stats.tokens * counts).sum(1) / count  # (depth,)
    penalty = (config.min_token_ratio - tokens).clamp(min=0).sum()
    loss = (ratio - flops_target(config, step)).square() + config.min_token_weight * penalty
    return config.weight * counts.max() * loss, ratio.detach()
