"""Opening a clip: one protocol (reader.py) over decord, PyAV (pyav.py) and, for images, Pillow.

    with open_clip("a.mp4") as reader:
        frames = reader.get([0, 4, 8])  # uint8 (3, H, W, 3)

Frames are what a player shows: upright (rotation in the container's matrix or in EXIF is applied),
RGB, 8 bits, transparency over white. Pixels are taken as square, interlaced frames as they are.
A still image is a clip of one frame at 0 fps; an animated GIF, PNG or WebP is a clip.

These run in the calling process; `stdit.data.subprocess_decoder` runs them where they can be killed.
"""

from __future__ import annotations

import importlib.util
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from stdit.data.pyav import PyAVReader, closed_gops
from stdit.data.reader import DecodeError, Facts, Reader

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
# Formats whose readers run nothing and follow no references (EPS, for one, starts an interpreter).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ANIMATED = ("GIF", "PNG", "WEBP")
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# How the containers begin that decord reads faithfully.
MATROSKA = b"\x1aE\xdf\xa3"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
DECORD_INSTALLED = importlib.util.find_spec("decord") is not None


def open_clip(path: Path | str, decoder: str = "auto") -> Reader:
    """A reader of the image or video `path`.

    decoder: "decord", "pyav", or "auto": decord, and PyAV for what decord cannot read (AV1, or widths
    such as 16 whose rows it cannot copy). Images are read by Pillow whatever it says.
    Raises DecodeError (typed, with the reason); ValueError for a decoder that is unknown or not installed.
    """
    # Absolute: nothing in the name is taken for a protocol by the libraries below.
    path = Path(os.path.abspath(path))
    if decoder not in ("auto", "decord", "pyav"):
        raise ValueError(f"decoder {decoder!r}: expected auto, decord or pyav")
    if decoder == "decord" and not DECORD_INSTALLED:
        raise ValueError("decoder decord is not installed (no wheel for this platform?); use auto or pyav")
    _look(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageReader(path)
    if decoder == "pyav" or not DECORD_INSTALLED:
        return PyAVReader(path)
    return DecordReader(path) if decoder == "decord" else AutoReader(path)


def _look(path: Path) -> None:
    """Refuses what is plainly no clip. A text file can be a playlist, through which libav would open other files."""
    try:
        if path.exists() and not path.is_file():
            raise DecodeError(path, "is not a file")  # a folder, or a pipe, which would never end
        with path.open("rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        raise DecodeError(path, "no such file") from None
    except OSError as error:
        raise DecodeError(path, f"cannot be read: {error.strerror}") from None
    if not head:
        raise DecodeError(path, "is empty (0 bytes)")
    text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in head)
    if text and not head.startswith((b"YUV4MPEG2", b"P2", b"P3")):
        raise DecodeError(path, f"is a text file, not a clip; it begins {head[:24].decode('ascii')!r}")


# ------------------------------------------------------------------------------------------ images


class ImageReader(Reader):
    """Pillow: still images, and animated GIF, PNG and WebP."""

    def __init__(self, path: Path) -> None:
        Image.init()
        try:
            self._image = Image.open(path, formats=[f for f in IMAGE_FORMATS if f in Image.OPEN])
            frames = getattr(self._image, "n_frames", 1) if self._image.format in ANIMATED else 1
            if frames > 1:
                self._image.load()  # a WebP states its duration only then
            # Browsers play a GIF that states no duration at 10 frames a second.
            fps = 1000.0 / (self._image.info.get("duration") or 100.0) if frames > 1 else 0.0
            upright = self._image.getexif().get(0x0112, 1) < 5
        except PILLOW_ERRORS as error:
            raise DecodeError(path, f"not a readable image ({error})") from error
        width, height = self._image.size if upright else self._image.size[::-1]
        super().__init__(path, Facts(frames, fps, height, width))

    def _get(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return np.stack([self._frame(index) for index in indices])
        except PILLOW_ERRORS as error:
            raise DecodeError(self.path, f"damaged image ({error})") from error

    def _frame(self, index: int) -> np.ndarray:
        if self.frame_count > 1:
            self._image.seek(index)
        image = ImageOps.exif_transpose(self._image)
        if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
            grey = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no agreed range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))

    def close(self) -> None:
        self._image.close()


# ------------------------------------------------------------------------------------------ videos


class DecordReader(Reader):
    """decord 0.6, on its own ffmpeg 4.1: fast at random access; can hang on damaged files (dmlc/decord#373).

    Two kinds of file in which it gives other frames than those asked for, without a word, are refused:
    containers without times (AVI), and open GOPs (x265's default) where a frame behind the first GOP is wanted.
    """

    def __init__(self, path: Path) -> None:
        import decord

        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration)
        with path.open("rb") as file:
            head = file.read(8)
        if head[:4] != MATROSKA and head[4:8] not in MP4_BOXES:
            raise DecodeError(path, "decord: not MP4, MOV, MKV or WebM, the containers it is trusted with")
        try:
            # fault_tol: a frame that decord patched up is an error, not a frame.
            self._video = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)  # pyright: ignore
            height, width = self._video.get_batch([0]).shape[1:3]
            super().__init__(path, Facts(len(self._video), float(self._video.get_avg_fps()), height, width))
        except self._errors as error:
            raise DecodeError(path, f"decord: {_first_line(error)}") from error
        self._seekable: bool | None = None

    def _get(self, indices: Sequence[int]) -> np.ndarray:
        try:
            keys = self._video.get_key_indices()
            if self._seekable is None and len(keys) > 1 and max(indices) >= keys[1]:
                self._seekable = closed_gops(self.path)
            if self._seekable is False:
                raise DecodeError(self.path, "decord: open GOPs, through which it cannot seek")
            return self._video.get_batch(list(indices)).asnumpy()
        except self._errors as error:
            raise DecodeError(self.path, f"decord: {_first_line(error)}") from error

    def close(self) -> None:
        del self._video


class AutoReader(Reader):
    """decord until it fails, then PyAV, from the frame at which decord failed."""

    def __init__(self, path: Path) -> None:
        try:
            self._reader: Reader = DecordReader(path)
        except DecodeError as error:
            self._reader = self._pyav(path, error)
        super().__init__(path, self._reader.facts)

    @staticmethod
    def _pyav(path: Path, error: DecodeError) -> Reader:
        try:
            return PyAVReader(path)
        except DecodeError as second:
            raise DecodeError(path, f"{second.reason}; {error.reason}") from second

    def _get(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return self._reader.get(indices)
        except DecodeError as error:
            if isinstance(self._reader, PyAVReader):
                raise
            self._reader.close()
            self._reader = self._pyav(self.path, error)
            return self._reader.get(indices)

    def close(self) -> None:
        self._reader.close()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
