"""Quality of one video without a reference: VBench's arithmetic where the name says so, and measures of our own.

Frames are uint8 (T, H, W, 3), T at least 2 (3 for smoothness).
"""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
from av.filter import Graph
from numpy.typing import NDArray

Frames = NDArray[np.uint8]


def temporal_flickering(frames: Frames) -> float:
    """VBench's: 1 - the mean absolute difference of neighbouring frames over 255. 1 is a still."""
    x = frames.astype(np.float32)
    return float(np.mean([1 - np.abs(b - a).mean() / 255 for a, b in pairwise(x)]))


def linear_motion_smoothness(frames: Frames) -> float:
    """1 - the mean absolute error over 255 of each frame as the mean of its neighbours.

    VBench's motion smoothness has the same form, with frames interpolated by AMT-S in place of the mean.
    """
    x = frames.astype(np.float32)
    return float(1 - np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).mean() / 255)


def vmaf_motion(frames: Frames) -> float:
    """VMAF's motion feature (ffmpeg's vmafmotion), the mean over frames: difference of blurred luma, 0 is a still.

    How much moves; VBench's dynamic degree thresholds RAFT's optical flow instead.
    """
    graph = Graph()
    height, width = frames.shape[1:3]
    source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 25))
    grey, motion, sink = graph.add("format", "gray"), graph.add("vmafmotion"), graph.add("buffersink")
    source.link_to(grey)
    grey.link_to(motion)
    motion.link_to(sink)
    graph.configure()
    scores = []
    for i, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = i
        graph.push(frame)
        found: av.VideoFrame = graph.pull()  # pyright: ignore[reportAssignmentType]
        scores.append(float(found.metadata["lavfi.vmafmotion.score"]))  # pyright: ignore[reportAttributeAccessIssue]
    return float(np.mean(scores[1:]))


def consistency(features: NDArray[np.float64]) -> float:
    """VBench's subject and background consistency of one video: frame features (T, D) -> mean similarity.

    Of every frame but the first: the mean of its cosine similarities, at least 0, to the first frame and the one
    before.
    """
    x = features / np.linalg.norm(features, axis=1, keepdims=True)
    to_previous = (x[1:] * x[:-1]).sum(1).clip(0)
    to_first = (x[1:] * x[:1]).sum(1).clip(0)
    return float(((to_previous + to_first) / 2).mean())
