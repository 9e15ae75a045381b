"""Laws of measures of one video."""

from __future__ import annotations

import numpy as np
import pytest

from stdit.evaluation.video_quality import consistency, linear_motion_smoothness, temporal_flickering, vmaf_motion


def moving(frames: int = 8, side: int = 32) -> np.ndarray:
    """A disc that moves a pixel a frame."""
    y, x = np.mgrid[:side, :side]
    clip = np.stack([200 * ((x - 8 - t) ** 2 + (y - 16) ** 2 < 30) + 20 for t in range(frames)]).astype(np.uint8)
    return np.repeat(clip[..., None], 3, -1)


def test_a_still_neither_flickers_nor_moves() -> None:
    still = np.repeat(moving(1), 6, 0)
    assert temporal_flickering(still) == linear_motion_smoothness(still) == 1
    assert vmaf_motion(still) == 0


def test_flickering_is_vbenchs_formula() -> None:
    clip = moving()
    pairs = [np.abs(clip[i].astype(float) - clip[i + 1]).mean() for i in range(len(clip) - 1)]
    assert temporal_flickering(clip) == pytest.approx((255 - np.mean(pairs)) / 255, rel=1e-6)


def test_shuffled_frames_are_less_smooth_and_move_more() -> None:
    clip = moving(12)
    shuffled = clip[np.random.default_rng(0).permutation(12)]
    assert linear_motion_smoothness(shuffled) < linear_motion_smoothness(clip)
    assert vmaf_motion(shuffled) > vmaf_motion(clip) > 0


def test_a_linear_ramp_is_perfectly_smooth() -> None:
    ramp = np.arange(6, dtype=np.uint8)[:, None, None, None] * 10 + np.zeros((6, 32, 32, 3), np.uint8)
    assert linear_motion_smoothness(ramp) == 1
    assert temporal_flickering(ramp) == pytest.approx(1 - 10 / 255)


def test_more_noise_is_more_flickering() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=moving().shape)
    values = [temporal_flickering((moving() + s * noise).clip(0, 255).astype(np.uint8)) for s in (0, 5, 20, 60)]
    assert values == sorted(values, reverse=True)


def test_consistency_is_vbenchs_loop() -> None:
    x = np.random.default_rng(0).normal(size=(5, 8))
    cos = lambda a, b: max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))  # noqa: E731
    expected = np.mean([(cos(x[i], x[i - 1]) + cos(x[i], x[0])) / 2 for i in range(1, 5)])
    assert consistency(x) == pytest.approx(expected)
    assert consistency(np.ones((4, 3))) == pytest.approx(1)
