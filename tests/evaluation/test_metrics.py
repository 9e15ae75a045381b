"""Laws of the metrics: against closed forms, against scipy's matrix root, and where covariances have not full rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from stdit.evaluation.metrics import accuracy, confusion_matrix, frechet_distance, kernel_distance


def by_matrix_root(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance as its formula is usually typed (torchmetrics, pytorch-fid)."""
    shift = a.mean(0) - b.mean(0)
    s, r = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(shift @ shift + np.trace(s) + np.trace(r) - 2 * np.trace(np.real(np.asarray(sqrtm(s @ r)))))


def correlated(count: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)


def test_the_frechet_distance_equals_the_matrix_root_formula() -> None:
    a, b = correlated(300, 12, 0), correlated(200, 12, 1)
    assert frechet_distance(a, b) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


def test_the_frechet_distance_of_one_dimension_is_the_hand_formula() -> None:
    # (mean difference)^2 + (difference of standard deviations)^2
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[10.0], [11.0]])
    expected = (2 - 10.5) ** 2 + (2 - np.sqrt(0.5)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_the_frechet_distance_of_a_moved_copy_is_the_squared_move() -> None:
    a = correlated(50, 8, 2)
    assert frechet_distance(a, a + 3.0) == pytest.approx(8 * 9.0, rel=1e-9)


@pytest.mark.parametrize(("count", "width"), [(5, 64), (100, 64), (3, 2)])
def test_the_frechet_distance_to_itself_is_zero_at_any_rank(count: int, width: int) -> None:
    a = correlated(count, width, 3)
    # Features of a classifier: many are dead (always 0), so covariances are singular at any count.
    a[:, ::3] = 0
    scale = float((a * a).sum())
    assert 0 <= frechet_distance(a, a) < 1e-12 * scale


def test_the_frechet_distance_of_singular_covariances_is_that_of_their_span() -> None:
    a, b = correlated(40, 6, 4), correlated(40, 6, 5)
    turned = np.linalg.qr(np.random.default_rng(6).normal(size=(64, 64)))[0][:6]
    # The same points in 64 dimensions, of which 58 hold nothing.
    assert frechet_distance(a @ turned, b @ turned) == pytest.approx(by_matrix_root(a, b), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 40), st.integers(0, 2**31))
def test_the_frechet_distance_is_symmetric_and_not_negative(n: int, m: int, width: int, seed: int) -> None:
    a, b = correlated(n, width, seed), correlated(m, width, seed + 1)
    forth, back = frechet_distance(a, b), frechet_distance(b, a)
    assert forth >= 0
    assert forth == pytest.approx(back, rel=1e-7, abs=1e-7)


def test_the_kernel_distance_is_unbiased_where_the_frechet_distance_is_not() -> None:
    rng = np.random.default_rng(7)
    pairs = [(rng.normal(size=(20, 16)), rng.normal(size=(20, 16))) for _ in range(200)]
    kernel = np.array([kernel_distance(a, b) for a, b in pairs])
    frechet = np.array([frechet_distance(a, b) for a, b in pairs])
    assert abs(kernel.mean()) < 4 * kernel.std() / np.sqrt(len(kernel))
    assert frechet.mean() > 4


def test_the_kernel_distance_is_the_sum_over_pairs() -> None:
    a, b = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[1.0, 1.0], [2.0, 0.0]])
    k = lambda x, y: float((x @ y / 2 + 1) ** 3)  # noqa: E731
    expected = k(a[0], a[1]) + k(b[0], b[1]) - 2 * np.mean([k(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("score", [frechet_distance, kernel_distance])
def test_features_that_cannot_be_compared_are_refused_with_their_sizes(score) -> None:
    good = np.ones((4, 3))
    with pytest.raises(ValueError, match=r"\(4, 3\) and \(4, 2\)"):
        score(good, np.ones((4, 2)))
    with pytest.raises(ValueError, match="at least 2 samples of each, found 4 and 1"):
        score(good, np.ones((1, 3)))
    with pytest.raises(ValueError, match="1 of 4 real features are not finite"):
        score(good, np.where(np.arange(12).reshape(4, 3) == 5, np.nan, 1.0))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 200), st.integers(1, 200))
def test_an_accuracy_lies_in_its_interval(right: int, wrong: int) -> None:
    score = accuracy(["x"] * (right + wrong), ["x"] * right + ["y"] * wrong)
    assert 0 <= score.low <= score.value <= score.high <= 1
    assert (score.correct, score.count) == (right, right + wrong)


def test_the_interval_is_wilsons() -> None:
    # 85 of 100: the interval of Wilson 1927 at 95 %.
    score = accuracy(["x"] * 100, ["x"] * 85 + ["y"] * 15)
    assert (score.low, score.high) == pytest.approx((0.7672, 0.9069), abs=1e-4)
    perfect = accuracy(["x"] * 100, ["x"] * 100)
    assert perfect.high == 1.0
    assert perfect.low == pytest.approx(0.9630, abs=1e-4)


def test_an_accuracy_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="found 0"):
        accuracy([], [])
    with pytest.raises(ValueError, match="2 targets but 1 predictions"):
        accuracy(["a", "b"], ["a"])


def test_confusion_counts_every_pair_once() -> None:
    table = confusion_matrix(["a", "a", "b"], ["a", "b", "b"], ["a", "b"])
    assert table == [[1, 1], [0, 1]]
    with pytest.raises(ValueError, match=r"\['c'\]"):
        confusion_matrix(["c"], ["a"], ["a", "b"])
