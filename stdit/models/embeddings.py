"""Patches and positions: latents to tokens, where a token stands in space and time, codes of scalars.

B batch · C channels · (T, H, W) grid of patches · S = H W · N = T S tokens, frames outermost
D hidden size · d head width

Tables depend on shape and settings alone: they are made once (frequencies in float64, then cast), and kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch._guards import detect_fake_mode

Grid = tuple[int, int, int]
_Table = TypeVar("_Table")


class Rope(NamedTuple):
    """Rotations of N tokens: cos and sin, each (N, 1, d/2) float32."""

    cos: Tensor
    sin: Tensor


def kept(make: Callable[..., _Table]) -> Callable[..., _Table]:
    """`make`, remembering its last 16 results; they serve training even if first asked for in inference mode."""

    @lru_cache(maxsize=16)
    def made(*settings: object) -> _Table:
        with torch.inference_mode(False), torch.no_grad():
            return make(*settings)

    @wraps(make)
    def found(*settings: object) -> _Table:  # a compiled graph keeps its own constants; fake tensors are for once
        passing = torch.compiler.is_compiling() or detect_fake_mode() is not None
        return make(*settings) if passing else made(*settings)

    return found


# ---------------------------------------------------------------------------------------- patches


class PatchConv(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product over patches: same weights, same result."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T pt, H ph, W pw), any dtype -> (B, D, T, H, W)."""
        pt, ph, pw = self.kernel_size  # and stride
        patches = rearrange(
            input.to(self.weight.dtype), "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw
        )
        return rearrange(F.linear(patches, self.weight.flatten(1), self.bias), "b t h w d -> b d t h w")


class PatchEmbed3D(nn.Module):
    """Latents to tokens: patches of (pt, ph, pw), one linear map each (`proj`, a Conv3d as published)."""

    def __init__(self, channels: int, hidden_size: int, patch_size: Grid) -> None:
        super().__init__()
        self.proj = PatchConv(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T pt, H ph, W pw) -> (B, N, D)."""
        return rearrange(self.proj(latents), "b d t h w -> b (t h w) d")


def unpatchify(tokens: Tensor, grid: Grid, patch_size: Grid) -> Tensor:
    """(B, N, pt ph pw C), channels innermost as DiT has them -> (B, C, T pt, H ph, W pw)."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    return rearrange(tokens, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)


# -------------------------------------------------------------------------------------- positions


def _spatial_axis(n: int, base: int | None, interpolation: float) -> Tensor:
    """Coordinates of n patches: 0 … n-1, or, with a base, 0 … base whatever n; over `interpolation`. float32, as published."""
    at = torch.arange(n, dtype=torch.float32)
    return (at if base is None else at / (n / base)) / interpolation


def _sincos_axis(at: Tensor, size: int) -> Tensor:
    """[sin, cos] code of coordinates (n,) -> (n, size), at frequencies 10000^(-i / (size/2))."""
    omega = 1.0 / 10000 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angles = at[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def centre(table: int, n: int) -> slice:
    """The middle n of `table` places."""
    first = (table - n) // 2
    return slice(first, first + n)


@kept
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
    """(S, D): the first half codes w, the second h, each [sin, cos] (Peebles & Xie 2023; scales as PixArt).

    table: a grid (H, W) whose coordinates are taken, and of those the centre (SD3), in place of the grid's own.
    """
    rows, columns = table or (height, width)
    w = _sincos_axis(_spatial_axis(columns, base, interpolation)[centre(columns, width)], hidden_size // 2)
    h = _sincos_axis(_spatial_axis(rows, base, interpolation)[centre(rows, height)], hidden_size // 2)
    both = torch.cat([w.repeat(height, 1), h.repeat_interleave(width, 0)], dim=1)
    return both.to(device, dtype)


@kept
def sincos_temporal(
    frames: int, hidden_size: int, interpolation: float, from_first: bool, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(T, D): [sin, cos] of the frame's number over `interpolation`; `from_first`: less the first frame's, which is then 0."""
    table = _sincos_axis(torch.arange(frames, dtype=torch.float64) / interpolation, hidden_size)
    return (table - table[:1] if from_first else table).to(device, dtype)


def _rope_angles(at: Tensor, pairs: int) -> Tensor:
    """Angles (n, pairs) of coordinates (n,), at frequencies 10000^(-i / pairs) (Su et al. 2021). float64."""
    return at[:, None] * 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / max(pairs, 1))


def _rope(angles: Tensor, device: torch.device) -> Rope:
    return Rope(*(f(angles)[:, None].to(device, torch.float32) for f in (torch.cos, torch.sin)))


@kept
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


@kept
def rope_1d(frames: int, head_dim: int, interpolation: float, device: torch.device) -> Rope:
    """Rotations over t alone, all d/2 pairs (temporal attention, as Open-Sora has it)."""
    return _rope(_rope_angles(torch.arange(frames, dtype=torch.float64) / interpolation, head_dim // 2), device)


@kept
def rope_in_space(
    grid: Grid, head_dim: int, base: int | None, interpolation: tuple[float, float], device: torch.device
) -> Rope:
    """Rotations over (h, w) of all N tokens, every frame's alike."""
    frame = rope_3d((1, *grid[1:]), head_dim, base, interpolation, device)
    return Rope(*(table.repeat(grid[0], 1, 1) for table in frame))


@kept
def rope_in_time(grid: Grid, head_dim: int, interpolation: float, device: torch.device) -> Rope:
    """Rotations over t alone of all N tokens, every place's alike."""
    over_time = rope_1d(grid[0], head_dim, interpolation, device)
    return Rope(*(table.repeat_interleave(grid[1] * grid[2], 0) for table in over_time))


@kept
def with_still(rope: Rope, grid: Grid, count: int, full: bool) -> Rope:
    """`rope` for frames with `count` more tokens each, after the others, which are not rotated. Kept as long as `rope` is
    the same object, as those above are."""

    def grown(table: Tensor, still: float) -> Tensor:
        frames = table.unflatten(0, (grid[0] if full else 1, -1))
        return F.pad(frames, (0, 0, 0, 0, 0, count), value=still).flatten(0, 1)

    return Rope(grown(rope.cos, 1.0), grown(rope.sin, 0.0))


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """x (B, N, H, d) with neighbouring channels (2i, 2i + 1) rotated as pairs, in float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * rope.cos - odd * rope.sin, even * rope.sin + odd * rope.cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


# ------------------------------------------------------------------------------- codes of scalars


@kept
def _frequencies(half: int, shift: int, device: torch.device) -> Tensor:
    """(half,) float32: 10000^(-i / (half - shift))."""
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - shift)).to(device)


def timestep_code(values: Tensor, size: int, shift: int = 0) -> Tensor:
    """Scalars (B,), any dtype -> (B, size) float32, [cos, sin]; timesteps are on the schedulers' scale, 0 to 1000.

    shift 0: DiT's frequencies and PixArt's; 1: those of diffusers' DiT.
    """
    angles = values.float()[:, None] * _frequencies(size // 2, shift, values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def as_vector(value: Any, device: torch.device) -> Tensor:
    """A number, (), (1,) or (B,) -> (1,) or (B,). One value expanded over a batch comes back as (1,): the batch shares it."""
    vector = torch.as_tensor(value, device=device).reshape(-1)
    return vector[:1] if vector.stride(0) == 0 else vector
