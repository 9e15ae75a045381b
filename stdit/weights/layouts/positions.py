"""Tables of positions in published files: which coordinates they code, and how to make them anew.

S = H W patches of a frame · D hidden size · F frames. A table of sines and cosines holds nothing that a few numbers do
not say; it is read, checked against those numbers, and left out. One that is something else was learned, and is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.config.model import ModelConfig
from stdit.models.embeddings import sincos_spatial, sincos_temporal
from stdit.weights.layouts.layout import Foreign, Tables, shape

CPU = torch.device("cpu")

# What published models were trained with, for files without a table.
PUBLISHED = (
    "PixArt-α 256: position_base=16, 512: 32 (position_interpolation=1), 1024: position_base=64 position_interpolation=2; "
    "PixArt-Σ 256: position_base=16 position_interpolation=0.5, 512: 32 and 1, 1024: 64 and 2, 2048: 128 and 4"
)


class Plane(NamedTuple):
    """A table's grid, with coordinates 0, 1, 2, … over `interpolation` along both axes."""

    height: int
    width: int
    interpolation: float


def spatial_settings(foreign: Foreign, name: str = "pos_embed") -> dict[str, Any]:
    """`positions` and its numbers, of a table (1, S, D) in the file, or as the user set them.

    A square grid of n patches a side is the base that other grids are rescaled to, as PixArt and diffusers do.
    ValueError: there is no table and nothing was set; or what was set is not what the table holds.
    """
    table, told = foreign.state.get(name), foreign.overrides
    if table is not None:
        _check_finite(foreign, name)
    keys = {"positions", "position_base", "position_interpolation", "position_grid", "position_reference"}
    if keys & set(told):
        return {}
    if table is None:
        raise ValueError(
            f"{foreign.where}: no {name} in the file, so it does not say which positions it was trained with; "
            f"give --set position_base=… position_interpolation=… ({PUBLISHED})"
        )
    plane = read_spatial(table)
    if plane is None:
        side = math.isqrt(table.shape[-2])
        if side * side != table.shape[-2]:
            raise ValueError(
                f"{foreign.where}: {name} {tuple(table.shape)} is a learned table of {table.shape[-2]} positions, which is "
                "no square; give --set positions=learned position_grid=[H,W], its patches"
            )
        return {"positions": "learned", "position_grid": (side, side)}
    base = plane.height if plane.height == plane.width else None
    return {"positions": "sincos", "position_base": base, "position_interpolation": plane.interpolation}


def _check_finite(foreign: Foreign, name: str) -> None:
    """ValueError for a table that has not three axes, or has values that no position could have."""
    shape(foreign, name, 3)
    table = foreign.state[name]
    if wrong := table.numel() - int(table.isfinite().sum()):
        raise ValueError(f"{foreign.where}: {name} has {wrong} of {table.numel()} values that are not finite")


def temporal_settings(foreign: Foreign, name: str) -> dict[str, Any]:
    """`temporal_positions` and its numbers, of a table (1, F, D)."""
    table, told = foreign.state.get(name), foreign.overrides
    if table is not None:
        _check_finite(foreign, name)
    if {"temporal_positions", "temporal_interpolation", "position_frames"} & set(told):
        return {}
    if table is None:
        raise ValueError(
            f"{foreign.where}: no {name} in the file, so it does not say which positions in time it was trained with; "
            "give --set temporal_interpolation=… position_frames=…"
        )
    frames, size = table.shape[-2:]
    at = _coordinates(table.reshape(frames, size).double())
    step = float(at[-1]) / (frames - 1) if frames > 1 else 1.0
    for interpolation in _candidates(step):
        made = sincos_temporal(frames, size, interpolation, False, CPU, torch.float32)
        if agrees(table.reshape(frames, size), made):
            return {
                "temporal_positions": "sincos",
                "temporal_interpolation": interpolation,
                "position_frames": frames,
            }
    return {"temporal_positions": "learned", "position_frames": frames}


def read_spatial(table: Tensor) -> Plane | None:
    """The grid and the scale of a sine-cosine table (1, S, D); None for another kind of table."""
    tokens, size = table.shape[-2:]
    if size % 4 or not tokens or not table.isfinite().all():
        return None
    codes = table.reshape(tokens, size).double()
    columns, rows = codes.chunk(2, dim=1)  # the codes of w and h
    later = (rows != rows[:1]).any(1).nonzero()
    width = int(later[0]) if len(later) else tokens
    if tokens % width:
        return None
    height = tokens // width
    axis = (columns[:width], width) if width > 1 else (rows[::width], height)
    step = float(_coordinates(axis[0])[-1]) / (axis[1] - 1) if axis[1] > 1 else 1.0
    for interpolation in _candidates(step):
        made = sincos_spatial(height, width, size, None, interpolation, None, CPU, torch.float32)
        if agrees(table.reshape(tokens, size), made):
            return Plane(height, width, interpolation)
    return None


def _coordinates(codes: Tensor) -> Tensor:
    """Of [sin, cos] codes (n, d) at frequencies 10000^(-i / (d/2)): the coordinates (n,), 0 and up.

    The lowest frequency tells roughly where, each higher one more exactly.
    """
    half = codes.shape[1] // 2
    at = torch.zeros(codes.shape[0], dtype=torch.float64)
    for i in reversed(range(half)):
        frequency = 10000.0 ** (-i / half)
        angle = torch.atan2(codes[:, i], codes[:, half + i])
        turns = torch.zeros_like(at) if i == half - 1 else ((at * frequency - angle) / (2 * math.pi)).round()
        at = (angle + 2 * math.pi * turns) / frequency
    return at


def _candidates(step: float) -> Iterator[float]:
    """Interpolations that a step between neighbours may stand for: simple fractions first."""
    if not math.isfinite(step) or step <= 0:
        return
    exact = 1 / step
    tried: set[float] = set()
    for bound in (1, 2, 3, 4, 8, 10, 16, 32, 64, 100):
        near = float(Fraction(exact).limit_denominator(bound))
        if near > 0 and abs(near - exact) < 1e-2 * exact and near not in tried:
            tried.add(near)
            yield near
    yield exact


def agrees(table: Tensor, made: Tensor) -> bool:
    """Whether a table in a file is `made` (float32), as far as its precision, or a half precision that it went through, goes."""
    if table.shape != made.shape or not table.is_floating_point():
        return False
    if torch.equal(table, made.to(table.dtype)):
        return True
    found = table.float()
    if any(torch.equal(found, made.to(half).float()) for half in (torch.float16, torch.bfloat16)):
        return True
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(table.dtype, 2e-5)
    return bool((found - made).abs().max() <= tolerance)


def check_tables(foreign: Foreign, tables: Tables, settings: ModelConfig) -> None:
    """ValueError for a table in the file that is not what the config makes."""
    c = settings
    for name, made in tables.items():
        table = foreign.state.get(name)
        if table is None:
            continue
        if made is None:  # of a grid that only the table knows
            plane = read_spatial(table)
            if plane is None or plane.interpolation != c.position_interpolation:
                raise ValueError(
                    f"{foreign.where}: {name} {tuple(table.shape)} is not the table of position_interpolation "
                    f"{c.position_interpolation} (it reads as {plane})"
                )
        elif not agrees(table, made):
            differs = f"is {tuple(table.shape)}, not {tuple(made.shape)}"
            if table.shape == made.shape:
                differs = f"differs by {(table.float() - made).abs().max():.3g}"
            keys = (
                "position_base",
                "position_interpolation",
                "position_grid",
                "temporal_interpolation",
                "position_frames",
            )
            numbers = ", ".join(f"{key} {getattr(c, key)}" for key in keys if getattr(c, key) is not None)
            raise ValueError(f"{foreign.where}: {name} is not what the config makes of it ({numbers}): it {differs}")


def table_grid(foreign: Foreign, tables: Tables) -> tuple[int, int] | None:
    """The grid of the file's table of positions, where the config does not say it: of an oblong one, which has no base."""
    for name, made in tables.items():
        if made is None and name in foreign.state and (plane := read_spatial(foreign.state[name])):
            return plane.height, plane.width
    return None


def of_grid(tables: Tables, c: ModelConfig, grid: tuple[int, int] | None) -> Tables:
    """The tables of a layout, with that of `grid` where the config does not say of which."""
    if grid is None:
        return tables
    numbers = (*grid, c.dimensions[0], None, c.position_interpolation, None, CPU, torch.float32)
    return {n: sincos_spatial(*numbers)[None].clone() if made is None else made for n, made in tables.items()}


def spatial_table(c: ModelConfig, name: str = "pos_embed") -> Tables:
    """The table (1, S, D) that a file has of these positions; none where they were learned."""
    if c.positions != "sincos":
        return {}
    if c.position_base is None and c.position_grid is None:
        return {name: None}
    height, width = c.position_grid or (c.position_base or 0, c.position_base or 0)
    numbers = (c.position_base, c.position_interpolation, c.position_grid)
    return {name: sincos_spatial(height, width, c.dimensions[0], *numbers, CPU, torch.float32)[None].clone()}


def temporal_table(c: ModelConfig, name: str) -> Tables:
    """The table (1, F, D) of positions in time."""
    if c.time_positions != "sincos" or c.position_frames is None:
        return {}
    numbers = (c.position_frames, c.dimensions[0], c.temporal_interpolation)
    return {name: sincos_temporal(*numbers, False, CPU, torch.float32)[None].clone()}


def table_limits(c: ModelConfig, title: str) -> list[str]:
    """Why a file's table cannot be made of these positions."""
    if c.positions not in ("sincos", "learned"):
        return [f"positions is {c.positions!r}; {title} has 'sincos', or a table of its own"]
    if c.positions == "sincos" and c.position_grid is not None:
        return [f"position_grid is {c.position_grid}, of whose sine-cosine table the centre is taken; {title} has none"]
    return []


def frames_limits(c: ModelConfig, title: str) -> list[str]:
    """Why a file's table of positions in time cannot be made."""
    if c.time_positions not in ("sincos", "learned"):
        return [f"temporal_positions is {c.time_positions!r}; {title} has 'sincos', or a table of its own"]
    if c.position_frames is None:
        return [f"position_frames is None; {title} has a table of so many frames: give --set position_frames=N"]
    return []
