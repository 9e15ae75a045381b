"""One pass over a video or image: numbers of every frame, and some more of two frames a second.

Cuts, scores and duplicates follow from these numbers alone, so that a changed setting opens no file again. Frames are
processed in a stream: memory does not grow with the length of a video.

N frames · S sampled frames · K = len(LAGS_S) distances in time
"""

from __future__ import annotations

import io
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.filter import Graph
from av.video.reformatter import VideoReformatter
from scipy.fft import dctn

from stdit.data.decoding import DecodeError, PyAVReader, open_part

# Raised when the same file would give other numbers.
VERSION = 1
# Frames are shrunk to this many pixels a side, whatever their shape; blends are compared at half of it.
SIDE = 64
# Distances in time over which two shots are compared around a frame, for dissolves of up to twice as long.
LAGS_S = (1 / 6, 1 / 3, 2 / 3, 4 / 3, 8 / 3)
# A picture that is back after this long was interrupted by a flash.
FLASH_S = 0.2
# Sampled frames: so many a second.
SAMPLES_PER_S = 2.0
# Frames that are processed at a time.
CHUNK = 256
# Blur and blockiness are measured in the middle of a frame, in its own pixels.
NATIVE = (540, 960)
# Damaged places that a file may have before it is given up.
MOST_BREAKS = 20
# A pixel or a row below this level is black.
DARK = 26


@dataclass
class Analysis:
    """What is known of a file. `frames`: columns (N,) or (N, K); `samples`: columns (S, …), both with `index`, the
    frame's number.

    frames: luma_mean, luma_std, dark_share, difference (mean absolute change since the frame before, levels of 255),
    motion (the same since 1/24 s before), correlation (of both), returns, came_back (smallest difference between the
    picture before a change and after a flash, and the reverse), shift (x, y in shares of the width), and of K lags:
    blend (weight of the later picture), residual, distance (root mean square), similarity.
    samples: blur, blockiness (ffmpeg's blurdetect, blockdetect), hash (64 bits), bars (top, bottom, left, right in px).
    """

    fps: float
    height: int
    width: int
    frame_count: int
    # Ranges of frames that could be decoded, [start, end).
    segments: list[tuple[int, int]] = field(default_factory=list)
    # Where and why decoding broke off.
    broken: list[str] = field(default_factory=list)
    interlaced: bool = False
    frames: dict[str, np.ndarray] = field(default_factory=dict)
    samples: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def still(self) -> bool:
        """Whether it is an image."""
        return self.fps == 0

    def dumps(self) -> bytes:
        """As the bytes of an .npz file."""
        own = {"fps", "height", "width", "frame_count", "segments", "broken", "interlaced"}
        arrays = {f"frames.{k}": v for k, v in self.frames.items()} | {
            f"samples.{k}": v for k, v in self.samples.items()
        }
        about = np.frombuffer(json.dumps({k: getattr(self, k) for k in own}).encode(), np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, about=about, **arrays)
        return file.getvalue()

    @staticmethod
    def loads(content: bytes) -> Analysis:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            about: dict[str, Any] = json.loads(file["about"].tobytes())
            about["segments"] = [(start, end) for start, end in about["segments"]]
            parts: dict[str, dict[str, np.ndarray]] = {"frames": {}, "samples": {}}
            for name in file.files:
                group, _, column = name.partition(".")
                if column:
                    parts[group][column] = file[name]
        return Analysis(**about, frames=parts["frames"], samples=parts["samples"])


def analyse(
    path: Path | str, progress: Callable[[int], None] = lambda frame: None, until: int | None = None
) -> Analysis:
    """Decodes a video or image once. until: the first frame that is not decoded (where a decoder crashed before).
    progress: is called with each frame's index; while the file is opened, which reads all of it, with 0.

    A damaged place ends a segment; decoding goes on at the next key frame. DecodeError: no frame can be decoded.
    """
    with open_part(path, "pyav", lambda: progress(0)) as reader:
        info = reader.info
        found = Analysis(info.fps, info.height, info.width, info.frame_count)
        if missing := max(0, getattr(reader, "missing", 0)):
            found.broken.append(f"breaks off at frame {info.frame_count} of {info.frame_count + missing}")
        measured = Measurements(info.fps)
        start: int | None = 0
        while start is not None:
            first = last = start
            try:
                for index, frame in _frames(reader, start):
                    if until is not None and index >= until:
                        break
                    if index > last and last > first:  # frames that the decoder left out
                        _close(found, measured, first, last)
                        first = index
                    first = index if last == start == first else first
                    measured.add(index, frame)
                    found.interlaced |= bool(getattr(frame, "interlaced_frame", False))
                    last = index + 1
                    progress(index)
                start = None
            except (DecodeError, FFmpegError, ValueError) as error:
                reason = error.reason if isinstance(error, DecodeError) else str(error)
                found.broken.append(f"broke at frame {last} of {info.frame_count}: {reason}")
                more = reader.next_key(max(last, start)) if isinstance(reader, PyAVReader) else None
                start = more if more is not None and len(found.broken) <= MOST_BREAKS else None
            if last > first:
                _close(found, measured, first, last)
        if not found.segments:
            raise DecodeError(path, found.broken[0] if found.broken else "holds no frame that can be decoded")
        found.frames, found.samples = measured.columns()
        return found


def _close(found: Analysis, measured: Measurements, first: int, last: int) -> None:
    measured.end_segment()
    found.segments.append((first, last))


def _frames(reader: Any, start: int) -> Iterator[tuple[int, av.VideoFrame]]:
    if isinstance(reader, PyAVReader):
        yield from reader.stream(start)
        return
    for index in range(start, reader.frame_count):
        yield index, av.VideoFrame.from_ndarray(np.ascontiguousarray(reader.get([index])[0]), format="rgb24")


# ------------------------------------------------------------------------------------ measurements


class Measurements:
    """Collects frames in chunks. `add` each frame in order, `end_segment` behind the last one of those that follow one
    another."""

    def __init__(self, fps: float) -> None:
        rate = min(max(fps, 1.0), 120.0)
        self.lags = [max(1, round(seconds * rate)) for seconds in LAGS_S]
        self.flash = max(1, round(FLASH_S * rate))
        self.step = max(1, round(rate / 24))
        self.sample_every = max(1, round(rate / SAMPLES_PER_S))
        self._reach = max(*self.lags, self.flash + 1)
        self._small = VideoReformatter()
        self._native = NativeMeasures()
        self._indices: list[int] = []
        self._samples: list[dict[str, Any]] = []
        self._columns: list[dict[str, np.ndarray]] = []
        self._start_segment()

    def _start_segment(self) -> None:
        # Pictures around the frames still to measure: `_reach` before them, all after.
        self._pictures: deque[np.ndarray] = deque()
        self._before, self._count = 0, 0

    def add(self, index: int, frame: av.VideoFrame) -> None:
        rgb = self._small.reformat(frame, width=SIDE, height=SIDE, format="rgb24", interpolation="AREA", threads=1)
        picture = rgb.to_ndarray().astype(np.float32)
        self._pictures.append(picture)
        self._indices.append(index)
        if self._count % self.sample_every == 0:
            self._samples.append({"index": index, **self._native.measure(frame)})
        self._count += 1
        if len(self._pictures) - self._before >= CHUNK + self._reach:
            self._measure(CHUNK)

    def end_segment(self) -> None:
        left = len(self._pictures) - self._before
        if left:
            self._measure(left)
        self._start_segment()

    def _measure(self, count: int) -> None:
        """Measures the next `count` pictures, and drops those that no later one needs."""
        stack = np.stack(list(self._pictures))
        self._columns.append(measure_pictures(stack, self._before, count, self.lags, self.flash, self.step))
        drop = max(0, self._before + count - self._reach)
        for _ in range(drop):
            self._pictures.popleft()
        self._before += count - drop

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        frames = {name: np.concatenate([part[name] for part in self._columns]) for name in self._columns[0]}
        frames["index"] = np.array(self._indices, np.int32)
        names = self._samples[0]
        samples = {name: np.array([row[name] for row in self._samples]) for name in names}
        samples["index"] = samples["index"].astype(np.int32)
        return frames, samples


def measure_pictures(
    pictures: np.ndarray, first: int, count: int, lags: list[int], flash: int, step: int
) -> dict[str, np.ndarray]:
    """Columns of frames `first` to `first + count` of `pictures`, float32 (n, SIDE, SIDE, 3); the others are their
    surroundings."""
    n = len(pictures)
    at = np.arange(first, first + count)
    luma = pictures @ np.array([0.299, 0.587, 0.114], np.float32)
    flat = pictures.reshape(n, SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4)).reshape(n, -1)

    def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(flat[np.clip(a, 0, n - 1)] - flat[np.clip(b, 0, n - 1)]).mean(1)

    before = np.clip(at - 1, 0, n - 1)
    columns: dict[str, np.ndarray] = {
        "luma_mean": luma[at].mean((1, 2)),
        "luma_std": luma[at].std((1, 2)),
        "dark_share": (luma[at] < DARK).mean((1, 2)),
        "difference": np.abs(luma[at] - luma[before]).mean((1, 2)),
        "motion": np.abs(luma[at] - luma[np.clip(at - step, 0, n - 1)]).mean((1, 2)),
        "change": apart(at, before),
        "correlation": correlation(flat[at], flat[before]),
        "returns": np.min([apart(before, at + f) for f in range(1, flash + 1)], 0),
        "came_back": np.min([apart(at, before - f) for f in range(1, flash + 1)], 0),
        "shift": np.stack([global_shift(luma[i], luma[j]) for i, j in zip(before, at, strict=True)]),
    }
    for name, values in zip(("blend", "residual", "distance", "similarity"), _blends(flat, at, lags), strict=True):
        columns[name] = values.astype(np.float16)
    return {
        name: values if values.dtype == np.float16 else values.astype(np.float32) for name, values in columns.items()
    }


def _blends(flat: np.ndarray, at: np.ndarray, lags: list[int]) -> tuple[np.ndarray, ...]:
    """How each picture lies between those `lag` before and after: x = (1 - w) a + w b + rest. (count, K) each.

    w; |rest|² / |b - a|²; |b - a| as root mean square; correlation of a and b.
    """
    n, found = len(flat), []
    for lag in lags:
        a, b, x = flat[np.clip(at - lag, 0, n - 1)], flat[np.clip(at + lag, 0, n - 1)], flat[at]
        towards, own = b - a, x - a
        size = np.einsum("ij,ij->i", towards, towards) + 1e-3
        weight = np.einsum("ij,ij->i", own, towards) / size
        rest = np.maximum(np.einsum("ij,ij->i", own, own) / size - weight**2, 0)
        distance = np.sqrt(size / flat.shape[1])
        found.append((weight.clip(-4, 4), rest.clip(0, 100), distance, correlation(a, b)))
    return tuple(np.stack(values, 1) for values in zip(*found, strict=True))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, of rows; 0 where one of them is all but constant."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    sizes = np.sqrt(np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b))
    # Below one level of standard deviation there is nothing to compare.
    return np.where(sizes > a.shape[1], np.einsum("ij,ij->i", a, b) / np.maximum(sizes, 1e-6), 0.0)


_WINDOW = np.outer(np.hanning(SIDE), np.hanning(SIDE)).astype(np.float32)


def global_shift(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(x, y) by which the picture moved, in shares of its sides, by phase correlation (Kuglin and Hines 1975) with a
    parabola through the peak."""
    spectrum = np.fft.rfft2((b - b.mean()) * _WINDOW) * np.conj(np.fft.rfft2((a - a.mean()) * _WINDOW))
    size = np.abs(spectrum)
    if size.max() < 1e-3:
        return 0.0, 0.0
    surface = np.fft.irfft2(spectrum / (size + 1e-3 * size.max()), s=a.shape)
    row, column = np.unravel_index(int(surface.argmax()), surface.shape)

    def refine(line: np.ndarray, peak: int) -> float:
        low, top, high = line[peak - 1], line[peak], line[(peak + 1) % SIDE]
        curve = low - 2 * top + high
        found = peak + (0.5 * (low - high) / curve if curve < -1e-9 else 0.0)
        return (found - SIDE if found > SIDE / 2 else found) / SIDE

    return refine(surface[row], int(column)), refine(surface[:, column], int(row))


# --------------------------------------------------------------------------------- sampled frames


class NativeMeasures:
    """Measurements in a frame's own pixels: blur, blockiness, black bars, and a hash of the picture within them."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def measure(self, frame: av.VideoFrame) -> dict[str, Any]:
        luma = self._reformatter.reformat(frame, format="gray", threads=1).to_ndarray()
        luma = np.rot90(luma, round(frame.rotation / 90) % 4)
        bars = black_bars(luma)
        top, bottom, left, right = bars
        inside = luma[top : luma.shape[0] - bottom, left : luma.shape[1] - right]
        blur, blockiness = self._filters(inside)
        return {"blur": blur, "blockiness": blockiness, "hash": perceptual_hash(inside), "bars": bars}

    def _filters(self, luma: np.ndarray) -> tuple[float, float]:
        """ffmpeg's blurdetect (mean width of edges, px; Marziliano 2002) and blockdetect; NaN without edges."""
        height, width = (min(size, limit) for size, limit in zip(luma.shape, NATIVE, strict=True))
        # On the grid of 8 px that codecs use.
        top, left = ((size - own) // 16 * 8 for size, own in zip(luma.shape, (height, width), strict=True))
        if min(height, width) < 16:
            return math.nan, math.nan
        middle = av.VideoFrame.from_ndarray(
            np.ascontiguousarray(luma[top : top + height, left : left + width]), format="gray"
        )
        graph = Graph()
        graph.threads = 1
        source = graph.add_buffer(width=width, height=height, format=av.VideoFormat("gray"), time_base=Fraction(1, 25))
        graph.link_nodes(source, graph.add("blurdetect"), graph.add("blockdetect"), graph.add("buffersink")).configure()
        middle.pts = 0
        graph.vpush(middle)
        graph.vpush(None)
        found = graph.vpull().metadata
        return tuple(abs(float(found.get(f"lavfi.{name}", "nan"))) for name in ("blur", "block"))  # pyright: ignore


def black_bars(luma: np.ndarray) -> tuple[int, int, int, int]:
    """Rows (top, bottom) and columns (left, right) that are black from the edge on, in px; none if all is black.

    Behind a bar the picture begins along much of its edge; else the black is the picture's own.
    """

    def run(bright: np.ndarray) -> int:
        # Up to 2 % of a bar may be bright: the edge of a logo, noise.
        beyond = np.flatnonzero(bright > 0.02)
        return int(beyond[0]) if len(beyond) and bright[beyond[0] : beyond[0] + 4].max() >= 0.25 else 0

    bright = luma >= DARK
    top, bottom = run(bright.mean(1)), run(bright.mean(1)[::-1])
    across = bright[top : len(bright) - bottom].mean(0)
    return top, bottom, run(across), run(across[::-1])


def perceptual_hash(luma: np.ndarray) -> np.uint64:
    """64 bits: signs of the lowest 8 x 8 cosine coefficients of a picture of 32 x 32 against their median (pHash,
    Zauner 2010).

    0: a picture without contrast, which is like any other of its kind.
    """
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(luma), format="gray")
    small = frame.reformat(width=32, height=32, interpolation="AREA").to_ndarray().astype(np.float32)
    if small.std() < 4:
        return np.uint64(0)
    low = np.asarray(dctn(small, norm="ortho"))[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return np.packbits(bits).view(">u8")[0].astype(np.uint64)
