"""Learning rate schedule, a function of the step alone, and the optimizer with its parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from stdit.config import OptimizerConfig
from stdit.training.muon import Muon, hidden_matrices
from stdit.training.mup import scale_learning_rates


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate at step 1 … `steps`: linear warm-up from 0, then `lr_schedule` to `min_lr_ratio` at the last
    step."""
    peak = config.learning_rate
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return peak
    first = last_stable_step(config, steps) if config.lr_schedule == "wsd" else config.warmup_steps
    progress = min(1.0, max(0, step - first) / max(1, steps - first))
    if config.lr_schedule == "wsd":
        remaining = 1 - math.sqrt(progress)
    else:
        remaining = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining)


def last_stable_step(config: OptimizerConfig, steps: int) -> int:
    """The last step of wsd's stable phase; up to it the learning rate does not depend on `steps`."""
    decay = max(1, round(config.decay_share * steps)) if config.decay_share else 0
    return max(min(config.warmup_steps, steps), steps - decay)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameter groups: weight decay on weight matrices and kernels; none on biases, norms and modulation tables. For
    Muon, first the matrices that it trains (`parts`: matrices in each one's rows). With µP each is divided by learning
    rate (`lr_scale`: its share of the optimizer's)."""
    groups = _groups_by_decay(model, config)
    if config.mup is None:
        return groups
    return scale_learning_rates(groups, model, config.mup.base_width, config.learning_rate)


def _groups_by_decay(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    if config.name == "muon":
        hidden = hidden_matrices(model)
        groups.append({"params": list(hidden), "weight_decay": config.weight_decay, "parts": list(hidden.values())})
        parameters = [p for p in parameters if p not in hidden]
    if not config.weight_decay:
        # One group: one flat buffer under ZeRO.
        return [*groups, {"params": parameters, "weight_decay": 0.0}]
    decayed = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    return [
        *groups,
        {"params": [p for p in parameters if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest."""
    groups = parameter_groups(model, config)
    adamw: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps, "fused": True}
    return Muon(groups, config.momentum, **adamw) if config.name == "muon" else torch.optim.AdamW(groups, **adamw)
