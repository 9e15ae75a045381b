"""Layouts that published weights lie in: what each is recognised by, and how it maps to ours (stdit.weights.convert)."""

from __future__ import annotations

from collections.abc import Iterable

from stdit.weights.layouts.hub import HUB_DIT, HUB_LATTE, HUB_PIXART
from stdit.weights.layouts.layout import Layout, listed
from stdit.weights.layouts.opensora import V1, V3
from stdit.weights.layouts.original import DIT, LATTE, PIXART
from stdit.weights.layouts.rineau import RINEAU
from stdit.weights.layouts.sd3 import HUB_SD3

LAYOUTS: tuple[Layout, ...] = (DIT, PIXART, LATTE, V1, V3, RINEAU, HUB_DIT, HUB_PIXART, HUB_LATTE, HUB_SD3)


def recognised(names: Iterable[str], where: str) -> Layout:
    """The layout of tensors of these names. ValueError: none is known that has such names."""
    found = list(names)

    def first(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in found)

    def part(text: str) -> bool:
        return any(text in name for name in found)

    # The first that holds: what only this layout has comes before what it shares with the next.
    marks = (
        (first("first_layer."), RINEAU),
        (first("spatial_blocks.") or (first("temporal_blocks.") and first("rope.")), V3),
        (first("temporal_transformer_blocks."), HUB_LATTE),
        (first("transformer_blocks.") and (part(".norm1_context.") or first("time_text_embed.")), HUB_SD3),
        (first("transformer_blocks.") and first("adaln_single."), HUB_PIXART),
        (first("transformer_blocks.") and part(".norm1.emb."), HUB_DIT),
        (first("blocks.") and part(".attn_temp."), V1),
        (first("blocks.") and part(".adaLN_modulation.") and first("temp_embed"), LATTE),
        (first("blocks.") and (first("t_block.") or part(".cross_attn.")), PIXART),
        (first("blocks.") and part(".adaLN_modulation."), DIT),
    )
    for holds, layout in marks:
        if holds:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"{where}: no known layout ({known}) has such names: {listed(found) or 'none at all'}")
