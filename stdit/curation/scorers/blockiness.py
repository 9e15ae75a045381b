"""Blockiness: edges on a codec's grid over those off it (ffmpeg's blockdetect), median over the sampled frames.

1 to 3: none; above 5: visible blocks. null: nothing to measure.
"""

from stdit.curation.clips import ClipView, median

VERSION = 1


def blockiness(clip: ClipView) -> float | None:
    return median(clip.sample_numbers["blockiness"])
