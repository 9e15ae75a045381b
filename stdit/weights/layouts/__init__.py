"""Layouts of published weights: how each is detected, and how it maps to ours (stdit.weights.convert)."""

from __future__ import annotations

from collections.abc import Iterable

from stdit.weights.layouts.diffusers import DIFFUSERS_DIT, DIFFUSERS_LATTE, DIFFUSERS_PIXART
from stdit.weights.layouts.layout import Layout, format_names
from stdit.weights.layouts.opensora import V1, V3
from stdit.weights.layouts.original import DIT, LATTE, PIXART
from stdit.weights.layouts.rineau import RINEAU
from stdit.weights.layouts.sd3 import DIFFUSERS_SD3

LAYOUTS: tuple[Layout, ...] = (
    *(DIT, PIXART, LATTE, V1, V3, RINEAU),
    *(DIFFUSERS_DIT, DIFFUSERS_PIXART, DIFFUSERS_LATTE, DIFFUSERS_SD3),
)


def detect_layout(keys: Iterable[str], where: str) -> Layout:
    """The layout of a state dict with these keys. ValueError: no known layout has them."""
    names = list(keys)

    def prefix(text: str) -> bool:
        return any(name.startswith(text) for name in names)

    def part(text: str) -> bool:
        return any(text in name for name in names)

    for matches, title, supported in (
        (prefix("t_block_temp.") or part(".scale_shift_table_temporal"), "Open-Sora STDiT2 (1.1)", (V1, V3)),
    ):
        if matches:
            others = " and ".join(layout.title for layout in supported)
            raise ValueError(f"{where}: weights of {title}, which is not supported; {others} are")
    # The first match wins: keys unique to a layout come before those that it shares with the next.
    tests = (
        (prefix("first_layer."), RINEAU),
        (prefix("spatial_blocks.") or (prefix("temporal_blocks.") and prefix("rope.")), V3),
        (prefix("temporal_transformer_blocks."), DIFFUSERS_LATTE),
        (prefix("transformer_blocks.") and (part(".norm1_context.") or prefix("time_text_embed.")), DIFFUSERS_SD3),
        (prefix("transformer_blocks.") and prefix("adaln_single."), DIFFUSERS_PIXART),
        (prefix("transformer_blocks.") and part(".norm1.emb."), DIFFUSERS_DIT),
        (prefix("blocks.") and part(".attn_temp."), V1),
        (prefix("blocks.") and part(".adaLN_modulation.") and prefix("temp_embed"), LATTE),
        (prefix("blocks.") and (prefix("t_block.") or part(".cross_attn.")), PIXART),
        (prefix("blocks.") and part(".adaLN_modulation."), DIT),
    )
    for matches, layout in tests:
        if matches:
            return layout
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise ValueError(f"{where}: no known layout ({known}) has these keys: {format_names(names) or '(none)'}")
