"""Windows, crops and pixels: exact where nothing has to change, and never enlarged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.data.transforms import (
    crop_box,
    frame_indices,
    frame_step,
    frames_available,
    from_pixels,
    resize_crop,
    to_pixels,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 5), st.sampled_from(["first", "center"]))
def test_a_window_fits_exactly_when_enough_frames_are_available(
    count: int, frames: int, stride: int, mode: str
) -> None:
    if frames <= frames_available(count, stride):
        indices = frame_indices(count, frames, stride, mode)
        assert len(indices) == frames
        assert indices[0] >= 0
        assert indices[-1] < count
        assert set(np.diff(indices)) <= {stride}
    else:
        with pytest.raises(ValueError, match=f"span .* the clip has {count}"):
            frame_indices(count, frames, stride, mode)


def test_windows_begin_at_the_beginning_or_lie_in_the_middle() -> None:
    assert frame_indices(9, 3, 1, "first") == [0, 1, 2]
    assert frame_indices(9, 3, 1, "center") == [3, 4, 5]
    assert frame_indices(9, 3, 4, "center") == [0, 4, 8]
    assert frame_indices(50, 4, frame_step(50, target_fps=30)) == [0, 1, 3, 5]
    assert frame_indices(50, 5, frame_step(25, target_fps=24.9)) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="clip_window 'last'"):
        frame_indices(9, 3, 1, "last")


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_crop_has_the_requested_size_and_is_never_enlarged(height: int, width: int, to_h: int, to_w: int) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    if to_h > height or to_w > width:
        with pytest.raises(ValueError, match=f"{height}x{width} does not cover {to_h}x{to_w}"):
            resize_crop(frames, to_h, to_w)
        return
    assert resize_crop(frames, to_h, to_w).shape == (2, to_h, to_w, 3)
    left, top, right, bottom = crop_box(height, width, (to_h, to_w))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert (right - left) >= to_w - 1e-9
    assert (bottom - top) >= to_h - 1e-9
    assert (right - left) / (bottom - top) == pytest.approx(to_w / to_h)


def test_the_right_size_is_untouched_and_one_right_side_is_cropped_by_whole_pixels() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 17, 24, 3), np.uint8)
    assert (resize_crop(frames, 17, 24) == frames).all()
    assert (resize_crop(frames, 17, 16) == frames[:, :, 4:20]).all()
    assert (resize_crop(frames, 15, 24) == frames[:, 1:16]).all()


def test_shrinking_keeps_a_flat_colour_and_takes_the_middle() -> None:
    frames = np.full((1, 40, 80, 3), 77, np.uint8)
    assert (resize_crop(frames, 10, 10) == 77).all()
    frames[:, :, :20] = frames[:, :, 60:] = 0  # what a centred square leaves out
    assert (resize_crop(frames, 10, 10)[:, :, 2:-2] == 77).all()


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((1, 32, 32, 3), np.uint8)
    stripes[:, :, ::2] = 255
    assert np.abs(resize_crop(stripes, 8, 8).astype(int) - 127).max() < 20


def test_pixels_go_from_minus_one_to_one_and_back_without_loss() -> None:
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 1, 16, 16)
    assert pixels.dtype == np.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert (from_pixels(pixels) == frames).all()
    assert set(np.unique(from_pixels(np.full((3, 1, 2, 2), 9.0)))) == {255}
