"""Layouts of Open-Sora: STDiT v1 (1.0) and STDiT3 (1.2)."""

from __future__ import annotations

from typing import Any

import torch

from stdit.config.model import ModelConfig
from stdit.weights.layouts.layout import Layout, Rule, SourceWeights, Tables, count_blocks, linear
from stdit.weights.layouts.original import (
    DIMENSIONS,
    SPATIAL,
    TEMPORAL,
    TEXT,
    block,
    embedders_and_final_layer,
    infer_dimensions,
    infer_text,
)
from stdit.weights.layouts.position_tables import (
    choose_other_grids,
    infer_spatial_positions,
    infer_temporal_positions,
    spatial_limits,
    spatial_table,
    temporal_limits,
    temporal_table,
)

# ---------------------------------------------------------------------------------------------- v1


def _infer_v1(source: SourceWeights) -> dict[str, Any]:
    found = infer_dimensions(source, count_blocks(source, "blocks."), "blocks.0") | infer_text(source)
    found |= choose_other_grids(source, infer_spatial_positions(source), "STDiT v1", rescaled=False)
    return found | infer_temporal_positions(source, "pos_embed_temporal")


def _v1_rules(c: ModelConfig) -> list[Rule]:
    blocks = [rule for i in range(c.dimensions[1]) for rule in block(c, i)]
    learned = [
        r._replace(theirs=("pos_embed_temporal",)) if r.ours == "temp_embed" else r
        for r in embedders_and_final_layer(c)
    ]
    return linear("x_embedder.proj") + learned + blocks


def _v1_tables(c: ModelConfig) -> Tables:
    return spatial_table(c) | temporal_table(c, "pos_embed_temporal")


def _text_limits(c: ModelConfig, title: str) -> list[str]:
    return [f"text_dim is None; {title} has captions"] if c.text_dim is None else []


V1 = Layout(
    name="opensora-v1",
    title="Open-Sora STDiT v1",
    fixed={
        "conditioning": "adaln_single",
        "attention": "factorized",
        "temporal_norm": False,
        "temporal_position_injection": "first_attention",
        "null_text": "sequence",
    },
    free=DIMENSIONS | SPATIAL | TEMPORAL | TEXT,
    infer=_infer_v1,
    rules=_v1_rules,
    tables=_v1_tables,
    limits=lambda c: spatial_limits(c, "STDiT v1") + temporal_limits(c, "STDiT v1") + _text_limits(c, "STDiT v1"),
)


# -------------------------------------------------------------------------------------------- v1.2


def _infer_v3(source: SourceWeights) -> dict[str, Any]:
    pairs = count_blocks(source, "spatial_blocks.")
    norm = "spatial_blocks.0.attn.q_norm.weight"
    found = infer_dimensions(source, pairs, "spatial_blocks.0", (norm,)) | infer_text(source)
    found |= {"depth": 2 * pairs, "qk_norm": "rms" if norm in source.state else None}
    if isinstance(source.config.get("input_sq_size"), int):
        found["position_reference"] = source.config["input_sq_size"]
    return found


def _v3_rules(c: ModelConfig) -> list[Rule]:
    rules = linear("x_embedder.proj") + embedders_and_final_layer(c)
    for i in range(c.dimensions[1]):
        kind = "temporal" if i % 2 else "spatial"
        rules += block(c, i, f"{kind}_blocks.{i // 2}")
    return rules


def _v3_tables(c: ModelConfig) -> Tables:
    """The RoPE frequencies, as rotary_embedding_torch computes them."""
    width, _, heads = c.dimensions
    head = width // heads
    return {"rope.freqs": 1.0 / (10000 ** (torch.arange(0, head, 2)[: head // 2].float() / head))}


def _v3_limits(c: ModelConfig) -> list[str]:
    lines = _text_limits(c, "STDiT3")
    if c.qk_norm == "layer":
        lines.append("qk_norm is 'layer'; STDiT3 has 'rms' or None")
    return lines


V3 = Layout(
    name="stdit3",
    title="Open-Sora STDiT3",
    fixed={
        "conditioning": "adaln_single",
        "attention": "alternating",
        "temporal_positions": "rope",
        "position_reference": 512,
        "pad_latents": True,
        "micro_conditions": ("fps",),
        "null_text": "sequence",
    },
    free=DIMENSIONS | TEXT | {"qk_norm", "position_reference"},
    infer=_infer_v3,
    rules=_v3_rules,
    tables=_v3_tables,
    limits=_v3_limits,
)
