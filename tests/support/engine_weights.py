"""Full weights of a live engine, by DeepSpeed's own functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def gathered_weights(engine: Any) -> dict[str, Tensor]:
    """Full master weights by name, and persistent buffers, on rank 0; {} on other ranks. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param

    replicas = engine._replicated_masters()
    state: dict[str, Tensor] = {}
    for name, parameter in engine._trainable().items():
        full = replicas[id(parameter)] if replicas is not None else safe_get_full_fp32_param(parameter)
        assert full is not None
        state[name] = full.detach().float().cpu().clone()
    state |= {name: buffer.detach().cpu().clone() for name, buffer in engine.buffers().items()}
    return state if engine.ranks.is_main else {}


@torch.no_grad()
def assembled_weights(engine: Any) -> dict[str, Tensor]:
    """The same from every rank's partitions, as a checkpoint's writer joins them. Collective."""
    from stdit.training.snapshot import full_weights

    layout = engine.master_layout()
    parts = engine.ranks.gather([master.detach().clone() for master in engine.masters()])
    full = {name: tensor.clone() for name, tensor in full_weights(layout, parts).items()}
    return full | engine.buffers() if engine.ranks.is_main else {}
