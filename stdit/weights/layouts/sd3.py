"""Layout of diffusers' SD3Transformer2DModel: MM-DiT (Stable Diffusion 3), without 3.5 medium's dual attention.

Its final norms (output, and the last block's text) predict (scale, shift); ours predict (shift, scale).
"""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

from stdit.config.model import ModelConfig
from stdit.weights.layouts.diffusers import common_config, limits, mlp, self_attention
from stdit.weights.layouts.diffusers_config import DiffusersConfig
from stdit.weights.layouts.layout import (
    Layout,
    Rule,
    SourceWeights,
    concatenated,
    halves_swapped,
    image_patches,
    linear,
    same,
)
from stdit.weights.layouts.original import DIMENSIONS, TEXT
from stdit.weights.layouts.position_tables import spatial_table

# CLIP's 77 tokens, and T5's, at most 512.
TOKENS = 589
TITLE = "diffusers' SD3"


def _infer(source: SourceWeights) -> dict[str, Any]:
    v = DiffusersConfig(source, SD3Transformer2DModel, "SD3Transformer2DModel")
    found = v.sizes()
    v.require(caption_projection_dim=found["hidden_size"])
    if v["dual_attention_layers"]:
        v.errors.append(f"dual_attention_layers: {v['dual_attention_layers']!r}; supported: ()")
    norm = None
    if v["qk_norm"] is not None:
        norm = v.one_of("qk_norm", {"rms_norm": "rms"})
    side = v["pos_embed_max_size"]
    if not isinstance(side, int) or side < 1:
        v.errors.append(
            f"pos_embed_max_size: {side!r}; expected the side of the position table, of which grids take the centre"
        )
    v.check()
    return found | {
        "text_dim": v["joint_attention_dim"],
        "pooled_dim": v["pooled_projection_dim"],
        "max_text_tokens": TOKENS,
        "position_grid": (side, side),
        "qk_norm": norm,
    }


def _swapped(ours: str, theirs: str) -> list[Rule]:
    return [halves_swapped(f"{ours}.{part}", f"{theirs}.{part}") for part in ("weight", "bias")]


def _rules(c: ModelConfig) -> list[Rule]:
    depth = c.dimensions[1]
    embedder = "time_text_embed"
    rules = image_patches("x_embedder.proj", "pos_embed.proj")
    rules += linear("t_embedder.mlp.0", f"{embedder}.timestep_embedder.linear_1")
    rules += linear("t_embedder.mlp.2", f"{embedder}.timestep_embedder.linear_2")
    rules += linear("y_embedder.pooled_proj.0", f"{embedder}.text_embedder.linear_1")
    rules += linear("y_embedder.pooled_proj.2", f"{embedder}.text_embedder.linear_2")
    rules += linear("y_embedder.y_proj", "context_embedder") + linear("final_layer.linear", "proj_out")
    rules += _swapped("final_layer.adaLN_modulation.1", "norm_out.linear")
    for i in range(depth):
        ours, theirs, last = f"blocks.{i}", f"transformer_blocks.{i}", i == depth - 1
        text = f"{ours}.context"
        rules += linear(f"{ours}.adaLN_modulation.1", f"{theirs}.norm1.linear")
        rules += self_attention(f"{ours}.attn", f"{theirs}.attn") + mlp(f"{ours}.mlp", f"{theirs}.ff")
        rule = _swapped if last else linear
        rules += rule(f"{text}.adaLN_modulation.1", f"{theirs}.norm1_context.linear")
        added = (f"{theirs}.attn.add_q_proj", f"{theirs}.attn.add_k_proj", f"{theirs}.attn.add_v_proj")
        rules += concatenated(f"{text}.attn.qkv", added)
        if not last:
            rules += linear(f"{text}.attn.proj", f"{theirs}.attn.to_add_out") + mlp(
                f"{text}.mlp", f"{theirs}.ff_context"
            )
        if c.qk_norm == "rms":
            rules += [same(f"{ours}.attn.{n}_norm.weight", f"{theirs}.attn.norm_{n}.weight") for n in "qk"]
            rules += [same(f"{text}.attn.{n}_norm.weight", f"{theirs}.attn.norm_added_{n}.weight") for n in "qk"]
    return rules


def _limits(c: ModelConfig) -> list[str]:
    lines = limits(c, TITLE)
    if c.position_grid is None or c.position_grid[0] != c.position_grid[1]:
        lines.append(f"position_grid is {c.position_grid}; {TITLE} takes the centre of a square table")
    if c.pooled_dim is None:
        lines.append(f"pooled_dim is None; {TITLE} has pooled text features")
    if c.qk_norm == "layer":
        lines.append(f"qk_norm is 'layer'; {TITLE} has 'rms' or None")
    return lines


def _config(c: ModelConfig) -> dict[str, Any]:
    return common_config(c) | {
        "joint_attention_dim": c.text_dim,
        "caption_projection_dim": c.dimensions[0],
        "pooled_projection_dim": c.pooled_dim,
        "pos_embed_max_size": (c.position_grid or (0,))[0],
        "dual_attention_layers": (),
        "qk_norm": "rms_norm" if c.qk_norm == "rms" else None,
    }


DIFFUSERS_SD3 = Layout(
    name="diffusers-sd3",
    title=TITLE,
    fixed={"conditioning": "joint", "attention": "full", "text_projection": "linear", "null_text": "empty"},
    free=(DIMENSIONS - {"mlp_ratio"})
    | TEXT
    | {"position_base", "position_grid", "pooled_dim", "qk_norm", "temporal", "temporal_positions", "null_text"},
    infer=_infer,
    rules=_rules,
    tables=lambda c: spatial_table(c, "pos_embed.pos_embed"),
    limits=_limits,
    diffusers_class="SD3Transformer2DModel",
    diffusers_config=_config,
)
