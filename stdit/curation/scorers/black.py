"""Black: share of frames of which 98 % of the pixels are below a tenth of white (ffmpeg's blackdetect)."""

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1


def black(clip: ClipView) -> float:
    return float(np.mean(clip.frame_numbers["dark_share"] >= 0.98))
