"""Weight initialisation, and the constructor's keywords from ModelConfig."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.blocks import AdaLN
from stdit.models.dynamic import Router
from stdit.models.embeddings import micro_embedders


def takes_model_config(init: Callable[..., None]) -> Callable[..., None]:
    """Adds ModelConfig's keywords to a constructor's signature, so that diffusers writes each into config.json."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(init).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [
        inspect.Parameter(
            name, kind, default=field.get_default() if not field.is_required() else inspect.Parameter.empty
        )
        for name, field in ModelConfig.model_fields.items()
        if name != "size"
    ]
    init.__signature__ = inspect.Signature([*own, *fields])  # pyright: ignore[reportFunctionMemberAccess]
    return init


@torch.no_grad()
def init_weights(model: Any) -> None:
    """Initialises as DiT, PixArt and LocalViT do, with all gates at 0: every block starts as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(_bias(module))
    proj = model.x_embedder.proj
    nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
    nn.init.zeros_(_bias(proj))
    for table in (model.pos_embed, model.temp_embed):
        if table is not None:
            nn.init.normal_(table, std=0.02)
    small: list[Any] = [*_linears(model.t_embedder)]
    zero: list[Any] = [model.final_layer.linear]
    zero += [] if model.t_block is None else [model.t_block[1]]
    for name in micro_embedders(model.settings):
        first, last = _linears(model.get_submodule(name))
        small.append(first)
        zero.append(last)
    if model.y_embedder is not None:
        small += [m for m in (model.y_embedder.embedding_table, *_linears(model.y_embedder.y_proj)) if m]
        zero += _linears(model.y_embedder.pooled_proj)[1:] if model.settings.pooled_text else []
    for module in model.modules():
        if isinstance(module, AdaLN):
            zero += _linears(module)
        if isinstance(module, Router):
            module.init_weights()
    for block in model.blocks:
        if model.settings.conditioning == "adaln_single":
            block.scale_shift_table[[2, 5]] = 0.0
        if block.cross_attn is not None:
            zero.append(block.cross_attn.proj)
        if block.attn.sr is not None:  # initialised as average pooling
            nn.init.constant_(block.attn.sr.weight, 1 / block.attn.sr.weight[0, 0].numel())
            nn.init.zeros_(block.attn.sr.bias)
    if model.fusion is not None:
        model.fusion.init_weights()
    for module in small:
        nn.init.normal_(module.weight, std=0.02)
    for module in zero:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def _linears(module: nn.Module | None) -> list[Any]:
    return [] if module is None else [m for m in module.modules() if isinstance(m, nn.Linear)]


def _bias(module: nn.Module) -> Tensor:
    bias = module.bias
    assert isinstance(bias, Tensor)
    return bias
