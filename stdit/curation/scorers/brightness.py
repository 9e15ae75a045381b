"""Brightness: mean luma, 0 (black) to 1 (white)."""

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1


def brightness(clip: ClipView) -> float:
    return float(np.mean(clip.frame_numbers["luma_mean"])) / 255
