"""Control inputs: a file per clip, named in a column of the manifest, cropped and resized as the clip."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.config import Bucket
from stdit.data import records
from stdit.data.decoding import ClipInfo, DecodeError
from stdit.data.manifest import Clip
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError, is_of_object
from stdit.data.subprocess_decoder import SubprocessDecoder


def read_control(
    decoder: SubprocessDecoder,
    clip: Clip,
    column: str,
    info: ClipInfo,
    indices: Sequence[int],
    bucket: Bucket,
    cache: ObjectCache,
) -> np.ndarray:
    """Frames of the control input of `clip`, uint8 (T or 1, H, W, 3): the same `indices` and crop; one frame of an
    image.

    info: the clip's. DecodeError: no file named, or not found; another length or aspect than the clip's; cannot be
    decoded.
    """
    try:
        location = clip.beside(clip.value(column))
    except ValueError as error:
        raise DecodeError(clip.key, f"{column}: {error}") from error
    if isinstance(location, Path) and not location.is_file():
        raise DecodeError(location, f"{column}: {location.name}: no such file")
    try:
        with cache.local(location) as file:
            return _read(decoder, file, column, info, indices, bucket)
    except StoreError as error:
        if not is_of_object(error):
            raise
        raise DecodeError(location, f"{column}: {location.name}: {error.strerror}") from error


def _read(
    decoder: SubprocessDecoder, file: Path, column: str, info: ClipInfo, indices: Sequence[int], bucket: Bucket
) -> np.ndarray:
    found = decoder.probe(file)
    if found.frame_count not in (1, info.frame_count):
        raise DecodeError(
            file,
            f"{column}: {file.name} has {found.frame_count} frames, the clip {info.frame_count}; give as many, or one",
        )
    # To within a pixel: both are cut to the bucket from their middle.
    if abs(found.height * info.width - found.width * info.height) > max(found.width, info.width):
        size, own = f"{found.height}x{found.width}", f"{info.height}x{info.width}"
        raise DecodeError(
            file, f"{column}: {file.name} is {size} (height x width), of another shape than the clip, {own}"
        )
    return decoder.read(file, [0] if found.frame_count == 1 else indices, (bucket.height, bucket.width))


def control_state(clip: Clip, column: str, cache: ObjectCache) -> dict[str, Any]:
    """Path and file state of the control input of `clip`; path None if none is named."""
    try:
        value = clip.value(column)
        return {"path": value, **records.source_state(clip.beside(value), cache)}
    except ValueError:
        return {"path": None, "size": -1, "mtime_ns": 0, "digest": ""}
