"""Position embeddings: sincos and RoPE tables, and where they enter the model.

T, H, W     frames, rows, columns of the grid of patches
S           tokens of a frame, H W
N           tokens, T S, frame by frame
D, d        hidden size, head width

Tables depend on shape and settings only, so they are computed once (frequencies in float64, then cast) and cached.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._guards import detect_fake_mode

from stdit.config.model import ModelConfig

Grid = tuple[int, int, int]
_Table = TypeVar("_Table")


class Rope(NamedTuple):
    """Rotations of N tokens: cos and sin, each (N, 1, d/2) float32."""

    cos: Tensor
    sin: Tensor


class PositionEmbeddings(NamedTuple):
    """Positions of one grid: tables to add, `spatial` (S, D) and `temporal` (T, D), and the rotations of spatial (or
    full) attention, `rope`, and of temporal attention, `rope_temp`."""

    spatial: Tensor | None
    temporal: Tensor | None
    rope: Rope | None
    rope_temp: Rope | None


def add_positions(
    config: ModelConfig,
    learned: tuple[Tensor | None, Tensor | None],
    x: Tensor,
    grid: Grid,
    pixels: tuple[Any, Any],
) -> tuple[Tensor, PositionEmbeddings]:
    """Tokens x (B, T, S, D) plus positions, and the position embeddings that attention needs.

    learned: spatial and temporal tables, (1, H W, D) and (1, F, D), where the model has them. pixels: height and width
    of the clip, read where `position_reference` is set. Factorized models add temporal tables in their blocks.
    """
    c, (t, h, w) = config, grid
    pos_embed, temp_embed = learned
    full = c.attention == "full"
    base, interpolation = c.position_base, c.position_interpolation
    if c.position_reference is not None:
        height, width = (float(torch.as_tensor(p).reshape(-1)[0]) for p in pixels)
        base, interpolation = round((h * w) ** 0.5), (height * width) ** 0.5 / c.position_reference
    size, _, heads = c.dimensions
    spatial = temporal = rope = rope_temp = None
    if c.positions == "sincos":
        spatial = sincos_spatial(h, w, size, base, interpolation, c.position_grid, x.device, x.dtype)
    elif pos_embed is not None and c.position_grid is not None:
        rows, columns = center_crop(c.position_grid[0], h), center_crop(c.position_grid[1], w)
        spatial = pos_embed[0].unflatten(0, c.position_grid)[rows, columns].flatten(0, 1)
    elif c.positions == "rope":
        scales = (c.temporal_interpolation, interpolation)
        make = rope_in_space if full and c.time_positions != "rope" else rope_3d
        rope = make((t if full else 1, h, w), size // heads, base, scales, x.device)
    if c.time_positions == "sincos":
        temporal = sincos_temporal(t, size, c.temporal_interpolation, full, x.device, x.dtype)
    elif temp_embed is not None:
        temporal = temp_embed[0, :t]
        temporal = temporal - temporal[:1] if full else temporal
    elif c.time_positions == "rope" and rope is None and full:
        rope = rope_in_time(grid, size // heads, c.temporal_interpolation, x.device)
    elif c.time_positions == "rope" and not full:
        rope_temp = rope_1d(t, size // heads, c.temporal_interpolation, x.device)
    if spatial is not None:
        x = x + spatial
    if full and temporal is not None:  # relative to the first frame, whose entry is 0
        x = x + temporal[:, None]
    return x, PositionEmbeddings(spatial, temporal, rope, rope_temp)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """x (B, N, H, d) with neighbouring channels (2i, 2i + 1) rotated as pairs, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack([even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


# ----------------------------------------------------------------------------------------- tables


def cached_table(make: Callable[..., _Table]) -> Callable[..., _Table]:
    """Caches the last 16 results of `make`; they serve training even if first computed in inference mode."""

    @lru_cache(maxsize=16)
    def cached(*settings: object) -> _Table:
        with torch.inference_mode(False), torch.no_grad():
            return make(*settings)

    @wraps(make)
    def table(*settings: object) -> _Table:  # compiled graphs keep their own constants; fake tensors are not cached
        bypass = torch.compiler.is_compiling() or detect_fake_mode() is not None
        return make(*settings) if bypass else cached(*settings)

    return table


def _spatial_axis(n: int, base: int | None, interpolation: float) -> Tensor:
    """Coordinates of n patches: 0 … n-1, or, with a base, 0 … base whatever n; over `interpolation`. float32, as
    published."""
    at = torch.arange(n, dtype=torch.float32)
    return (at if base is None else at / (n / base)) / interpolation


def _sincos_axis(at: Tensor, size: int) -> Tensor:
    """[sin, cos] of coordinates (n,) -> (n, size), at frequencies 10000^(-i / (size/2))."""
    omega = 1.0 / 10000 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angles = at[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def center_crop(table: int, n: int) -> slice:
    """The middle n entries of a table."""
    first = (table - n) // 2
    return slice(first, first + n)


@cached_table
def sincos_spatial(
    height: int,
    width: int,
    hidden_size: int,
    base: int | None,
    interpolation: float,
    table: tuple[int, int] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """(S, D): the first half encodes w, the second h, each [sin, cos] (Peebles & Xie 2023; scales as PixArt).

    table: (H, W) of a larger grid whose coordinates are centre-cropped (SD3); None: the grid's own coordinates.
    """
    rows, columns = table or (height, width)
    w = _sincos_axis(_spatial_axis(columns, base, interpolation)[center_crop(columns, width)], hidden_size // 2)
    h = _sincos_axis(_spatial_axis(rows, base, interpolation)[center_crop(rows, height)], hidden_size // 2)
    both = torch.cat([w.repeat(height, 1), h.repeat_interleave(width, 0)], dim=1)
    return both.to(device, dtype)


@cached_table
def sincos_temporal(
    frames: int, hidden_size: int, interpolation: float, from_first: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(T, D): [sin, cos] of the frame's number over `interpolation`; `from_first`: minus the first frame's, which is
    then 0."""
    table = _sincos_axis(torch.arange(frames, dtype=torch.float64) / interpolation, hidden_size)
    return (table - table[:1] if from_first else table).to(device, dtype)


def _rope_angles(at: Tensor, pairs: int) -> Tensor:
    """Angles (n, pairs) of coordinates (n,), at frequencies 10000^(-i / pairs) (Su et al. 2021). float64."""
    return at[:, None] * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))


def _rope(angles: Tensor, device: torch.device) -> Rope:
    return Rope(*(f(angles)[:, None].to(device, torch.float32) for f in (torch.cos, torch.sin)))


@cached_table
def rope_3d(
    grid: Grid, head_dim: int, base: int | None, interpolation: tuple[float, float], device: torch.device
) -> Rope:
    """Rotations over (t, h, w): d/2 pairs, a third each for h and w, the rest for t. interpolation: (time, space).

    The first frame is not rotated along t, so the table of one frame (T = 1) serves spatial attention.
    """
    t, h, w = grid
    side = max(1, head_dim // 6)
    frames = _rope_angles(torch.arange(t, dtype=torch.float64) / interpolation[0], head_dim // 2 - 2 * side)
    rows = _rope_angles(_spatial_axis(h, base, interpolation[1]), side)
    columns = _rope_angles(_spatial_axis(w, base, interpolation[1]), side)
    angles = [
        frames.repeat_interleave(h * w, 0),
        rows.repeat_interleave(w, 0).repeat(t, 1),
        columns.repeat(t * h, 1),
    ]
    return _rope(torch.cat(angles, dim=1), device)


@cached_table
def rope_1d(frames: int, head_dim: int, interpolation: float, device: torch.device) -> Rope:
    """Rotations over t, all d/2 pairs (temporal attention, as in Open-Sora)."""
    return _rope(_rope_angles(torch.arange(frames, dtype=torch.float64) / interpolation, head_dim // 2), device)


@cached_table
def rope_in_space(
    grid: Grid, head_dim: int, base: int | None, interpolation: tuple[float, float], device: torch.device
) -> Rope:
    """Rotations over (h, w) of all N tokens, the same in every frame."""
    frame = rope_3d((1, *grid[1:]), head_dim, base, interpolation, device)
    return Rope(*(table.repeat(grid[0], 1, 1) for table in frame))


@cached_table
def rope_in_time(grid: Grid, head_dim: int, interpolation: float, device: torch.device) -> Rope:
    """Rotations over t of all N tokens, the same at every (h, w)."""
    over_time = rope_1d(grid[0], head_dim, interpolation, device)
    return Rope(*(table.repeat_interleave(grid[1] * grid[2], 0) for table in over_time))


@cached_table
def pad_rope(rope: Rope, grid: Grid, count: int, full: bool) -> Rope:
    """`rope` for frames with `count` in-context tokens each after the patches, which are not rotated."""

    def padded(table: Tensor, value: float) -> Tensor:
        frames = table.unflatten(0, (grid[0] if full else 1, -1))
        return F.pad(frames, (0, 0, 0, 0, 0, count), value=value).flatten(0, 1)

    return Rope(padded(rope.cos, 1.0), padded(rope.sin, 0.0))
