"""Camera shake: how much the picture's movement changes from frame to frame, in percent of its size (root mean square).

A smooth pan is 0; a tripod below 0.1; a walking hand-held camera about 1.
"""

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1


def shake(clip: ClipView) -> float:
    # The first frame's movement is that since the shot before.
    changes = np.diff(clip.frame_numbers["shift"][1:], axis=0)
    # Half a picture at once is a failed measurement, not a movement.
    changes = changes[np.abs(changes).max(axis=1) < 0.25]
    return 100 * float(np.sqrt(np.mean(np.sum(changes**2, axis=1)))) if len(changes) else 0.0
