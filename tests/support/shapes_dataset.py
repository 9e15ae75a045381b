"""A small manifest that has nothing to do with digits: shapes that wander, its columns under names of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
SHAPES = ("disc", "cross", "bar")


def shape_of(name: str, side: int) -> np.ndarray:
    """A picture of a shape, (side, side) in [0, 1]."""
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    if name == "disc":
        return (x * x + y * y <= (side / 2) ** 2).astype(float)
    if name == "cross":
        return ((abs(x) < side / 6) | (abs(y) < side / 6)).astype(float)
    return (abs(y) < side / 6).astype(float)


def wandering(name: str, canvas: int, frames: int, heading: str | None, rng: np.random.Generator) -> np.ndarray:
    """The shape on a canvas, a pixel a frame in the heading's direction: uint8 (T, H, W, 3)."""
    side = canvas // 2
    step = np.array(STEPS[heading]) if heading else np.zeros(2, int)
    path = np.arange(frames)[:, None] * step
    start = rng.integers(-path.min(0), canvas - side - path.max(0) + 1)
    clip = np.zeros((frames, canvas, canvas))
    for image, (top, left) in zip(clip, path + start, strict=True):
        image[top : top + side, left : left + side] = shape_of(name, side) * rng.uniform(0.8, 1)
    noisy = clip * 255 + rng.normal(0, 4, clip.shape)
    return np.repeat(noisy.clip(0, 255).round().astype(np.uint8)[..., None], 3, -1)


def save_clip(path: Path, frames: np.ndarray) -> None:
    """A PNG, animated where there is more than one frame: without loss."""
    images = [Image.fromarray(frame) for frame in frames]
    if len(images) == 1:
        images[0].save(path)
    else:
        images[0].save(path, save_all=True, append_images=images[1:], duration=125)


def save_generated(
    folder: Path, rows: Sequence[dict[str, Any]], clips: Sequence[np.ndarray | None], **protocol: Any
) -> Path:
    """A folder as stdit.generate leaves it; None stands for a prompt that failed."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (row, frames) in enumerate(zip(rows, clips, strict=True)):
        file = None if frames is None else f"{i:04d}.png"
        if frames is not None and file is not None:
            save_clip(folder / file, frames)
        lines.append(
            json.dumps({**row, "file": file, "error": "boom" if frames is None else None, "protocol": protocol})
        )
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def save_manifest(folder: Path, seed: int = 0) -> Path:
    """Images and 4-frame clips of three shapes: 60 images and 96 clips to train on, 24 and 48 held out."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    for split, images, clips in (("train", 60, 96), ("validation", 24, 48)):
        for i in range(images + clips):
            name, frames = SHAPES[i % 3], 1 if i < images else 4
            heading = None if frames == 1 else tuple(STEPS)[i // 3 % 4]
            file = f"{split}-{i:03d}.png"
            save_clip(folder / file, wandering(name, 16, frames, heading, rng))
            caption = f"a {name}" + (f" goes {heading}" if heading else "")
            rows.append(
                {"path": file, "caption": caption, "split": split, "frames": frames, "height": 16, "width": 16}
                | {"shape": name, "heading": heading, "fps": None if frames == 1 else 8}
            )
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
