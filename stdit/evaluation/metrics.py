"""Metrics as pure functions of arrays (numpy, float64): accuracy with its interval, Fréchet distance, kernel distance.

Features: (n, D) of n generated and (m, D) of m real clips. Distances depend on the feature space: with a classifier
trained on the same manifest they compare runs on that manifest and are not the FID, FVD or KID of the literature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `count` predictions, with the 95 % Wilson interval [low, high]."""

    correct: int
    count: int
    value: float
    low: float
    high: float


def accuracy(targets: Sequence[str], predictions: Sequence[str], z: float = 1.959964) -> Accuracy:
    """Fraction of predictions equal to their targets. Interval: Wilson 1927. ValueError: empty, or lengths that differ."""
    if len(targets) != len(predictions):
        raise ValueError(f"{len(targets)} targets but {len(predictions)} predictions")
    count = len(targets)
    if not count:
        raise ValueError("an accuracy needs at least one pair, found 0")
    correct = sum(a == b for a, b in zip(targets, predictions, strict=True))
    value = correct / count
    scale = 1 + z * z / count
    centre = (value + z * z / (2 * count)) / scale
    half = z / scale * math.sqrt(value * (1 - value) / count + z * z / (4 * count * count))
    # At 0 and at 1 the interval ends there exactly, whatever the rounding.
    low = 0.0 if correct == 0 else centre - half
    high = 1.0 if correct == count else centre + half
    return Accuracy(correct, count, value, low, high)


def confusion_matrix(targets: Sequence[str], predictions: Sequence[str], names: Sequence[str]) -> list[list[int]]:
    """counts[i][j]: clips of class names[i] predicted as names[j]. ValueError: a value outside `names`."""
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted({*targets, *predictions} - index.keys())
    if unknown:
        raise ValueError(f"values {unknown} are not among {list(names)}")
    counts = [[0] * len(names) for _ in names]
    for a, b in zip(targets, predictions, strict=True):
        counts[index[a]][index[b]] += 1
    return counts


def frechet_distance(generated: ArrayLike, real: ArrayLike) -> float:
    """|mu - nu|^2 + tr(S + R - 2 (S R)^(1/2)): between Gaussians fitted to two sets of features (Dowson & Landau 1982).

    S = A'A and R = B'B for A, B the centred features over sqrt(n - 1). The eigenvalues of S R are then the squared
    singular values of A B', so tr (S R)^(1/2) is their plain sum: no root of a matrix, no loss of digits where a
    covariance has not full rank. Biased upwards at small counts (Chong & Forsyth 2020), so compare equal counts only.
    """
    a, b = _features(generated, real)
    shift = a.mean(0) - b.mean(0)
    a = (a - a.mean(0)) / math.sqrt(len(a) - 1)
    b = (b - b.mean(0)) / math.sqrt(len(b) - 1)
    # |A|^2 = tr S. QR brings (n, D) to at most (D, D); the singular values of A B' stay.
    cross = np.asarray(np.linalg.qr(a, mode="r")) @ np.asarray(np.linalg.qr(b, mode="r")).T
    roots = np.linalg.svd(cross, compute_uv=False).sum()
    return float(max(shift @ shift + (a * a).sum() + (b * b).sum() - 2 * roots, 0.0))


def kernel_distance(generated: ArrayLike, real: ArrayLike) -> float:
    """Squared maximum mean discrepancy under the kernel (x.y / D + 1)^3: KID (Binkowski et al. 2018), all pairs.

    Unbiased at any count, so it may be slightly negative where both sets follow one distribution.
    """
    a, b = _features(generated, real)

    def kernel(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: NDArray[np.float64]) -> float:
        k = kernel(x, x)
        return float((k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def _features(generated: ArrayLike, real: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (n, D) and (m, D), found {a.shape} and {b.shape}")
    if len(a) < 2 or len(b) < 2:
        raise ValueError(
            f"a distance between distributions needs at least 2 samples of each, found {len(a)} and {len(b)}"
        )
    for name, x in (("generated", a), ("real", b)):
        if not np.isfinite(x).all():
            raise ValueError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} {name} features are not finite")
    return a, b
