"""Blur: mean width of edges in px of the source (ffmpeg's blurdetect; Marziliano et al. 2002), median over the sampled
frames.

3 to 6: sharp; above 10: blurred, out of focus or enlarged. null: no edges to measure.
"""

from stdit.curation.clips import ClipView, median

VERSION = 1


def blur(clip: ClipView) -> float | None:
    return median(clip.sample_numbers["blur"])
