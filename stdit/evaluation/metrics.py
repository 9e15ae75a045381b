"""Metrics as pure functions of arrays (numpy, float64): accuracy with its interval, Fréchet and kernel distance,
Inception Score, precision and recall; bootstrap intervals.

Features: (n, D) of n generated and (m, D) of m real clips. Distances depend on the feature space: with a classifier
trained on the same manifest they compare runs on that manifest and are not the FID, FVD or KID of the literature.
tests/evaluation/test_against_torch_fidelity.py compares them with torch-fidelity's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `count` predictions, with the 95 % Wilson interval [low, high]."""

    correct: int
    count: int
    value: float
    low: float
    high: float


def accuracy(targets: Sequence[str], predictions: Sequence[str], z: float = 1.959964) -> Accuracy:
    """Fraction of predictions equal to their targets. Interval: Wilson 1927. ValueError: empty, or lengths that
    differ."""
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


def kernel_inception_distance(
    generated: ArrayLike, real: ArrayLike, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> float:
    """KID as reported: the mean of `kernel_distance` over `subsets` pairs of random subsets of at most `size` samples.

    Subsets are torch-fidelity's for the same seed. With fewer samples than `size`, all of the smaller set are taken.
    """
    a, b = _features(generated, real)
    size = min(size, len(a), len(b))
    rng = np.random.RandomState(seed)
    draws = ((rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)) for _ in range(subsets))
    return float(np.mean([kernel_distance(a[i], b[j]) for i, j in draws]))


def inception_score(logits: ArrayLike, splits: int = 10, seed: int = 2020) -> float:
    """exp E KL(p(y|x) || p(y)), the mean over `splits` parts of the shuffled samples (Salimans et al. 2016).

    logits: (n, classes). ValueError: fewer samples than splits, logits that are not finite.
    """
    x = np.asarray(logits, np.float64)
    if x.ndim != 2 or len(x) < splits:
        raise ValueError(
            f"an Inception Score of {splits} splits needs logits (n, classes), n >= {splits}, found {x.shape}"
        )
    _check_finite("generated", x)
    x = x[np.random.RandomState(seed).permutation(len(x))]
    log_p = x - np.logaddexp.reduce(x, axis=1, keepdims=True)
    scores = []
    for i in range(splits):
        part = log_p[i * len(x) // splits : (i + 1) * len(x) // splits]
        log_q = np.logaddexp.reduce(part, axis=0) - math.log(len(part))
        scores.append(math.exp(float((np.exp(part) * (part - log_q)).sum(1).mean())))
    return float(np.mean(scores))


def precision_recall(
    generated: ArrayLike, real: ArrayLike, neighbors: int = 3
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Improved precision and recall (Kynkäänniemi et al. 2019), sample by sample; the scores are the means.

    precision[i]: generated sample i lies within the `neighbors`-th neighbour's distance of a real one; recall[j]: real
    sample j within that of a generated one. ValueError: no more samples than `neighbors`.
    """
    a, b = _features(generated, real)
    if min(len(a), len(b)) <= neighbors:
        raise ValueError(
            f"precision and recall with {neighbors} neighbours need at least {neighbors + 1} samples of each, "
            f"found {len(a)} and {len(b)}"
        )

    def radius(x: NDArray[np.float64]) -> NDArray[np.float64]:
        # A sample is its own nearest neighbour, at distance 0.
        return np.concatenate([np.partition(block, neighbors, 1)[:, neighbors] for block in _distances(x, x)])

    def covered(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.bool_]:
        reach = radius(y)
        return np.concatenate([(block <= reach).any(1) for block in _distances(x, y)])

    return covered(a, b), covered(b, a)


def _distances(x: NDArray[np.float64], y: NDArray[np.float64], rows: int = 512) -> Iterator[NDArray[np.float64]]:
    """Euclidean distances (rows, m) in blocks, from differences: |x|^2 + |y|^2 - 2 x.y would not be 0 for equal
    rows."""
    for first in range(0, len(x), rows):
        yield np.asarray(cdist(x[first : first + rows], y), np.float64)


# ------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, over `count` samples (None: not recorded)."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int | None = None

    @cached_property
    def root(self) -> NDArray[np.float64]:
        """The covariance's square root. ValueError: not a covariance."""
        return _matrix_root(self.covariance)


def statistics_of(features: ArrayLike) -> Statistics:
    """Mean and unbiased covariance. ValueError: fewer than 2 samples, features that are not finite."""
    x, _ = _features(features, features)
    return Statistics(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)), len(x))


def frechet_distance_of_statistics(a: Statistics, b: Statistics) -> float:
    """As `frechet_distance`, from means and covariances. ValueError: other dimensions, or `b` is not finite or has no
    covariance.

    `b`, the reference, is decomposed once, however many `a` it is compared with: 2048 dimensions take seconds.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {len(a.mean)} and of {len(b.mean)} dimensions: of different networks")
    roots = np.sqrt(np.linalg.eigvalsh(b.root @ a.covariance @ b.root).clip(0)).sum()
    shift = a.mean - b.mean
    return float(max(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * roots, 0.0))


def _matrix_root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    if not np.isfinite(covariance).all():
        raise ValueError("a covariance that is not finite")
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if not np.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6 * max(1.0, abs(values[-1]))):
        raise ValueError("a covariance that is not symmetric")
    if values[0] < -1e-4 * max(abs(values[-1]), 1e-12):
        raise ValueError(f"a covariance with a negative eigenvalue, {values[0]:.3g} (the largest is {values[-1]:.3g})")
    return np.asarray((vectors * np.sqrt(values.clip(0))) @ vectors.T, np.float64)


# -------------------------------------------------------------------------------------- intervals


def bootstrap_interval(
    score: Callable[..., float],
    *samples: NDArray[Any],
    value: float,
    resamples: int = 50,
    seed: int = 0,
    most: int = 5000,
    z: float = 1.959964,
) -> tuple[float, float]:
    """95 % interval value ± z times the standard deviation of `score` over resampled `samples` (Efron 1979).

    Each array is resampled by rows, by itself; of larger ones than `most` rows the same share of each is drawn, and the
    deviation scaled by its root (m out of n, Bickel et al. 1997). Centred on `value` and not by percentiles: Fréchet
    distances of resampled sets are biased upwards, since resampling repeats samples.
    """
    rng = np.random.default_rng(seed)
    share = min(1.0, most / max(map(len, samples)))
    counts = [max(2, round(share * len(x))) for x in samples]
    draws = ([x[rng.integers(len(x), size=n)] for x, n in zip(samples, counts, strict=True)] for _ in range(resamples))
    half = z * math.sqrt(share) * float(np.std([score(*draw) for draw in draws], ddof=1))
    return value - half, value + half


def in_canonical_order(features: NDArray[Any]) -> NDArray[Any]:
    """Rows in an order that they alone decide: sums over them, and random subsets, don't depend on the order of
    files."""
    rows = np.ascontiguousarray(features)
    return rows[sorted(range(len(rows)), key=lambda i: hashlib.blake2b(rows[i]).digest())]


def _features(generated: ArrayLike, real: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(generated, np.float64), np.asarray(real, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (n, D) and (m, D), found {a.shape} and {b.shape}")
    if len(a) < 2 or len(b) < 2:
        raise ValueError(
            f"a distance between distributions needs at least 2 samples of each, found {len(a)} and {len(b)}"
        )
    _check_finite("generated", a)
    _check_finite("real", b)
    return a, b


def _check_finite(name: str, x: NDArray[np.float64]) -> None:
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x)).any(1).sum())} of {len(x)} {name} features are not finite")
