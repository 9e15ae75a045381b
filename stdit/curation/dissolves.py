"""Dissolves and fades: a small classifier of frames, trained on generated transitions (stdit.curation.train_dissolves).

It sees, over four thirds of a second around a frame and at five distances in time, how far the frame is a blend of what
comes before and after, how alike these are, and the dip in contrast that a blend of two pictures has (Koala-36M uses
such a classifier too). The weights are in dissolves.npz: a perceptron with two hidden layers.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter1d

from stdit.curation.analysis import LAGS_S

WEIGHTS = Path(__file__).with_name("dissolves.npz")
# Where the classifier looks, seconds from the frame.
OFFSETS_S = (-2 / 3, -1 / 3, -1 / 6, 0.0, 1 / 6, 1 / 3, 2 / 3)


def features(frames: dict[str, np.ndarray], fps: float) -> np.ndarray:
    """(N, features) of the frames of one segment, from the columns of its analysis."""
    n = len(frames["luma_std"])
    at = np.arange(n)
    columns = [np.log1p(frames["change"]), np.log1p(frames["luma_std"]), frames["correlation"]]
    for k, seconds in enumerate(LAGS_S):
        lag = max(1, round(seconds * fps))
        spread = frames["luma_std"]
        around = (spread[np.clip(at - lag, 0, n - 1)] + spread[np.clip(at + lag, 0, n - 1)]) / 2
        columns += [
            frames["blend"][:, k].clip(-1, 2),
            np.minimum(frames["residual"][:, k], 2.0),
            frames["similarity"][:, k],
            np.log1p(frames["distance"][:, k]),
            ((spread + 1) / (around + 1)).clip(0, 2),
        ]
    base = np.stack(columns, 1).astype(np.float32)
    return np.concatenate([base[np.clip(at + round(s * fps), 0, n - 1)] for s in OFFSETS_S], axis=1)


@lru_cache
def _network() -> tuple[list[tuple[np.ndarray, np.ndarray]], np.ndarray, np.ndarray]:
    with np.load(WEIGHTS, allow_pickle=False) as file:
        layers = [(file[f"weight{i}"], file[f"bias{i}"]) for i in range(3)]
        return layers, file["mean"], file["scale"]


def probability(frames: dict[str, np.ndarray], fps: float) -> np.ndarray:
    """(N,) that each frame of a segment lies within a dissolve or fade, averaged over a sixth of a second."""
    layers, mean, scale = _network()
    x = (features(frames, fps) - mean) / scale
    for number, (weight, bias) in enumerate(layers):
        x = x @ weight + bias
        x = np.maximum(x, 0) if number < len(layers) - 1 else 1 / (1 + np.exp(-x.clip(-30, 30)))
    return uniform_filter1d(x[:, 0], size=max(1, round(fps / 6)), mode="nearest")
