"""What every reader of clips offers: facts, frames by index, one kind of error. Readers themselves: decode.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

# Frames that one call may hold, in bytes: more is a mistake (or an attack), not a training clip.
MAX_BYTES = 4 << 30


class DecodeError(ValueError):
    """A clip that cannot be decoded. `reason` does not repeat the path."""

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = str(path)
        self.reason = reason


class DecodeTimeout(DecodeError):
    """Decoding took longer than its limit and was stopped."""


@dataclass(frozen=True)
class Facts:
    """What is known of a clip without its frames. `fps` is 0 for a still image; sizes in px, as shown."""

    frame_count: int
    fps: float
    height: int
    width: int


class Reader:
    """What every decoder offers: `facts` and `get`. A context manager."""

    def __init__(self, path: Path, facts: Facts) -> None:
        self.path = path
        self.facts = facts

    @property
    def frame_count(self) -> int:
        return self.facts.frame_count

    @property
    def fps(self) -> float:
        return self.facts.fps

    @property
    def height(self) -> int:
        return self.facts.height

    @property
    def width(self) -> int:
        return self.facts.width

    def get(self, indices: Sequence[int]) -> np.ndarray:
        """Frames `indices`, in the order asked, repeats allowed: uint8 (T, H, W, 3). DecodeError: damaged, or out of range."""
        outside = [i for i in indices if not 0 <= i < self.frame_count]
        if outside:
            raise DecodeError(self.path, f"frame {outside[0]} was asked for, the clip has {self.frame_count}")
        size = len(indices) * self.height * self.width * 3
        if size > MAX_BYTES:
            raise DecodeError(self.path, f"{len(indices)} frames are {size:,} bytes, more than {MAX_BYTES:,}")
        frames = self._get(indices) if len(indices) else np.empty((0, self.height, self.width, 3), np.uint8)
        if frames.shape[1:3] != (self.height, self.width):
            found = f"{frames.shape[1]}x{frames.shape[2]}"
            raise DecodeError(self.path, f"frames change size from {self.height}x{self.width} to {found}")
        return frames

    def _get(self, indices: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
