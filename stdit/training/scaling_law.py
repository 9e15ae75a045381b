"""Scaling law of the validation loss, fitted to a ladder of runs (Hoffmann et al. 2022, section 3.3).

    L(N, C) = E + A N^-alpha + B D^-beta          D = C / N

N parameters, C training FLOPs; D stands for the training tokens, to which FLOPs per parameter are proportional.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

# Exponents are sought between these.
EXPONENTS = (0.03, 2.0)


class Point(NamedTuple):
    """One run: parameters, training FLOPs, validation loss at its end."""

    parameters: float
    flops: float
    loss: float


@dataclass(frozen=True)
class ScalingLaw:
    """Coefficients; `scale` is (parameters, FLOPs per parameter) of the ladder's middle, in whose units A and B are."""

    irreducible: float
    model: float
    alpha: float
    data: float
    beta: float
    scale: tuple[float, float]

    def loss(self, parameters: float, flops: float) -> float:
        """Validation loss of a model of this size, trained with so many FLOPs."""
        n, d = parameters / self.scale[0], flops / parameters / self.scale[1]
        return self.irreducible + self.model * n**-self.alpha + self.data * d**-self.beta

    def best_parameters(self, flops: float) -> float:
        """The size of least loss at a budget; 0 or infinity where the ladder's loss does not depend on one of the
        two."""
        if self.model * self.alpha == 0 or self.data * self.beta == 0:
            return 0.0 if self.model * self.alpha == 0 else math.inf
        # The derivative by N of both terms, in the ladder's units.
        ratio = self.alpha * self.model / (self.beta * self.data)
        budget = flops / (self.scale[0] * self.scale[1])
        return self.scale[0] * (ratio * budget**self.beta) ** (1 / (self.alpha + self.beta))


def fit(points: Sequence[Point]) -> ScalingLaw:
    """The law of least relative squared error. For given exponents the rest is linear, and found by non-negative least
    squares. ValueError: fewer than six runs, or fewer than two sizes or budgets: the law has five coefficients."""
    sizes, budgets = {p.parameters for p in points}, {p.flops for p in points}
    if len(points) < 6 or len(sizes) < 2 or len(budgets) < 2:
        raise ValueError(
            f"a scaling law needs six runs, of two sizes and two budgets at least; found {len(points)} runs, {len(sizes)} "
            f"sizes, {len(budgets)} budgets"
        )
    if wrong := next((p for p in points if not (math.isfinite(p.loss) and p.loss > 0)), None):
        raise ValueError(f"a scaling law needs losses above 0; found {wrong.loss:g}")
    parameters, flops, losses = (np.array(column, float) for column in zip(*points, strict=True))
    scale = (float(np.exp(np.log(parameters).mean())), float(np.exp(np.log(flops / parameters).mean())))
    n, d = parameters / scale[0], flops / parameters / scale[1]

    def solve(exponents: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
        columns = np.stack([np.ones_like(n), n ** -exponents[0], d ** -exponents[1]], axis=1)
        return nnls(columns / losses[:, None], np.ones_like(n))

    def residual(exponents: NDArray[np.float64]) -> float:
        return solve(exponents)[1]

    starts = [np.array([a, b]) for a in (0.1, 0.3, 0.6, 1.2) for b in (0.1, 0.3, 0.6, 1.2)]
    found = [
        minimize(residual, start, method="Nelder-Mead", bounds=[EXPONENTS] * 2, options={"xatol": 1e-6, "fatol": 1e-12})
        for start in sorted(starts, key=residual)[:4]
    ]
    exponents = min(found, key=lambda result: result.fun).x
    (irreducible, model, data), _ = solve(exponents)
    return ScalingLaw(float(irreducible), float(model), float(exponents[0]), float(data), float(exponents[1]), scale)


def resampled(points: Sequence[Point], law: ScalingLaw, count: int, seed: int = 0) -> Iterator[ScalingLaw]:
    """Laws of `count` ladders whose losses are the law's with the ladder's own relative errors, drawn anew (bootstrap
    of residuals, widened for the five coefficients that the law took from them)."""
    predicted = np.array([law.loss(p.parameters, p.flops) for p in points])
    errors = np.array([p.loss for p in points]) / predicted - 1
    errors = (errors - errors.mean()) * math.sqrt(len(points) / max(1, len(points) - 5))
    random = np.random.default_rng(seed)
    for _ in range(count):
        losses = predicted * (1 + random.choice(errors, len(points)))
        yield fit([p._replace(loss=float(loss)) for p, loss in zip(points, losses, strict=True)])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """10th and 90th percentile."""
    low, high = np.percentile(values, (10, 90))
    return float(low), float(high)
