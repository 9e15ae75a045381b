"""Motion: mean absolute change of luma within 1/24 s, in levels of 255, on pictures of 64 x 64 (as ffmpeg's vmafmotion,
coarser).

0: a still; 0.3: a talking head; 3: a walk through a street; above 10: flicker, or a camera thrown about. Up to 24
frames a second it is the change from frame to frame.
"""

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1


def motion(clip: ClipView) -> float:
    return float(np.mean(clip.frame_numbers["motion"][1:])) if clip.frames > 1 else 0.0
