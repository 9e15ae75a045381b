"""The reader of videos through PyAV, on its own ffmpeg, and a look at what can be decoded from where."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import VideoReformatter

from stdit.data.reader import DecodeError, Facts, Reader


class PyAVReader(Reader):
    """PyAV, on its own ffmpeg. Packets are listed once (not decoded): their times give every frame its index."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open()
            count = self._list_packets()
            self._open()
            frame = next(self._decoder)
            first = self._upright(frame)
            rate = self._stream.average_rate or self._stream.guessed_rate or Fraction(0)
        except StopIteration:
            raise DecodeError(path, "holds no frame that can be decoded") from None
        except (FFmpegError, ValueError) as error:
            raise error if isinstance(error, DecodeError) else DecodeError(path, f"PyAV: {error}") from error
        at = self._index.get(-1 if frame.pts is None else frame.pts, 0) if self._index else 0
        self._next, self._run_start = at + 1, 0
        self._last = (at, first)
        super().__init__(path, Facts(count, float(rate), *first.shape[:2]))

    def _open(self) -> None:
        if hasattr(self, "_container"):
            self._container.close()
        self._container = av.open(str(self.path), options={"protocol_whitelist": "file"})
        video = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not video:
            raise DecodeError(self.path, "holds no video")
        self._stream = video[0]
        if self._stream.codec_context is None:
            raise DecodeError(self.path, "its codec is unknown")
        self._stream.codec_context.thread_count = 1
        self._stream.codec_context.options = {"err_detect": "explode"}
        self._reformatter = VideoReformatter()
        self._decoder = self._container.decode(self._stream)

    def _list_packets(self) -> int:
        """Lists times and key frames; returns the number of frames."""
        # Of each packet its time and kind alone: the data of a long video would fill the memory.
        packets = [(p.pts, p.is_keyframe, p.is_discard) for p in self._container.demux(self._stream) if p.size]
        if "mp4" in self._container.format.name and len(packets) < self._stream.frames:
            raise DecodeError(self.path, f"is truncated: {len(packets)} of {self._stream.frames} frames are there")
        shown = [(pts, key) for pts, key, discard in packets if not discard]
        self._times = sorted({pts for pts, _ in shown if pts is not None})
        # Without a distinct time for each packet (raw streams), frames are counted from the beginning.
        distinct = len(self._times) == len(shown)
        self._index = {time: i for i, time in enumerate(self._times)} if distinct else None
        self._keys = sorted(self._index[pts] for pts, key in shown if key and pts is not None) if self._index else []
        return len(shown)

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
            self._decoder = self._container.decode(self._stream)
        self._next = self._run_start = key

    def _reach(self, index: int) -> av.VideoFrame | None:
        """Decodes forward to frame `index`; None if it is behind, or never comes."""
        for frame in self._decoder:
            if frame.is_corrupt:
                raise DecodeError(self.path, f"frame {self._next} of {self.frame_count} is damaged")
            at = self._next if self._index is None else self._index.get(-1 if frame.pts is None else frame.pts)
            if at is None:  # a frame that the container says is not to be shown
                continue
            self._next = at + 1
            if at >= index:
                return frame if at == index else None
        return None

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        """RGB (H, W, 3). One thread: swscale's thread pool costs 20 ms a frame however small the frame."""
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90) % 4))

    def close(self) -> None:
        self._container.close()


def closed_gops(path: Path) -> bool:
    """Whether decoding can begin at every key frame: no frame after one is shown before it, and in H.264 each is an IDR."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
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
    except (FFmpegError, IndexError):
        return False


def _has_idr(packet: bytes) -> bool:
    """Whether one picture, NAL units each after four bytes of length (ISO 14496-15), holds an IDR slice."""
    at = 0
    while at + 4 < len(packet):
        if packet[at + 4] & 0x1F == 5:
            return True
        at += 4 + int.from_bytes(packet[at : at + 4])
    return False
