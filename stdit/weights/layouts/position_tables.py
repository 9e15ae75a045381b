"""Position tables in published files: detects their parameters, and recomputes them on export.

S = H W patches a frame · D hidden size · F frames. A sine-cosine table is determined by a few config values: it is
checked against them and dropped on import. Any other table was learned, and is kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.config.model import ModelConfig
from stdit.models.positions import sincos_spatial, sincos_temporal
from stdit.weights.layouts.layout import SourceWeights, Tables, tensor_shape

CPU = torch.device("cpu")

# Positions of published models, for files without a table.
PUBLISHED = (
    "PixArt-α 256: position_base=16, 512: 32 (position_interpolation=1), 1024: position_base=64 position_interpolation=2; "
    "PixArt-Σ 256: position_base=16 position_interpolation=0.5, 512: 32 and 1, 1024: 64 and 2, 2048: 128 and 4"
)


class SpatialTable(NamedTuple):
    """A sine-cosine table's grid; coordinates are 0, 1, 2, … divided by `interpolation`."""

    height: int
    width: int
    interpolation: float


def infer_spatial_positions(source: SourceWeights, name: str = "pos_embed") -> dict[str, Any]:
    """`positions` and its parameters, from a table (1, S, D); {} where the user set another kind.

    The side of a square grid becomes position_base, to which other grids are rescaled, as in PixArt and diffusers.
    ValueError: no table and no override, or a table that is not finite or not square.
    """
    table = source.state.get(name)
    if table is not None:
        _check_finite(source, name)
    keys = {"positions", "position_base", "position_interpolation", "position_grid", "position_reference"}
    changed = keys & set(source.overrides)
    if changed - {"position_base"} or (changed and table is None):
        return {}
    if table is None:
        raise ValueError(
            f"{source.where}: no {name} in the file, which therefore does not determine its positions; "
            f"give --set position_base=… position_interpolation=… ({PUBLISHED})"
        )
    detected = detect_spatial_table(table)
    if changed:
        return {} if detected is None else {"position_interpolation": detected.interpolation}
    if detected is None:
        side = math.isqrt(table.shape[-2])
        if side * side != table.shape[-2]:
            raise ValueError(
                f"{source.where}: {name} {tuple(table.shape)} is a learned table of {table.shape[-2]} positions, not a "
                "square number; give --set positions=learned position_grid=[H,W], in patches"
            )
        return {"positions": "learned", "position_grid": (side, side)}
    base = detected.height if detected.height == detected.width else None
    return {"positions": "sincos", "position_base": base, "position_interpolation": detected.interpolation}


def choose_other_grids(source: SourceWeights, found: dict[str, Any], title: str, rescaled: bool) -> dict[str, Any]:
    """`found` positions for layouts whose code has one grid: on others, patches are rescaled to it, or counted from 0
    as that code does when constructed for them. A note names the choice."""
    side = found.get("position_base")
    if side is None:
        return found
    rule = (
        f"other grids are rescaled to it; --set position_base=null counts their patches from 0, as {title}'s code does"
    )
    if not rescaled:
        rule = (
            f"patches of other grids are counted from 0, as in {title}'s code; --set position_base={side} rescales them"
        )
    source.notes.append(f"positions are those of {side}x{side} patches: {rule}")
    return found if rescaled else found | {"position_base": None}


def _check_finite(source: SourceWeights, name: str) -> None:
    """ValueError for a table that is not 3D, or has NaN or infinite values."""
    tensor_shape(source, name, 3)
    table = source.state[name]
    if wrong := table.numel() - int(table.isfinite().sum()):
        raise ValueError(f"{source.where}: {name} has {wrong} non-finite values of {table.numel()}")


def infer_temporal_positions(source: SourceWeights, name: str) -> dict[str, Any]:
    """`temporal_positions` and its parameters, from a table (1, F, D); {} where the user set them."""
    table = source.state.get(name)
    if table is not None:
        _check_finite(source, name)
    if {"temporal_positions", "temporal_interpolation", "position_frames"} & set(source.overrides):
        return {}
    if table is None:
        raise ValueError(
            f"{source.where}: no {name} in the file, which therefore does not determine its temporal positions; "
            "give --set temporal_interpolation=… position_frames=…"
        )
    frames, size = table.shape[-2:]
    coordinates = _coordinates(table.reshape(frames, size).double())
    step = float(coordinates[-1]) / (frames - 1) if frames > 1 else 1.0
    for interpolation in _candidates(step):
        expected = sincos_temporal(frames, size, interpolation, False, CPU, torch.float32)
        if matches_table(table.reshape(frames, size), expected):
            return {
                "temporal_positions": "sincos",
                "temporal_interpolation": interpolation,
                "position_frames": frames,
            }
    return {"temporal_positions": "learned", "position_frames": frames}


def detect_spatial_table(table: Tensor) -> SpatialTable | None:
    """Grid and interpolation of a sine-cosine table (1, S, D); None for any other table."""
    tokens, size = table.shape[-2:]
    if size % 4 or not tokens or not table.isfinite().all():
        return None
    embeddings = table.reshape(tokens, size).double()
    columns, rows = embeddings.chunk(2, dim=1)  # embeddings of w and h
    later = (rows != rows[:1]).any(1).nonzero()
    width = int(later[0]) if len(later) else tokens
    if tokens % width:
        return None
    height = tokens // width
    axis = (columns[:width], width) if width > 1 else (rows[::width], height)
    step = float(_coordinates(axis[0])[-1]) / (axis[1] - 1) if axis[1] > 1 else 1.0
    for interpolation in _candidates(step):
        expected = sincos_spatial(height, width, size, None, interpolation, None, CPU, torch.float32)
        if matches_table(table.reshape(tokens, size), expected):
            return SpatialTable(height, width, interpolation)
    return None


def _coordinates(embeddings: Tensor) -> Tensor:
    """Coordinates (n,), 0 and up, from their [sin, cos] embeddings (n, d) at frequencies 10000^(-i / (d/2)).

    The lowest frequency gives a coarse value, each higher one refines it.
    """
    half = embeddings.shape[1] // 2
    coordinates = torch.zeros(embeddings.shape[0], dtype=torch.float64)
    for i in reversed(range(half)):
        frequency = 10000.0 ** (-i / half)
        angle = torch.atan2(embeddings[:, i], embeddings[:, half + i])
        turns = (
            torch.zeros_like(coordinates)
            if i == half - 1
            else ((coordinates * frequency - angle) / (2 * math.pi)).round()
        )
        coordinates = (angle + 2 * math.pi * turns) / frequency
    return coordinates


def _candidates(step: float) -> Iterator[float]:
    """Interpolations that a coordinate step may correspond to, simple fractions first."""
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


def matches_table(table: Tensor, expected: Tensor) -> bool:
    """Whether a stored table equals `expected` (float32), within its precision or a half precision that it was cast
    through."""
    if table.shape != expected.shape or not table.is_floating_point():
        return False
    if torch.equal(table, expected.to(table.dtype)):
        return True
    found = table.float()
    if any(torch.equal(found, expected.to(half).float()) for half in (torch.float16, torch.bfloat16)):
        return True
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 8e-3}.get(table.dtype, 2e-5)
    return bool((found - expected).abs().max() <= tolerance)


def check_tables(source: SourceWeights, tables: Tables, settings: ModelConfig) -> None:
    """ValueError for a stored table that differs from the one that the config determines."""
    c = settings
    for name, expected in tables.items():
        table = source.state.get(name)
        if table is None:
            continue
        if expected is None:  # the config does not determine the grid
            detected = detect_spatial_table(table)
            if detected is None or detected.interpolation != c.position_interpolation:
                raise ValueError(
                    f"{source.where}: {name} {tuple(table.shape)} is not the table of position_interpolation "
                    f"{c.position_interpolation} (it reads as {detected})"
                )
        elif not matches_table(table, expected):
            differs = f"is {tuple(table.shape)}, not {tuple(expected.shape)}"
            if table.shape == expected.shape:
                differs = f"differs by {(table.float() - expected).abs().max():.3g}"
            keys = (
                "position_base",
                "position_interpolation",
                "position_grid",
                "temporal_interpolation",
                "position_frames",
            )
            numbers = ", ".join(f"{key} {getattr(c, key)}" for key in keys if getattr(c, key) is not None)
            raise ValueError(
                f"{source.where}: {name} is not the table that the config determines ({numbers}): it {differs}"
            )


def table_grid(source: SourceWeights, tables: Tables) -> tuple[int, int] | None:
    """The grid of the stored table where the config does not determine it (a non-square grid has no position_base)."""
    for name, expected in tables.items():
        if expected is None and name in source.state and (detected := detect_spatial_table(source.state[name])):
            return detected.height, detected.width
    return None


def tables_for_grid(tables: Tables, c: ModelConfig, grid: tuple[int, int] | None) -> Tables:
    """`tables`, with the missing one computed for `grid`."""
    if grid is None:
        return tables
    numbers = (*grid, c.dimensions[0], None, c.position_interpolation, None, CPU, torch.float32)
    return {
        n: sincos_spatial(*numbers)[None].clone() if expected is None else expected for n, expected in tables.items()
    }


def spatial_table(c: ModelConfig, name: str = "pos_embed") -> Tables:
    """The sine-cosine table (1, S, D) that a file stores; {} where positions are learned."""
    if c.positions != "sincos":
        return {}
    if c.position_base is None and c.position_grid is None:
        return {name: None}
    height, width = c.position_grid or (c.position_base or 0, c.position_base or 0)
    numbers = (c.position_base, c.position_interpolation, c.position_grid)
    return {name: sincos_spatial(height, width, c.dimensions[0], *numbers, CPU, torch.float32)[None].clone()}


def temporal_table(c: ModelConfig, name: str) -> Tables:
    """The temporal sine-cosine table (1, F, D)."""
    if c.time_positions != "sincos" or c.position_frames is None:
        return {}
    numbers = (c.position_frames, c.dimensions[0], c.temporal_interpolation)
    return {name: sincos_temporal(*numbers, False, CPU, torch.float32)[None].clone()}


def spatial_limits(c: ModelConfig, title: str) -> list[str]:
    """Why a layout with a spatial table cannot express these positions."""
    if c.positions not in ("sincos", "learned"):
        return [f"positions is {c.positions!r}; {title} has 'sincos' or 'learned'"]
    if c.positions == "sincos" and c.position_grid is not None:
        return [f"position_grid is {c.position_grid} (centre-cropped); {title} has None"]
    return []


def temporal_limits(c: ModelConfig, title: str) -> list[str]:
    """Why a layout with a temporal table cannot express these positions."""
    if c.time_positions not in ("sincos", "learned"):
        return [f"temporal_positions is {c.time_positions!r}; {title} has 'sincos' or 'learned'"]
    if c.position_frames is None:
        return [
            f"position_frames is None; {title} stores a table for a fixed number of frames: give --set position_frames=N"
        ]
    return []
