"""Laws of the metrics: against closed forms, against scipy's matrix root, and where covariances have not full rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from stdit.evaluation.metrics import (
    Statistics,
    accuracy,
    bootstrap_interval,
    confusion_matrix,
    frechet_distance,
    frechet_distance_of_statistics,
    in_canonical_order,
    inception_score,
    kernel_distance,
    kernel_inception_distance,
    precision_recall,
    statistics_of,
)


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


# --------------------------------------------------------------------------- statistics and samples


def test_the_frechet_distance_of_gaussians_is_the_closed_form() -> None:
    # Commuting covariances: |mu - nu|^2 + sum (sqrt s - sqrt r)^2 over their common axes.
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    s, r, mu, nu = rng.uniform(0.1, 4, 8), rng.uniform(0.1, 4, 8), rng.normal(size=8), rng.normal(size=8)
    a, b = Statistics(mu, (axes * s) @ axes.T), Statistics(nu, (axes * r) @ axes.T)
    expected = ((mu - nu) ** 2).sum() + ((np.sqrt(s) - np.sqrt(r)) ** 2).sum()
    assert frechet_distance_of_statistics(a, b) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("count", "width"), [(200, 12), (20, 64)])
def test_statistics_give_the_distance_of_their_features(count: int, width: int) -> None:
    a, b = correlated(count, width, 0), correlated(count, width, 1)
    expected = frechet_distance(a, b)
    assert frechet_distance_of_statistics(statistics_of(a), statistics_of(b)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance_of_statistics(statistics_of(a), statistics_of(a)) < 1e-6 * expected


def test_statistics_that_are_none_are_refused() -> None:
    good = Statistics(np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="of 3 and of 2 dimensions: of different networks"):
        frechet_distance_of_statistics(good, Statistics(np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="negative eigenvalue, -1"):
        frechet_distance_of_statistics(good, Statistics(np.zeros(3), np.diag([1.0, 1.0, -1.0])))
    with pytest.raises(ValueError, match="not symmetric"):
        frechet_distance_of_statistics(good, Statistics(np.zeros(3), np.eye(3) + np.triu(np.ones((3, 3)), 1)))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance_of_statistics(good, Statistics(np.zeros(3), np.full((3, 3), np.nan)))


def test_a_set_has_full_precision_and_recall_of_itself_even_with_repeated_samples() -> None:
    a = np.repeat(correlated(30, 4, 0), 5, 0)
    precision, recall = precision_recall(a, a)
    assert precision.all()
    assert recall.all()


def test_precision_falls_with_strangers_and_recall_with_what_is_missing() -> None:
    rng = np.random.default_rng(0)
    real = np.concatenate([rng.normal(size=(100, 2)), rng.normal(size=(100, 2)) + 50])
    half = rng.normal(size=(100, 2))
    precision, recall = (float(x.mean()) for x in precision_recall(half, real))
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)
    precision, recall = (float(x.mean()) for x in precision_recall(np.concatenate([real, half + 500]), real))
    assert precision == pytest.approx(2 / 3, abs=0.05)
    assert recall > 0.9


def test_the_inception_score_is_the_number_of_evenly_used_certain_classes() -> None:
    certain = np.repeat(np.eye(8) * 100, 100, 0)
    assert inception_score(certain, splits=1) == pytest.approx(8, rel=1e-9)
    assert inception_score(np.zeros((50, 8))) == pytest.approx(1)


def test_the_kernel_distance_of_a_set_to_itself_counts_its_diagonal() -> None:
    # Unbiased: pairs of a sample with itself are left out within a set, and there is one of each across.
    a = correlated(20, 3, 0)
    k = (a @ a.T / 3 + 1) ** 3
    n = len(a)
    expected = 2 * ((k.sum() - np.trace(k)) / (n * (n - 1)) - k.mean())
    assert kernel_inception_distance(a, a, subsets=3) == pytest.approx(expected, rel=1e-9)
    assert expected < 0


SCORES = {
    "frechet": frechet_distance,
    "kid": lambda a, b: kernel_inception_distance(a, b, 5, 40),
    "precision": lambda a, b: float(precision_recall(a, b)[0].mean()),
    "recall": lambda a, b: float(precision_recall(a, b)[1].mean()),
    "inception_score": lambda a, b: inception_score(a),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_samples_does_not_change_a_score(name: str) -> None:
    a, b = correlated(60, 6, 0).astype("f4"), correlated(50, 6, 1).astype("f4")
    rng = np.random.default_rng(0)
    shuffled = [in_canonical_order(x[rng.permutation(len(x))]) for x in (a, b)]
    assert SCORES[name](*shuffled) == SCORES[name](in_canonical_order(a), in_canonical_order(b))


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
def test_a_distance_grows_with_noise_and_with_a_shift(distance) -> None:
    a, b = correlated(200, 6, 0), correlated(200, 6, 0) + 1e-3
    noise = np.random.default_rng(1).normal(size=a.shape)
    for worse in (noise, 1.0):
        values = [distance(a + amount * worse, b) for amount in (0, 1, 2, 4)]
        assert values == sorted(values)
        assert values[0] < values[-1]


@pytest.mark.parametrize("most", [5000, 60])
def test_a_bootstrap_interval_of_a_mean_has_the_width_of_theory(most: int) -> None:
    x = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap_interval(lambda s: float(s.mean()), x, value=float(x.mean()), resamples=400, most=most)
    assert (low + high) / 2 == pytest.approx(x.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.15)
    assert (low, high) == bootstrap_interval(
        lambda s: float(s.mean()), x, value=float(x.mean()), resamples=400, most=most
    )


def test_the_interval_of_a_frechet_distance_covers_repeated_draws() -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(300, 4)), rng.normal(size=(300, 4)) + 0.5) for _ in range(60)]
    values = [frechet_distance(a, b) for a, b in pairs]
    intervals = [
        bootstrap_interval(frechet_distance, a, b, value=v, resamples=30)
        for (a, b), v in zip(pairs, values, strict=True)
    ]
    assert np.mean([low <= np.mean(values) <= high for low, high in intervals]) > 0.85
