"""A clip's frames as an extraction takes them (frame_sampling.py), for what is compared with, or given to, a model that
was trained on its features.

with open_row(clip) as reader:
    info = row_info(clip, reader)
    frames = read_row(clip, reader, sampled_indices(info, 17, sampling))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stdit.data.decoding import ClipInfo, ClipReader, open_clip, open_part
from stdit.data.manifest import Clip
from stdit.data.probe import part_info, stated_info


def open_row(clip: Clip) -> ClipReader:
    """A reader of the file of a manifest's row. DecodeError."""
    return open_part(clip.file, "pyav") if clip.is_part else open_clip(clip.file, "pyav")


def row_info(clip: Clip, reader: ClipReader) -> ClipInfo:
    """Length and size of the clip (not its file's); the frame rate is the manifest's, if that states all of them, as in
    extraction.
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
