"""Clips made for the tests of this folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    """uint8 (T, H, W, 3): soft moving colours, each frame unlike the others."""
    t, y, x = np.mgrid[0:frames, 0:height, 0:width]
    waves = (np.sin(x / 9 + t / 3), np.cos(y / 7 + t / 4), np.sin((x + y) / 11 - t / 5))
    return np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8)


def encode(path: Path, frames: np.ndarray, codec: str = "libx264", pixels: str = "yuv420p", **options: str) -> Path:
    """Writes uint8 (T, H, W, 3) as a video of 24 frames a second."""
    with ordinary_scheduling(), av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=24, options={"threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@contextmanager
def ordinary_scheduling() -> Iterator[None]:
    """Takes back what SVT-AV1 does for root: it makes the thread that calls it a real-time one (SCHED_FIFO, 99), and so
    all threads and processes that this one starts later, beside which the rest of the machine hardly runs."""
    try:
        yield
    finally:
        if hasattr(os, "sched_setscheduler"):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def lossless(path: Path, frames: np.ndarray) -> Path:
    """Writes a video that decodes to exactly these frames."""
    return encode(path, frames, "libx264rgb", "rgb24", qp="0", preset="ultrafast", g="4")
