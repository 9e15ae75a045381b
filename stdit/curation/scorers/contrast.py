"""Contrast: standard deviation of luma within a frame, mean over frames; 0 (flat) to 0.5 (black and white)."""

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1


def contrast(clip: ClipView) -> float:
    return float(np.mean(clip.frame_numbers["luma_std"])) / 255
