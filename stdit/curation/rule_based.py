"""A captioner without a model: rules on brightness and movement. It is for tests and the embedded default, and no
language model.

captions: [{name: rules, function: "stdit.curation.rule_based:rule_based_caption"}]
"""

from __future__ import annotations

import numpy as np

from stdit.curation.clips import ClipView


def rule_based_caption(clip: ClipView) -> str:
    """ "A bright shape moves left over a dark red ground": what differs from the frames' median, and where its middle
    goes."""
    assert clip.pictures is not None
    frames = clip.pictures.astype(np.float32)
    luma = frames.mean(-1)
    ground = np.median(luma, axis=0)
    level = "dark" if ground.mean() < 96 else "light" if ground.mean() > 160 else "grey"
    channels = frames.reshape(-1, 3).mean(0)
    name = ("red", "green", "blue")[int(channels.argmax())]
    colour = f"{level} {name}" if channels.max() - channels.min() > 12 else level
    if len(luma) < 2:
        return f"A bright shape over a {colour} ground"
    # What moves: the brightest twentieth of each frame, against the same of the others.
    middles = []
    for frame in luma:
        rows, columns = np.nonzero(frame >= np.quantile(frame, 0.95))
        middles.append((rows.mean(), columns.mean()))
    down, right = np.subtract(middles[-1], middles[0])
    if max(abs(down), abs(right)) < 0.02 * max(luma.shape[1:]):
        return f"A bright shape stands still over a {colour} ground"
    direction = ("right" if right > 0 else "left") if abs(right) >= abs(down) else ("down" if down > 0 else "up")
    return f"A bright shape moves {direction} over a {colour} ground"
