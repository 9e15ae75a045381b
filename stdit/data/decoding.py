"""Decoding clips: one interface over decord, PyAV and, for images, Pillow.

    with open_clip("a.mp4") as reader:
        frames = reader.get([0, 4, 8])  # uint8 (3, H, W, 3)

Frames are what ffmpeg shows: upright (rotation in the container's matrix or in EXIF is applied),
RGB, 8 bits, transparency over white, without those that an edit list hides. Pixels are taken as square,
interlaced frames as they are.
A still image is a clip of one frame at 0 fps; an animated GIF, PNG or WebP is a clip.

Readers run in the calling process; `stdit.data.subprocess_decoder` runs them where they can be killed.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import itertools
import os
import struct
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

from stdit.files import Closable

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
# Formats whose readers run nothing and follow no references (EPS, for one, starts an interpreter).
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
ANIMATED = ("GIF", "PNG", "WEBP")
# EXIF orientations that swap height and width; numbers that EXIF does not have change nothing.
TURNED = (5, 6, 7, 8)
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
# How the containers begin that decord reads faithfully.
MATROSKA = b"\x1aE\xdf\xa3"
MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
# Containers that keep the time at which each frame is shown, as libav names them. In others (AVI, raw streams) libav
# guesses times from the order of decoding, which with B-frames is another.
TIMED_CONTAINERS = {"mov", "matroska", "mpegts", "mpeg", "flv", "asf", "nut"}
# Decoders that read the transparency of VP8 and VP9, which libav's own ones leave out.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# After a key frame, frames that are shown before it come within so many packets (H.264 reorders at most 16).
REORDERED = 32
DECORD_INSTALLED = importlib.util.find_spec("decord") is not None
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


class InfoMismatch(DecodeError):
    """A clip of another size or length than was stated. `found`: those of the file."""

    def __init__(self, path: Path | str, stated: ClipInfo, found: ClipInfo) -> None:
        super().__init__(path, f"the manifest says {_size_of(stated)}, the file has {_size_of(found)}")
        self.found = found


@dataclass(frozen=True)
class ClipInfo:
    """What is known of a clip without its frames. `fps` is 0 for a still image; sizes in px, as shown."""

    frame_count: int
    fps: float
    height: int
    width: int


def check_info(path: Path | str, stated: ClipInfo, found: ClipInfo) -> None:
    """InfoMismatch: length or size differ. Frame rates may: a manifest can set another one."""
    if (stated.frame_count, stated.height, stated.width) != (found.frame_count, found.height, found.width):
        raise InfoMismatch(path, stated, found)


def _size_of(info: ClipInfo) -> str:
    return f"{info.frame_count} frames of {info.height}x{info.width}"


class ClipReader(Closable):
    """What every decoder offers: `info` and `get`. A context manager that lets go of the file."""

    def __init__(self, path: Path, info: ClipInfo) -> None:
        self.path = path
        self.info = info

    @property
    def frame_count(self) -> int:
        return self.info.frame_count

    @property
    def fps(self) -> float:
        return self.info.fps

    @property
    def height(self) -> int:
        return self.info.height

    @property
    def width(self) -> int:
        return self.info.width

    def get(self, indices: Sequence[int]) -> np.ndarray:
        """Frames `indices`, in the order asked, repeats allowed: uint8 (T, H, W, 3). DecodeError: damaged, or out of
        range."""
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

    @abstractmethod
    def _get(self, indices: Sequence[int]) -> np.ndarray: ...


def open_clip(path: Path | str, decoder: str = "auto", progress: Callable[[], None] | None = None) -> ClipReader:
    """A reader of the image or video `path`.

    decoder: "decord", "pyav", or "auto": the one that was measured to be faster and to notice more damage, PyAV
    (benchmarks/decoders.py, docs/data.md). Images are read by Pillow whatever it says.
    progress: called for each packet and frame that PyAV reads to open a video, which of a long one takes minutes.
    Raises DecodeError (typed, with the reason); ValueError for a decoder that is unknown or not installed.
    """
    # Absolute: nothing in the name is taken for a protocol by the libraries below.
    path = Path(os.path.abspath(path))
    if decoder not in ("auto", "decord", "pyav"):
        raise ValueError(f"decoder {decoder!r}: expected auto, decord or pyav")
    if decoder == "decord" and not DECORD_INSTALLED:
        raise ValueError("decoder decord is not installed (no wheel for this platform?); use auto")
    _look(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageReader(path)
    return DecordReader(path) if decoder == "decord" else PyAVReader(path, progress=progress)


def open_part(path: Path | str, decoder: str = "auto", progress: Callable[[], None] | None = None) -> ClipReader:
    """As `open_clip`, of a file of which only a part is used: a video that breaks off has the frames before that."""
    path = Path(os.path.abspath(path))
    if decoder == "decord" or path.suffix.lower() in IMAGE_SUFFIXES:
        return open_clip(path, decoder)
    _look(path)
    return PyAVReader(path, partial=True, progress=progress)


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


class ImageReader(ClipReader):
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
            turned = self._image.getexif().get(0x0112) in TURNED
        except PILLOW_ERRORS as error:
            raise DecodeError(path, f"not a readable image ({error})") from error
        width, height = self._image.size[::-1] if turned else self._image.size
        super().__init__(path, ClipInfo(frames, fps, height, width))

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


# ------------------------------------------------------------------------------------------ PyAV


def open_container(path: Path) -> tuple[Any, Any]:
    """libav's container of `path` and its video stream. DecodeError: it has none; FFmpegError."""
    # Titles are in any encoding.
    container = av.open(str(path), options={"protocol_whitelist": "file"}, metadata_errors="replace")
    video = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not video or video[0].codec_context is None:
        container.close()
        raise DecodeError(path, "its codec is unknown" if video else "holds no video")
    return container, video[0]


def decode_frames(container: Any, stream: Any, has_keys: bool) -> Iterator[av.VideoFrame]:
    """Frames from where `container` stands, from the first key frame on if the stream marks any. FFmpegError:
    damaged."""
    context: Any = stream.codec_context
    if stream.metadata.get("alpha_mode") == "1" and context.name in ALPHA_DECODERS:
        context = av.CodecContext.create(ALPHA_DECODERS[context.name], "r")
    if not context.is_open:
        context.thread_count = 1
        context.options = {"err_detect": "explode"}
    packets = container.demux(stream)
    if has_keys:  # after a cut, what comes before refers to frames that are gone
        packets = itertools.dropwhile(lambda packet: packet.size and not packet.is_keyframe, packets)
    for packet in packets:
        yield from context.decode(packet)


def has_alpha(format: Any) -> bool:
    """Whether a pixel format of libav (None: unknown) has transparency."""
    return format is not None and any(component.is_alpha for component in format.components)


class PyAVReader(ClipReader):
    """PyAV, on its own ffmpeg. Packets are listed once (not decoded): their times give every frame its index.

    Without reliable times, frames are counted by decoding them all.
    """

    _has_keys = True

    def __init__(self, path: Path, partial: bool = False, progress: Callable[[], None] | None = None) -> None:
        self.path = path
        # Whether a file that breaks off has the frames before that, or none; frames that it lacks.
        self.partial, self.missing = partial, 0
        try:
            self._open()
            count = self._list_packets(progress)
            self._open()
            frame = next(self._decoder)
            if self._index is not None:
                count = self._drop_undecodable(-1 if frame.pts is None else frame.pts)
            if self._index is None:
                count = _count_frames(path, self._has_keys, progress)
            first = self._upright(frame)
            rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(0)
        except StopIteration:
            raise DecodeError(path, "holds no frame that can be decoded") from None
        except (FFmpegError, ValueError) as error:
            raise error if isinstance(error, DecodeError) else DecodeError(path, f"PyAV: {error}") from error
        self._next, self._run_start = 1, 0
        self._last = (0, first)
        super().__init__(path, ClipInfo(count, float(rate), *first.shape[:2]))

    def _open(self) -> None:
        if hasattr(self, "_container"):
            self._container.close()
        self._container, self._stream = open_container(self.path)
        self._reformatter = VideoReformatter()
        self._decoder = decode_frames(self._container, self._stream, self._has_keys)

    def _list_packets(self, progress: Callable[[], None] | None) -> int:
        """Lists times and key frames; returns the number of frames. `_index` stays None without reliable times."""
        # Of each packet its time and kind alone: the data of a long video would fill the memory.
        codec = self._stream.codec_context.name
        packets = [
            (p.pts, p.is_keyframe, p.is_discard or _is_hidden(p, codec))
            for p in _reported(self._container.demux(self._stream), progress)
            if p.size
        ]
        names = set(self._container.format.name.split(","))
        stated = len(self._stream.index_entries) if "mp4" in names else 0
        self.missing = stated - len(packets)
        if self.missing > 0 and not self.partial:
            raise DecodeError(self.path, f"is truncated: {len(packets)} of {stated} frames are there")
        shown = [(pts, key) for pts, key, discard in packets if not discard]
        self._times = sorted({pts for pts, _ in shown if pts is not None})
        timed = bool(names & TIMED_CONTAINERS) and len(self._times) == len(shown)
        self._index = {time: i for i, time in enumerate(self._times)} if timed else None
        self._has_keys = any(key for _, key, _ in packets)
        self._key_times = [pts for pts, key in shown if key]
        self._keys = sorted({0, *(self._index[pts] for pts in self._key_times)}) if self._index else []
        return len(shown)

    def _drop_undecodable(self, first: int) -> int:
        """Drops the frames before the time `first` of the first one that can be decoded: a cut left them without those
        that they refer to. Returns the number of frames."""
        self._times = [time for time in self._times if time >= first]
        self._index = {time: i for i, time in enumerate(self._times)} if first in self._times[:1] else None
        self._keys = sorted({0, *(self._index[t] for t in self._key_times if t in self._index)}) if self._index else []
        return len(self._times)

    def _get(self, indices: Sequence[int]) -> np.ndarray:
        found: dict[int, np.ndarray] = {}
        try:
            for index in sorted(set(indices)):
                found[index] = self._frame(index)
            return np.stack([found[index] for index in indices])
        except (FFmpegError, ValueError) as error:
            raise error if isinstance(error, DecodeError) else DecodeError(self.path, f"PyAV: {error}") from error

    def _frame(self, index: int) -> np.ndarray:
        if self._last[0] == index:
            return self._last[1]
        key = self._keys[max(bisect.bisect_right(self._keys, index) - 1, 0)] if self._keys else 0
        if index < self._next or key > self._next:
            self._jump(key)
        try:
            found = self._reach(index)
        except (FFmpegError, DecodeError):
            if self._run_start == 0:
                raise
            found = None
        # After a seek: an open GOP lacks the frames before it, and some containers seek past what was asked for.
        if found is None and self._run_start > 0:
            self._jump(0)
            found = self._reach(index)
        if found is None:
            raise DecodeError(self.path, f"frame {index} of {self.frame_count} cannot be decoded")
        self._last = (index, self._upright(found))
        return self._last[1]

    def _jump(self, key: int) -> None:
        if key == 0 or self._index is None:
            self._open()
            key = 0
        else:
            self._container.seek(self._times[key], stream=self._stream)
            self._decoder = decode_frames(self._container, self._stream, self._has_keys)
        self._next = self._run_start = key

    def _reach(self, index: int) -> av.VideoFrame | None:
        """Decodes forward to frame `index`; None if it is behind, or never comes."""
        for frame in self._decoder:
            if frame.is_corrupt:
                raise DecodeError(self.path, f"frame {self._next} of {self.frame_count} is damaged")
            at = self._next if self._index is None else self._index.get(-1 if frame.pts is None else frame.pts)
            if at is None:  # a frame that is not to be shown
                continue
            self._next = at + 1
            if at >= index:
                return frame if at == index else None
        return None

    def stream(self, start: int = 0) -> Iterator[tuple[int, av.VideoFrame]]:
        """(index, frame as libav has it) of every frame from `start` on, one at a time. DecodeError: damaged."""
        self._jump(self._keys[max(bisect.bisect_right(self._keys, start) - 1, 0)] if self._keys else 0)
        self._last = (-1, self._last[1])
        try:
            for frame in self._decoder:
                if frame.is_corrupt:
                    raise DecodeError(self.path, f"frame {self._next} of {self.frame_count} is damaged")
                at = self._next if self._index is None else self._index.get(-1 if frame.pts is None else frame.pts)
                if at is None:
                    continue
                self._next = at + 1
                if at >= start:
                    yield at, frame
        except (FFmpegError, ValueError) as error:
            raise error if isinstance(error, DecodeError) else DecodeError(self.path, f"PyAV: {error}") from error

    def next_key(self, index: int) -> int | None:
        """The first key frame behind frame `index`."""
        at = bisect.bisect_right(self._keys, index)
        return self._keys[at] if at < len(self._keys) else None

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB (H, W, 3). One thread: swscale's thread pool costs 20 ms a frame however small the frame."""
        alpha = has_alpha(frame.format)
        rgb = self._reformatter.reformat(frame, format="rgba" if alpha else "rgb24", threads=1).to_ndarray()
        if alpha:
            opacity = rgb[..., 3:].astype(np.uint16)
            rgb = ((rgb[..., :3] * opacity + 255 * (255 - opacity) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))

    def close(self) -> None:
        self._container.close()


def _is_hidden(packet: Any, codec: str) -> bool:
    """Whether a packet is decoded but not shown: a VP8 frame that others alone refer to (RFC 6386, 9.1: show_frame).
    VP9 and AV1 have such frames in one packet with a shown one."""
    return codec in ("vp8", "libvpx") and not memoryview(packet)[0] & 0x10


def _state(path: Path) -> tuple[int, int]:
    """Size and modification time of a file: beside its path, the key of what was found out about it."""
    state = path.stat()
    return state.st_size, state.st_mtime_ns


# Counts of the last files, by path, key frames and state.
_counts: dict[tuple[Any, ...], int] = {}


def _count_frames(path: Path, has_keys: bool, progress: Callable[[], None] | None) -> int:
    """Number of frames, by decoding them all. Kept: a clip is probed and read."""
    key = (path, has_keys, *_state(path))
    if key not in _counts:
        container, stream = open_container(path)
        with container:
            count = sum(1 for _ in _reported(decode_frames(container, stream, has_keys), progress))
        while len(_counts) >= 16:
            del _counts[next(iter(_counts))]
        _counts[key] = count
    return _counts[key]


def _reported(items: Iterator[Any], progress: Callable[[], None] | None) -> Iterator[Any]:
    """`items`, with a call of `progress` for each."""
    for item in items:
        if progress is not None:
            progress()
        yield item


def closed_gops(path: Path) -> bool:
    """Whether decoding can begin at every key frame: no frame after one is shown before it, and in H.264 each is an
    IDR."""
    try:
        container, stream = open_container(path)
        with container:
            h264 = stream.codec_context.name == "h264"
            key = None
            for packet in container.demux(stream):
                if packet.pts is None or not packet.size:
                    continue
                if packet.is_keyframe:
                    key = packet.pts
                    if h264 and not _has_idr(bytes(packet)):
                        return False
                elif key is not None and packet.pts < key:
                    return False
            return key is not None
    except (FFmpegError, DecodeError):
        return False


def _has_idr(packet: bytes) -> bool:
    """Whether one picture, NAL units each after four bytes of length (ISO 14496-15), holds an IDR slice."""
    at = 0
    while at + 4 < len(packet):
        if packet[at + 4] & 0x1F == 5:
            return True
        at += 4 + int.from_bytes(packet[at : at + 4])
    return False


# ------------------------------------------------------------------------------------------ decord


class DecordReader(ClipReader):
    """decord 0.6, on its own ffmpeg 4.1: fast at random access; can hang on damaged files (dmlc/decord#373).

    Files of which it gives other frames than those asked for, without a word, are refused: containers without times
    (AVI), edit lists, transparency, and open GOPs (x265's default) where a frame behind the first GOP is wanted.
    """

    def __init__(self, path: Path) -> None:
        import decord

        self._errors = (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError, AssertionError, StopIteration)
        with path.open("rb") as file:
            head = file.read(8)
        if head[:4] != MATROSKA and head[4:8] not in MP4_BOXES:
            raise DecodeError(path, "decord: not MP4, MOV, MKV or WebM, the containers it is trusted with")
        if problem := _decord_problem(path, *_state(path)):
            raise DecodeError(path, f"decord: {problem}")
        try:
            # fault_tol: a frame that decord patched up is an error, not a frame.
            self._video: Any = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-6)  # pyright: ignore
            height, width = self._video.get_batch([0]).shape[1:3]
            super().__init__(path, ClipInfo(len(self._video), float(self._video.get_avg_fps()), height, width))
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
        self._video = None


@functools.lru_cache(maxsize=16)
def _decord_problem(path: Path, size: int, mtime_ns: int) -> str | None:
    """Why decord would show other frames than ffmpeg, as far as the beginning of the file tells. Kept: a clip is probed
    and read."""
    try:
        container, stream = open_container(path)
        with container:
            if has_alpha(stream.codec_context.format) or stream.metadata.get("alpha_mode") == "1":
                return "leaves transparency out"
            if stream.codec_context.name == "vp8":
                return "counts frames of VP8 that are not shown"
            if any(entry.is_discard for entry in stream.index_entries):
                return "shows frames that the edit list hides"
            times = [p.pts for p in itertools.islice(container.demux(stream), REORDERED) if p.pts is not None]
            return "counts frames that cannot be decoded" if times and min(times) < times[0] else None
    except FFmpegError as error:
        return str(error)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
