"""Weights as Open-Sora has them: STDiT v1, and STDiT3 (v1.1's successor, v1.2)."""

from __future__ import annotations

from typing import Any

import torch

from stdit.config.model import ModelConfig
from stdit.weights.layouts.layout import Foreign, Layout, Rule, Tables, count_blocks, linear
from stdit.weights.layouts.original import (
    DIMENSIONS,
    PLACES,
    TEXT,
    TIMES,
    block,
    body,
    dimensions,
    text_of,
)
from stdit.weights.layouts.positions import (
    frames_limits,
    spatial_settings,
    spatial_table,
    table_limits,
    temporal_settings,
    temporal_table,
)

# ---------------------------------------------------------------------------------------------- v1


def _v1_settings(foreign: Foreign) -> dict[str, Any]:
    found = dimensions(foreign, count_blocks(foreign, "blocks."), "blocks.0") | text_of(foreign)
    return found | spatial_settings(foreign) | temporal_settings(foreign, "pos_embed_temporal")


def _v1_rules(c: ModelConfig) -> list[Rule]:
    blocks = [rule for i in range(c.dimensions[1]) for rule in block(c, i)]
    learned = [r._replace(theirs=("pos_embed_temporal",)) if r.ours == "temp_embed" else r for r in body(c)]
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
    free=DIMENSIONS | PLACES | TIMES | TEXT,
    settings=_v1_settings,
    rules=_v1_rules,
    tables=_v1_tables,
    limits=lambda c: table_limits(c, "STDiT v1") + frames_limits(c, "STDiT v1") + _text_limits(c, "STDiT v1"),
)


# -------------------------------------------------------------------------------------------- v1.2


def _v3_settings(foreign: Foreign) -> dict[str, Any]:
    pairs = count_blocks(foreign, "spatial_blocks.")
    norm = "spatial_blocks.0.attn.q_norm.weight"
    found = dimensions(foreign, pairs, "spatial_blocks.0", (norm,)) | text_of(foreign)
    found |= {"depth": 2 * pairs, "qk_norm": "rms" if norm in foreign.state else None}
    if isinstance(foreign.config.get("input_sq_size"), int):
        found["position_reference"] = foreign.config["input_sq_size"]
    return found


def _v3_rules(c: ModelConfig) -> list[Rule]:
    rules = linear("x_embedder.proj") + body(c)
    for i in range(c.dimensions[1]):
        kind = "temporal" if i % 2 else "spatial"
        rules += block(c, i, f"{kind}_blocks.{i // 2}")
    return rules


def _v3_tables(c: ModelConfig) -> Tables:
    """The frequencies of the rotation over time, as rotary_embedding_torch makes them."""
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
        "micro_conditions": ("fps",),
        "null_text": "sequence",
    },
    free=DIMENSIONS | TEXT | {"qk_norm", "position_reference"},
    settings=_v3_settings,
    rules=_v3_rules,
    tables=_v3_tables,
    limits=_v3_limits,
)
