"""Clips: what lies between the cuts of a file, trimmed and divided, and what a scorer sees of one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from stdit.config import CutsConfig
from stdit.curation.analysis import Analysis
from stdit.curation.transitions import find_transitions, shots

# Bars of sampled frames that agree to within so many px are the clip's.
BARS_AGREE = 2


@dataclass(frozen=True)
class Range:
    """Frames [start, end) of a file; dropped: why they make no clip."""

    start: int
    end: int
    dropped: str | None = None
    detail: str | None = None


def cut_into_clips(analysis: Analysis, cuts: CutsConfig, limits: tuple[int, int] | None = None) -> list[Range]:
    """The clips of a file, and the pieces that are too short. limits: the part of the file that is used."""
    if analysis.still:
        return [Range(0, 1)]
    found = []
    least, most = (cuts.min_seconds * analysis.fps, cuts.max_seconds * analysis.fps)
    for start, end, cut_before, cut_after in shots(analysis, find_transitions(analysis, cuts), limits):
        start, end = start + cuts.margin_frames * cut_before, end - cuts.margin_frames * cut_after
        if end - start < max(1, least - 1e-6):
            seconds = max(0, end - start) / analysis.fps
            detail = f"{seconds:.2f} s between cuts, at least {cuts.min_seconds:g}"
            found.append(Range(start, max(start, end), "too_short", detail))
            continue
        parts = math.ceil((end - start) / max(1, most) - 1e-9)
        edges = [start + (end - start) * i // parts for i in range(parts + 1)]
        found += [Range(a, b) for a, b in pairwise(edges)]
    return found


@dataclass
class ClipView:
    """A clip as scorers and captioners see it.

    `frame_numbers`, `sample_numbers`: columns of its analysis (stdit.curation.analysis.Analysis), of its frames alone.
    `pictures`: uint8 (N, H, W, 3), frames evenly spread over the clip, cropped; for scorers of the config.
    """

    path: str
    start: int
    end: int
    fps: float
    height: int
    width: int
    caption: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    frame_numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    sample_numbers: Mapping[str, np.ndarray] = field(default_factory=dict)
    pictures: np.ndarray | None = None

    @property
    def frames(self) -> int:
        return self.end - self.start

    @property
    def seconds(self) -> float:
        """0 for an image."""
        return self.frames / self.fps if self.fps else 0.0

    @cached_property
    def picture(self) -> tuple[int, int, int, int]:
        """(top, left, height, width) of the picture within black bars, as most of the sampled frames have them."""
        whole = (0, 0, self.height, self.width)
        useful = self.sample_numbers["hash"] != 0
        bars = self.sample_numbers["bars"][useful]
        if not len(bars):
            return whole
        usual = np.median(bars, axis=0).astype(int)
        agree = (np.abs(bars - usual) <= BARS_AGREE).mean(axis=0) >= 0.6
        top, bottom, left, right = (int(n) if good else 0 for n, good in zip(usual, agree, strict=True))
        # Bars come in pairs of one width; other black is part of the picture. Even sizes: chroma has half of them.
        top, bottom = _pair(top, bottom, self.height)
        left, right = _pair(left, right, self.width)
        height, width = self.height - top - bottom, self.width - left - right
        return (top, left, height, width) if min(height, width) > 0 else whole


def _pair(first: int, second: int, size: int) -> tuple[int, int]:
    """Both bars, if they are of one width and at least a hundredth of the side."""
    least = max(2, round(0.01 * size))
    if min(first, second) < least or abs(first - second) > max(BARS_AGREE, 0.1 * max(first, second)):
        return 0, 0
    return first + first % 2, second + second % 2


def view(analysis: Analysis, path: str, start: int, end: int, caption: str | None, row: Mapping[str, Any]) -> ClipView:
    """The clip [start, end) of an analysed file."""
    inside = slice(*np.searchsorted(analysis.frames["index"], [start, end]))
    index = analysis.samples["index"]
    chosen = np.flatnonzero((index >= start) & (index < end))
    if not len(chosen):  # shorter than the distance of two samples: the nearest one
        chosen = np.array([int(np.argmin(np.abs(index - (start + end) / 2)))])
    return ClipView(
        path, start, end, analysis.fps, analysis.height, analysis.width, caption, row,
        {name: values[inside] for name, values in analysis.frames.items()},
        {name: values[chosen] for name, values in analysis.samples.items()},
    )  # fmt: skip


def median(values: np.ndarray) -> float | None:
    """The median of those that are finite; None: none is."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def spread(start: int, end: int, count: int) -> list[int]:
    """`count` frames of [start, end), evenly spread, each in the middle of its part; fewer of a shorter clip."""
    count = min(count, end - start)
    return [start + (2 * i + 1) * (end - start) // (2 * count) for i in range(count)]
