"""Tiny random models of diffusers' classes."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel


def shaken(model: Any, seed: int = 0) -> Any:
    """Every parameter random; of DiT's embedders, which are copied into every block, one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + (".norm_" in name))
    if isinstance(model, DiTTransformer2DModel):
        blocks: list[Any] = list(model.transformer_blocks)
        for block in blocks[1:]:
            block.norm1.emb.load_state_dict(blocks[0].norm1.emb.state_dict())
    return model.eval()


def dit(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8}
    return shaken(DiTTransformer2DModel(**{**sizes, "num_embeds_ada_norm": 5, **changes}))


def pixart(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 3, "out_channels": 6, "num_layers": 2}
    text = {"sample_size": 8, "cross_attention_dim": 48, "caption_channels": 10}
    return shaken(PixArtTransformer2DModel(**{**sizes, **text, **changes}))


def latte(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6, "num_layers": 2}
    text = {"sample_size": 8, "patch_size": 2, "cross_attention_dim": 32, "caption_channels": 10, "video_length": 3}
    kind = {"attention_bias": True, "activation_fn": "gelu-approximate", "norm_type": "ada_norm_single"}
    rest = {"num_embeds_ada_norm": 1000, "norm_elementwise_affine": False, "norm_eps": 1e-6}
    return shaken(LatteTransformer3DModel(**{**sizes, **text, **kind, **rest, **changes}))


def sd3(**changes: Any) -> Any:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 3, "out_channels": 3, "num_layers": 3}
    text = {"joint_attention_dim": 10, "caption_projection_dim": 32, "pooled_projection_dim": 12}
    return shaken(SD3Transformer2DModel(**{**sizes, **text, "sample_size": 8, "pos_embed_max_size": 7, **changes}))
