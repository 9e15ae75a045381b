"""A clip's frames as an extraction takes them, for what is compared with, or given to, a model that was trained on its features.

with open_row(clip) as reader:
    info = row_info(clip, reader)
    frames = read_row(clip, reader, sampled_indices(info, 17, sampling))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stdit.config.identity import FrameSampling
from stdit.data.decoding import ClipInfo, ClipReader, open_clip, open_part
from stdit.data.manifest import Clip
from stdit.data.probe import part_info, stated_info
from stdit.data.transforms import frame_indices, frame_step, frames_available, rate_reaches

# The first frames of a clip, each of them: where it is not known how a model's clips were read.
FIRST_FRAMES = FrameSampling()


def sampled_count(info: ClipInfo, sampling: FrameSampling) -> int:
    """How many frames an extraction finds in a clip; 0: its frame rate is below target_fps."""
    if info.frame_count > 1 and not rate_reaches(info.fps, sampling.target_fps):
        return 0
    return frames_available(info.frame_count, _step(info, sampling))


def sampled_indices(info: ClipInfo, frames: int, sampling: FrameSampling) -> list[int]:
    """The `frames` frames of a clip that an extraction takes. ValueError: it has fewer, or its frame rate is below target_fps."""
    if not sampled_count(info, sampling):
        raise ValueError(f"{info.fps:g} frames a second, the extraction's target_fps is {sampling.target_fps:g}")
    return frame_indices(info.frame_count, frames, _step(info, sampling), sampling.clip_window)


def _step(info: ClipInfo, sampling: FrameSampling) -> float:
    return frame_step(info.fps, sampling.frame_stride, sampling.target_fps)


def open_row(clip: Clip) -> ClipReader:
    """A reader of the file of a manifest's row. DecodeError."""
    return open_part(clip.file, "pyav") if clip.is_part else open_clip(clip.file, "pyav")


def row_info(clip: Clip, reader: ClipReader) -> ClipInfo:
    """Length and size of the clip (not its file's); the frame rate is the manifest's, if that states all of them, as in extraction.
    DecodeError: its frames or its crop lie outside the file."""
    found, stated = part_info(clip, reader.info), stated_info(clip)
    return found if stated is None else replace(found, fps=stated.fps)


def read_row(clip: Clip, reader: ClipReader, indices: Sequence[int]) -> np.ndarray:
    """Frames of the clip, counted from its own first, of its own pixels: uint8 (T, H, W, 3). DecodeError."""
    frames = reader.get([(clip.start_frame or 0) + index for index in indices])
    if clip.crop is None:
        return frames
    top, left, height, width = clip.crop
    return frames[:, top : top + height, left : left + width]
