"""Where tokens stand: what is added to them for it, and what attention needs to know of it.

B batch · (T, H, W) grid of patches · S = H W · D hidden size · d head width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.config.model import ModelConfig
from stdit.models.embeddings import (
    Grid,
    Rope,
    as_vector,
    centre,
    rope_1d,
    rope_3d,
    rope_in_space,
    rope_in_time,
    sincos_spatial,
    sincos_temporal,
)

# Learned positions, (1, H W, D) and (1, F, D), where the model has them.
Tables = tuple[Tensor | None, Tensor | None]


class Places(NamedTuple):
    """Positions of one grid. `spatial` (S, D) and `temporal` (T, D), codes to add; `rope` of tokens that attend within
    a frame (or to all), `rope_temp` of those that attend over time."""

    spatial: Tensor | None
    temporal: Tensor | None
    rope: Rope | None
    rope_temp: Rope | None


def placed(
    config: ModelConfig, tables: Tables, x: Tensor, grid: Grid, pixels: tuple[Any, Any]
) -> tuple[Tensor, Places]:
    """Tokens (B, T, S, D) with what is added to them for their places, and what attention needs to know of these."""
    c, (t, h, w) = config, grid
    pos_embed, temp_embed = tables
    all_at_once = c.attention == "full"
    base, interpolation = c.position_base, c.position_interpolation
    if c.position_reference is not None:
        height, width = (float(as_vector(p, torch.device("cpu"))[0]) for p in pixels)
        base, interpolation = round((h * w) ** 0.5), (height * width) ** 0.5 / c.position_reference
    size, _, heads = c.dimensions
    spatial = temporal = rope = rope_temp = None
    if c.positions == "sincos":
        spatial = sincos_spatial(h, w, size, base, interpolation, c.position_grid, x.device, x.dtype)
    elif pos_embed is not None and c.position_grid is not None:
        rows, columns = centre(c.position_grid[0], h), centre(c.position_grid[1], w)
        spatial = pos_embed[0].unflatten(0, c.position_grid)[rows, columns].flatten(0, 1)
    elif c.positions == "rope":
        full = all_at_once and c.time_positions == "rope"
        scales = (c.temporal_interpolation, interpolation)
        make = rope_in_space if all_at_once and not full else rope_3d
        rope = make((t if all_at_once else 1, h, w), size // heads, base, scales, x.device)
    if c.time_positions == "sincos":
        temporal = sincos_temporal(t, size, c.temporal_interpolation, all_at_once, x.device, x.dtype)
    elif temp_embed is not None:
        temporal = temp_embed[0, :t]
        temporal = temporal - temporal[:1] if all_at_once else temporal
    elif c.time_positions == "rope" and rope is None and all_at_once:
        rope = rope_in_time(grid, size // heads, c.temporal_interpolation, x.device)
    elif c.time_positions == "rope" and not all_at_once:
        rope_temp = rope_1d(t, size // heads, c.temporal_interpolation, x.device)
    if spatial is not None:
        x = x + spatial
    if all_at_once and temporal is not None:  # the first frame's is 0
        x = x + temporal[:, None]
    return x, Places(spatial, temporal, rope, rope_temp)
