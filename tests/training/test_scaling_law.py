"""A scaling law is found again from the losses that it gives, and its best size is the best one."""

import math

import numpy as np
import pytest

from stdit.training.scaling_law import Point, ScalingLaw, fit, interval, resampled

LAW = ScalingLaw(irreducible=0.3, model=0.12, alpha=0.35, data=0.2, beta=0.28, scale=(2e6, 6e8))
LADDER = [(n, c) for n in (1e6, 2e6, 4e6) for c in (1e15, 2e15, 4e15)]


def ladder(law: ScalingLaw, noise: float = 0.0) -> list[Point]:
    random = np.random.default_rng(1)
    return [Point(n, c, law.loss(n, c) * (1 + noise * random.standard_normal())) for n, c in LADDER]


def test_the_law_of_exact_losses_is_found_and_predicts_a_hundred_times_the_budget() -> None:
    found = fit(ladder(LAW))
    for n, c in [*LADDER, (2e7, 4e17), (1e8, 4e17)]:
        assert found.loss(n, c) == pytest.approx(LAW.loss(n, c), rel=2e-3)
    assert found.alpha == pytest.approx(LAW.alpha, rel=0.05)
    assert found.beta == pytest.approx(LAW.beta, rel=0.05)


@pytest.mark.parametrize("budget", [1e14, 1e16, 1e20])
def test_the_best_size_has_the_least_loss_of_all(budget: float) -> None:
    best = LAW.best_parameters(budget)
    least = LAW.loss(best, budget)
    assert all(LAW.loss(best * factor, budget) > least for factor in (0.5, 0.9, 1.1, 2.0))


def test_intervals_hold_the_truth_and_widen_with_noise() -> None:
    widths = []
    for noise in (0.0, 0.003):
        points = ladder(LAW, noise)
        laws = list(resampled(points, fit(points), 30))
        low, high = interval([law.loss(4e6, 1.6e16) for law in laws])
        widths.append(high - low)
        assert low - 1e-3 <= LAW.loss(4e6, 1.6e16) <= high + 1e-3
    assert widths[0] < 1e-3 < widths[1]


def test_losses_that_do_not_depend_on_the_size_have_no_best_one() -> None:
    flat = ScalingLaw(0.3, 0.0, 0.35, 0.2, 0.28, LAW.scale)
    assert flat.best_parameters(1e16) == 0.0
    assert ScalingLaw(0.3, 0.1, 0.35, 0.0, 0.28, LAW.scale).best_parameters(1e16) == math.inf


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (ladder(LAW)[:5], "six runs.* found 5 runs"),
        ([Point(1e6, 1e15 * i, 1.0) for i in range(1, 7)], "found 6 runs, 1 sizes, 6 budgets"),
        ([*ladder(LAW)[:8], Point(4e6, 4e15, math.nan)], "losses above 0; found nan"),
    ],
)
def test_a_ladder_that_is_too_small_is_refused(points: list[Point], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(points)
