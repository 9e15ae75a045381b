"""Freeze: share of frames that repeat the one before: less than 0.02 levels of mean change on 64 x 64 luma."""

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1
SAME = 0.02


def freeze(clip: ClipView) -> float:
    return float(np.mean(clip.frame_numbers["difference"][1:] < SAME)) if clip.frames > 1 else 0.0
