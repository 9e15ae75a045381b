"""Letterbox: share of the picture's area that is black bars."""

from stdit.curation.clips import ClipView

VERSION = 1


def letterbox(clip: ClipView) -> float:
    _, _, height, width = clip.picture
    return 1 - height * width / (clip.height * clip.width)
