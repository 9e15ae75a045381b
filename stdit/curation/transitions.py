"""Hard cuts, dissolves and fades, from the numbers of an analysis. Pure functions of arrays.

A hard cut is a change that stands out from its surroundings and lasts: after a flash the picture is the same again, and
under another light it is still alike. Dissolves and fades are runs of frames that a classifier (dissolves.py) takes for
blends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.ndimage import median_filter

from stdit.config import CutsConfig
from stdit.curation.analysis import Analysis
from stdit.curation.dissolves import probability

# Pictures of two shots are less alike than this (correlation); under another light, one picture is more alike.
ALIKE = 0.85
# Of a flash, what is left of the change when it is over; how much brighter or darker it is, in levels.
FLASH_REST, FLASH_LEVELS = 0.4, 8.0
# Dissolves are at least so long; what is this far apart is one.
SHORTEST_S, GAP_S = 0.15, 0.17


@dataclass(frozen=True)
class Transition:
    """Frames [start, end) belong to no shot; of a hard cut start == end, the first frame of the new shot."""

    start: int
    end: int
    kind: Literal["cut", "dissolve"]


def find_transitions(analysis: Analysis, cuts: CutsConfig) -> list[Transition]:
    """All transitions of all segments, in order."""
    found: list[Transition] = []
    columns, index = analysis.frames, analysis.frames["index"]
    fps = min(max(analysis.fps, 1.0), 120.0)
    for start, end in analysis.segments:
        rows = np.flatnonzero((index >= start) & (index < end))
        if len(rows) < 3:
            continue
        part = {name: values[rows].astype(np.float32) for name, values in columns.items()}
        blends = dissolves(part, fps, cuts) if cuts.dissolve_probability < 1 else []
        found += [Transition(start + a, start + b, "dissolve") for a, b in blends]
        hard = [t for t in hard_cuts(part, fps, cuts) if not any(a < t < b for a, b in blends)]
        found += [Transition(start + t, start + t, "cut") for t in hard]
    return sorted(found, key=lambda t: (t.start, t.end))


def hard_cuts(frames: dict[str, np.ndarray], fps: float, cuts: CutsConfig) -> list[int]:
    """First frames of new shots, counted from the segment's start."""
    change = frames["change"]
    width = 2 * max(2, round(fps / 2)) + 1
    usual = median_filter(change, size=width, mode="nearest")
    peak = change >= np.max([np.roll(change, s) for s in (-2, -1, 1, 2)], 0)
    stands_out = (change >= cuts.hard_difference) & (change >= cuts.hard_ratio * (usual + 1.0)) & peak
    unlike = frames["correlation"] < ALIKE
    brighter = np.abs(np.diff(frames["luma_mean"], prepend=frames["luma_mean"][:1])) >= FLASH_LEVELS
    over = np.minimum(frames["returns"], frames["came_back"]) <= FLASH_REST * change
    found = np.flatnonzero(stands_out & unlike & ~(over & brighter))
    return [int(t) for t in found if t > 0]


def dissolves(frames: dict[str, np.ndarray], fps: float, cuts: CutsConfig) -> list[tuple[int, int]]:
    """[start, end) of each dissolve or fade, counted from the segment's start."""
    inside = probability(frames, fps) >= cuts.dissolve_probability
    # Gaps of a sixth of a second belong to it: the black between two halves of a fade is like the black of a scene.
    gap = max(1, round(fps * GAP_S))
    runs: list[list[int]] = []
    for t in np.flatnonzero(inside):
        if runs and t - runs[-1][1] <= gap:
            runs[-1][1] = int(t) + 1
        else:
            runs.append([int(t), int(t) + 1])
    return [(start, end) for start, end in runs if end - start >= SHORTEST_S * fps]


def shots(
    analysis: Analysis, transitions: list[Transition], limits: tuple[int, int] | None = None
) -> list[tuple[int, int, bool, bool]]:
    """(start, end, cut before, cut after) of what lies between the transitions. limits: frames outside are left out."""
    found = []
    for start, end in analysis.segments:
        if limits:
            start, end = max(start, limits[0]), min(end, limits[1])
        at, cut_before = start, False
        inside = [t for t in transitions if (start <= t.start and t.end <= end) or (t.start < end and start < t.end)]
        for transition in inside:
            if transition.start > at:
                found.append((at, transition.start, cut_before, True))
            at, cut_before = max(at, transition.end), True
        if end > at:
            found.append((at, end, cut_before, False))
    return found
