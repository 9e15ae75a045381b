"""From a clip to a bucket's shape and to pixels in [-1, 1]. numpy and Pillow alone."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Of a product of a fractional stride, so that 3 * (50 / 30) is 5.
ROUNDING = 1e-6
# Frame rates that differ by less than this share are one rate: 23.976 and 24.
SAME_RATE = 0.01


def frame_step(fps: float, stride: int = 1, target_fps: float | None = None) -> float:
    """Source frames from one frame taken to the next: `stride`, or fps / target_fps, which may be a fraction."""
    if target_fps is None or fps < (1 + SAME_RATE) * target_fps:
        return stride
    return fps / target_fps


def rate_reaches(fps: float, target_fps: float | None) -> bool:
    """Whether a video can be resampled to `target_fps` (None: it is not): frames are never repeated."""
    return target_fps is None or fps >= (1 - SAME_RATE) * target_fps


def frames_available(frame_count: int, stride: float) -> int:
    """How many frames a clip gives when every `stride`-th is taken."""
    return 1 + int((frame_count - 1) / stride + ROUNDING)


def frame_indices(frame_count: int, frames: int, stride: float = 1, mode: str = "first") -> list[int]:
    """Indices of `frames` frames, every `stride`-th: from the clip's beginning ("first") or its middle ("center").

    A fractional stride takes the frame that is shown at that time.

    Raises ValueError where the clip is too short: a frame is never repeated to fill a bucket.
    """
    if mode not in ("first", "center"):
        raise ValueError(f"clip_window {mode!r}: expected first or center")
    offsets = [int(i * stride + ROUNDING) for i in range(frames)]
    span = offsets[-1] + 1
    if span > frame_count:
        raise ValueError(f"{frames} frames at stride {stride:g} span {span} frames, the clip has {frame_count}")
    start = 0 if mode == "first" else (frame_count - span) // 2
    return [start + offset for offset in offsets]


def window_count(frames_available: int, frames: int, windows: tuple[int, int]) -> int:
    """How many windows of `frames` frames a clip gives. windows: frames from the beginning of one to the next, and the
    most."""
    every, most = windows
    return min(most, 1 + max(0, frames_available - frames) // every)


def window_indices(
    frame_count: int, frames: int, stride: float = 1, mode: str = "first", windows: tuple[int, int] = (1, 1)
) -> list[list[int]]:
    """`frame_indices` of each window of a clip (`window_count`); all are cut from one run of every `stride`-th frame.
    ValueError."""
    every = windows[0]
    count = window_count(frames_available(frame_count, stride), frames, windows)
    taken = frame_indices(frame_count, (count - 1) * every + frames, stride, mode)
    return [taken[i * every : i * every + frames] for i in range(count)]


def crop_box(height: int, width: int, to: tuple[int, int]) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the largest centred box, in px, with the aspect of `to` (height, width).

    Raises ValueError where that box would have to be enlarged.
    """
    if height < to[0] or width < to[1]:
        raise ValueError(f"a clip of {height}x{width} does not cover {to[0]}x{to[1]}, and clips are never enlarged")
    scale = min(height / to[0], width / to[1])
    box = (to[0] * scale, to[1] * scale)
    top, left = (height - box[0]) / 2, (width - box[1]) / 2
    # Rounding may put an edge 1e-14 outside; the resizer would refuse that.
    return max(left, 0.0), max(top, 0.0), min(left + box[1], float(width)), min(top + box[0], float(height))


def resize_crop(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (T, H, W, 3) -> (T, height, width, 3): the largest centred box of that aspect, shrunk with antialiasing.

    A clip that has the height or the width already is cropped to whole pixels and otherwise untouched.
    Raises ValueError where it would have to be enlarged.
    """
    old_height, old_width = frames.shape[1:3]
    box = crop_box(old_height, old_width, (height, width))
    if height == old_height or width == old_width:
        top, left = (old_height - height) // 2, (old_width - width) // 2
        return frames[:, top : top + height, left : left + width]
    shrunk = [Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC, box=box) for f in frames]
    return np.stack([np.asarray(image) for image in shrunk])


def to_pixels(frames: np.ndarray) -> np.ndarray:
    """uint8 (T, H, W, 3) -> float32 (3, T, H, W) in [-1, 1]."""
    return np.ascontiguousarray(np.moveaxis(frames, -1, 0), dtype=np.float32) / np.float32(127.5) - np.float32(1)


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """float (3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3); what lies outside is clipped. Inverse of `to_pixels`."""
    levels = np.rint((np.asarray(pixels, np.float32) + 1) * np.float32(127.5))
    return np.ascontiguousarray(np.moveaxis(np.clip(levels, 0, 255).astype(np.uint8), 0, -1))
