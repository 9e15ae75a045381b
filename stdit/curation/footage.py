"""Generated films with known cuts, dissolves, fades and flashes: to train and to measure the detectors.

    film = make_film(seed=1, content="test")       # film.frames, film.transitions

Shots pan and zoom over the photographs that scikit-learn (training) and matplotlib (test) ship, carry scans of
handwriting over colour, or are waves and clouds; with noise, flashes, and changes of light. Training and test share no
photograph, scan or texture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from PIL import Image
from scipy.ndimage import zoom

from stdit.curation.transitions import Transition

Content = Literal["train", "test"]


@dataclass(frozen=True)
class Film:
    """frames: uint8 (T, H, W, 3). transitions in order; of a fade, one from the first darker frame to the last.
    flashes: first frames."""

    frames: np.ndarray
    fps: int
    transitions: list[Transition]
    flashes: list[int]


@lru_cache
def _photographs(content: Content) -> list[np.ndarray]:
    if content == "train":
        from sklearn.datasets import load_sample_images

        images: Any = load_sample_images()
        return [np.asarray(image) for image in images.images]
    import matplotlib

    return [np.asarray(Image.open(f"{matplotlib.get_data_path()}/sample_data/grace_hopper.jpg").convert("RGB"))]


@lru_cache
def _scans(content: Content) -> np.ndarray:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    return data.images[:1200] if content == "train" else data.images[1200:]


def make_film(
    seed: int,
    content: Content = "train",
    shots: int = 12,
    size: tuple[int, int] = (72, 128),
    fps: int = 24,
    kinds: Sequence[str] = ("cut", "cut", "dissolve", "dissolve", "fade"),
) -> Film:
    """`shots` shots of 2 to 4 s, joined by transitions drawn from `kinds`; dissolves last 1/3 to 1.5 s, fades 1/3 to
    5/6 s each way."""
    random = np.random.default_rng([seed, content == "test"])
    parts: list[np.ndarray] = []
    transitions: list[Transition] = []
    flashes: list[int] = []
    shot = _shot(random, content, size, fps)
    at = 0
    for _ in range(shots - 1):
        following, kind = _shot(random, content, size, fps), random.choice(kinds)
        if random.random() < 0.3:
            flash, length = len(shot) // 2, int(random.integers(1, 4))
            shot[flash : flash + length] = 255 - (255 - shot[flash : flash + length]) * random.uniform(0, 0.4)
            flashes.append(at + flash)
        end = at + len(shot)
        if kind == "cut":
            transitions.append(Transition(end, end, "cut"))
        elif kind == "dissolve":
            length = min(round(fps * random.choice([1 / 3, 1 / 2, 1, 1.5])), len(shot) - fps // 2, len(following) - fps)
            weight = _ramp(random, length)[:, None, None, None]
            shot[-length:] = shot[-length:] * (1 - weight) + following[:length] * weight
            following = following[length:]
            transitions.append(Transition(end - length, end, "dissolve"))
        else:
            length = min(round(fps * random.choice([1 / 3, 1 / 2, 5 / 6])), len(shot) - fps // 2)
            weight = _ramp(random, length)[:, None, None, None]
            level = float(random.choice([0, 0, 255]))
            shot[-length:] = shot[-length:] * (1 - weight) + level * weight
            following[:length] = following[:length] * weight + level * (1 - weight)
            transitions.append(Transition(end - length, end + length, "dissolve"))
        parts.append(shot)
        at += len(shot)
        shot = following
    frames = np.concatenate([*parts, shot])
    return Film(frames.clip(0, 255).astype(np.uint8), fps, transitions, flashes)


def _ramp(random: np.random.Generator, length: int) -> np.ndarray:
    """Weights between 0 and 1, linear or eased at both ends."""
    linear = (np.arange(length) + 1) / (length + 1)
    return linear if random.random() < 0.7 else linear**2 * (3 - 2 * linear)


def _shot(random: np.random.Generator, content: Content, size: tuple[int, int], fps: int) -> np.ndarray:
    """float32 (T, H, W, 3) in levels."""
    frames = int(fps * random.uniform(2, 4))
    kind = random.choice(["photograph", "photograph", "photograph", "scans", "texture"])
    if kind == "photograph":
        made = _pan(random, _photographs(content), frames, size, 24 / fps)
    elif kind == "scans":
        made = _drift(random, _scans(content), frames, size, 24 / fps)
    else:
        made = (_waves if content == "train" else _clouds)(random, frames, size, 24 / fps)
    if random.random() < 0.15:  # a change of light within the shot
        made = (
            made
            * np.interp(np.arange(frames), [0, frames * 0.4, frames * 0.6, frames], [1, 1, 1.5, 1.5])[
                :, None, None, None
            ]
        )
    made = made + random.normal(0, random.choice([0.0, 2.0, 5.0]), made.shape)
    return made.clip(0, 255).astype(np.float32)


def _pan(
    random: np.random.Generator, photographs: list[np.ndarray], frames: int, size: tuple[int, int], step: float
) -> np.ndarray:
    image = photographs[random.integers(len(photographs))]
    height, width = image.shape[:2]
    own = min(height, width * size[0] / size[1]) * random.uniform(0.25, 0.6)
    other = own * size[1] / size[0]
    top, left = random.uniform(0, height - own), random.uniform(0, width - other)
    down, right = random.normal(0, 1, 2) * random.choice([0, 0.3, 1, 2.5]) * step
    growth = random.choice([0.0, 0.0, 0.002, -0.002]) * step
    jitter = random.choice([0.0, 0.0, 0.6])
    picture, found = Image.fromarray(image), []
    for t in range(frames):
        h, w = min(own * (1 + growth * t), height), min(other * (1 + growth * t), width)
        y = float(np.clip(top + down * t + random.normal(0, 1) * jitter, 0, height - h))
        x = float(np.clip(left + right * t + random.normal(0, 1) * jitter, 0, width - w))
        found.append(
            np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR, box=(x, y, x + w, y + h)))
        )
    return np.stack(found).astype(np.float32) * random.uniform(0.6, 1.2)


def _drift(
    random: np.random.Generator, scans: np.ndarray, frames: int, size: tuple[int, int], step: float
) -> np.ndarray:
    made = np.zeros((frames, *size, 3), np.float32) + random.integers(0, 120, 3)
    side = size[0] // 2
    for _ in range(random.integers(1, 4)):
        scan = Image.fromarray((scans[random.integers(len(scans))] * 15.9).astype(np.uint8))
        ink = np.asarray(scan.resize((side, side), Image.Resampling.BILINEAR))[..., None] / np.float32(255)
        colour, (down, right) = random.integers(100, 255, 3), random.normal(0, 1.5, 2) * step
        y, x = random.uniform(0, size[0] - side), random.uniform(0, size[1] - side)
        for t in range(frames):
            top, left = int(np.clip(y + down * t, 0, size[0] - side)), int(np.clip(x + right * t, 0, size[1] - side))
            place = made[t, top : top + side, left : left + side]
            place[:] = place * (1 - ink) + colour * ink
    return made


def _waves(random: np.random.Generator, frames: int, size: tuple[int, int], step: float) -> np.ndarray:
    t, y, x = np.mgrid[0:frames, 0 : size[0], 0 : size[1]].astype(np.float32)
    channels = []
    for _ in range(3):
        angle, period, speed = random.uniform(0, 6.3), random.uniform(5, 30), random.normal(0, 0.1) * step
        phase = (x * np.cos(angle) + y * np.sin(angle)) / period + t * speed + random.uniform(0, 6.3)
        channels.append(127 + random.uniform(40, 110) * np.sin(phase))
    return np.stack(channels, -1)


def _clouds(random: np.random.Generator, frames: int, size: tuple[int, int], step: float) -> np.ndarray:
    """Noise of several scales that drifts."""
    height, width = size[0] + 64, size[1] + 64
    field = np.zeros((height, width, 3))
    for cell in (4, 8, 16, 32):
        coarse = random.normal(0, cell / 4, (height // cell + 2, width // cell + 2, 3))
        field += np.asarray(zoom(coarse, (cell, cell, 1), order=1))[:height, :width]
    field = 127 + field * random.uniform(8, 20)
    speed = random.normal(0, 0.6, 2) * step
    at = [(32 + np.clip(speed * (t - frames / 2), -32, 31)).astype(int) for t in range(frames)]
    return np.stack([field[y : y + size[0], x : x + size[1]] for y, x in at]).astype(np.float32)


# ------------------------------------------------------------------------------------- measurement


@dataclass
class Detection:
    """Counts of one kind of transition."""

    found: int = 0
    missed: int = 0
    false: int = 0

    @property
    def recall(self) -> float:
        return self.found / max(1, self.found + self.missed)

    @property
    def precision(self) -> float:
        return self.found / max(1, self.found + self.false)


def compare(
    truth: Sequence[Transition], found: Sequence[Transition], into: dict[str, Detection], tolerance: int = 0
) -> None:
    """Adds the counts of one film. A hard cut is found at its frame, give or take `tolerance`; a dissolve where a found
    one overlaps it. A transition of the other kind at the same place is neither missing nor false twice: it counts as
    missed alone."""
    for kind in ("cut", "dissolve"):
        counts = into.setdefault(kind, Detection())
        wanted, some = [t for t in truth if t.kind == kind], [f for f in found if f.kind == kind]
        used: set[int] = set()
        for t in wanted:
            hits = [
                i
                for i, f in enumerate(some)
                if (abs(f.start - t.start) <= tolerance if kind == "cut" else f.start < t.end and f.end > t.start)
            ]
            counts.found += bool(hits)
            counts.missed += not hits
            used |= set(hits)
        other = [t for t in truth if t.kind != kind]
        for i, f in enumerate(some):
            near = any(f.start <= t.end + 2 and f.end >= t.start - 2 for t in other)
            counts.false += i not in used and not near
