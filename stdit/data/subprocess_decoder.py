"""Decoding in a child process that can be killed, with a time limit for each clip; while a long video is opened, for
each step of that.

decord can deadlock while it holds the interpreter's lock, and a damaged file can crash either
library; neither may take the parent with it. One child serves many clips; it is replaced when it
hangs or dies, and the clip is not tried again: its frames do not depend on what else the machine does. The file of the
last request stays open for the next one.

    with SubprocessDecoder(timeout_s=60) as decoder:
        frames = decoder.read(path, [0, 1, 2, 3], size=(64, 64))

The child runs this file (`python -m stdit.data.subprocess_decoder`). A request, on its standard input, and an answer
are JSON after four bytes of length; an answer with a "shape" is followed by the frames' bytes, and one that says
"opening" by another answer.
"""

from __future__ import annotations

import json
import math
import os
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stdit.data.decoding import ClipInfo, ClipReader, DecodeError, DecodeTimeout, check_info
from stdit.files import Closable

# decord leaks a little with each clip: a fresh child now and then keeps memory flat.
CLIPS_PER_CHILD = 5000
# Frames held at source size in the child, at most this many bytes, when it resizes them.
CHUNK_BYTES = 128 << 20
LENGTH = struct.Struct(">I")
# How often an idle child looks whether its parent is still there.
IDLE_S = 10.0
# How often a child that opens a video says so.
REPORT_S = 1.0


def start_child(module: str, *arguments: str, bufsize: int = -1) -> subprocess.Popen[bytes]:
    """`python -m MODULE`, spoken to by its standard input and output."""
    root = str(Path(__file__).resolve().parents[2])
    # -P: a file in the working folder cannot shadow a library. One thread: parallelism comes from many children.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        bufsize=bufsize,
        start_new_session=True,  # Ctrl-C is the parent's business
    )


class SubprocessDecoder(Closable):
    """A decoder in a process of its own. Not for several threads at once: one per worker."""

    def __init__(self, decoder: str = "auto", timeout_s: float = 60.0) -> None:
        self.decoder = decoder
        self.timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._served = 0
        self._owner = os.getpid()
        self._aborted = False

    def probe(self, path: Path | str) -> ClipInfo:
        """Frame count, fps, height and width of a clip. DecodeError; DecodeTimeout."""
        answer, _ = self._ask(path, None, None)
        return ClipInfo(**answer["info"])

    def read(
        self,
        path: Path | str,
        indices: Sequence[int],
        size: tuple[int, int] | None = None,
        stated: ClipInfo | None = None,
    ) -> np.ndarray:
        """Frames `indices` as uint8 (T, H, W, 3); with `size` (height, width) resized and cropped to it, never
        upsampled.

        Raises DecodeError: cannot be decoded, too small for `size`, frames out of range; DecodeTimeout; InfoMismatch:
        the clip has another length or size than `stated`.
        """
        answer, payload = self._ask(path, [int(i) for i in indices], size, stated)
        if stated is not None:
            check_info(path, stated, ClipInfo(**answer["info"]))
        return np.frombuffer(payload, np.uint8).reshape(answer["shape"])

    def read_part(
        self,
        path: Path | str,
        indices: Sequence[int],
        size: tuple[int, int] | None,
        crop: tuple[int, int, int, int] | None = None,
        check: Callable[[ClipInfo], None] | None = None,
    ) -> np.ndarray:
        """As `read`, of a file of which only a part is used: `crop` (top, left, height, width) is cut out first, and a
        file that breaks off behind the frames asked for serves. check: is called with what the file has, as far as it
        goes."""
        answer, payload = self._ask(path, [int(i) for i in indices], size, part={"part": True, "crop": crop})
        if check is not None:
            check(ClipInfo(**answer["info"]))
        return np.frombuffer(payload, np.uint8).reshape(answer["shape"])

    def abort(self) -> None:
        """From another thread: the call that is under way fails soon, and so does every later one. `close` is still to
        be called."""
        self._aborted = True
        if (child := self._child) is not None and self._owner == os.getpid():
            child.kill()

    def close(self) -> None:
        """Ends the child. The next call starts another."""
        if self._child is None:
            return
        child, self._child = self._child, None
        for pipe in (child.stdin, child.stdout):
            if pipe:
                pipe.close()
        if self._owner == os.getpid():
            child.kill()
            child.wait()

    def __del__(self) -> None:
        self.close()

    def _ask(
        self,
        path: Path | str,
        indices: list[int] | None,
        size: tuple[int, int] | None,
        stated: ClipInfo | None = None,
        part: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], bytearray]:
        request: dict[str, Any] = {"path": os.path.abspath(path), "indices": indices, "size": size, **(part or {})}
        request["decoder"] = self.decoder
        request["stated"] = stated and [stated.frame_count, stated.height, stated.width]
        return self._exchange(request)

    def _exchange(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        """One request and its answer. On DecodeTimeout and on a crash the child is gone; on other errors it lives."""
        path = request["path"]
        child = self._living_child()
        if self._aborted:  # asked after it was started: `abort` may not have seen it
            self.close()
            raise DecodeError(path, "decoding was stopped")
        self._served += 1
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            _send(child.stdin.fileno(), request)
            deadline = time.monotonic() + self.timeout_s
            while (answer := _receive_message(child.stdout.fileno(), deadline)).get("opening"):
                deadline = time.monotonic() + self.timeout_s
            payload = _receive(child.stdout.fileno(), math.prod(answer.get("shape", [0])), deadline)
        except TimeoutError:
            self.close()
            raise DecodeTimeout(path, f"decoding took more than {self.timeout_s:g} s and was stopped") from None
        except (EOFError, BrokenPipeError):
            code = child.wait()
            self.close()
            died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise DecodeError(path, f"the decoding process died ({died})") from None
        except BaseException:  # interrupted half-way: what is left in the pipe belongs to this clip
            self.close()
            raise
        if "error" in answer:
            raise DecodeError(path, answer["error"])
        return answer, payload

    def _living_child(self) -> subprocess.Popen[bytes]:
        """The child, started anew if it is worn out, dead, or a forked parent's."""
        worn = self._served >= CLIPS_PER_CHILD or self._owner != os.getpid()
        if self._child is not None and (worn or self._child.poll() is not None):
            self.close()
        if self._child is None:
            limit_s = math.ceil(self.timeout_s) + 5
            self._child = start_child("stdit.data.subprocess_decoder", str(limit_s), bufsize=0)
            self._served, self._owner = 0, os.getpid()
        return self._child


def _receive(pipe: int, count: int, deadline: float) -> bytearray:
    """Exactly `count` bytes from a file descriptor. TimeoutError; EOFError: the other end is gone."""
    received = bytearray(count)
    view = memoryview(received)
    while view:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([pipe], [], [], left)[0]:
            raise TimeoutError
        read = os.readv(pipe, [view[: 1 << 20]])
        if not read:
            raise EOFError
        view = view[read:]
    return received


def _receive_message(pipe: int, deadline: float) -> dict[str, Any]:
    (length,) = LENGTH.unpack(_receive(pipe, LENGTH.size, deadline))
    return json.loads(_receive(pipe, length, deadline))


def _send(pipe: int, message: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    text = json.dumps(message).encode()
    for part in (LENGTH.pack(len(text)) + text, payload):
        view = memoryview(part)
        while view:
            view = view[os.write(pipe, view) :]


# --------------------------------------------------------------------------------- inside the child


def _answer(
    request: dict[str, Any], progress: Callable[[], None] | None = None
) -> tuple[dict[str, Any], np.ndarray | None]:
    """progress: called often while a video is opened."""
    reader = _kept_open(request["path"], request["decoder"], bool(request.get("part")), progress)
    try:
        return _read(reader, request)
    except BaseException:
        _close_kept()
        raise


def _read(reader: ClipReader, request: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """The frames that a request asks for, cropped and resized."""
    from stdit.data.transforms import resize_crop

    indices, size, crop = request["indices"], request["size"], request.get("crop")
    info = {"info": dict(vars(reader.info))}
    found = [reader.frame_count, reader.height, reader.width]
    if indices is None or (request.get("stated") or found) != found:
        return info, None
    top, left, height, width = crop or (0, 0, reader.height, reader.width)
    if top + height > reader.height or left + width > reader.width:
        raise DecodeError(reader.path, f"crop {crop} is not within {reader.height}x{reader.width}")
    step = max(1, CHUNK_BYTES // (reader.height * reader.width * 3))
    chunks = [indices[i : i + step] for i in range(0, len(indices), step)] if size else [indices]
    parts = [reader.get(chunk)[:, top : top + height, left : left + width] for chunk in chunks]
    frames = np.concatenate([resize_crop(part, *size) if size else part for part in parts])
    return {**info, "shape": frames.shape}, np.ascontiguousarray(frames)


# The file of the last request: it is probed and then read, a film has hundreds of clips, and listing its packets takes
# seconds.
_open: dict[tuple[Any, ...], ClipReader] = {}


def _kept_open(path: str, decoder: str, part: bool, progress: Callable[[], None] | None) -> ClipReader:
    from stdit.data.decoding import open_clip, open_part

    try:
        state = os.stat(path)
    except OSError as error:
        raise DecodeError(
            path, "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        ) from None
    key = (path, decoder, part, state.st_size, state.st_mtime_ns)
    if key not in _open:
        _close_kept()
        _open[key] = (open_part if part else open_clip)(path, decoder, progress)
    return _open[key]


def _close_kept() -> None:
    for reader in _open.values():
        reader.close()
    _open.clear()


def main() -> None:
    """Serves requests until standard input ends."""
    limit_s = int(sys.argv[1])
    parent = os.getppid()
    # Libraries print to standard output; answers go out by a descriptor that they don't know.
    out = os.dup(1)
    os.dup2(2, 1)
    reported = 0.0

    def progress() -> None:
        nonlocal reported
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            signal.alarm(limit_s)
            _send(out, {"opening": True})

    while os.getppid() == parent:
        if not select.select([0], [], [], IDLE_S)[0]:
            continue
        try:
            request = _receive_message(0, time.monotonic() + IDLE_S)
        except (EOFError, TimeoutError):
            return
        # The kernel ends this process if it hangs and the parent, gone itself, can't.
        signal.alarm(limit_s)
        reported = time.monotonic()
        payload: bytes | memoryview = b""
        try:
            answer, frames = _answer(request, progress)
            payload = b"" if frames is None else frames.data.cast("B")
        except DecodeError as error:
            answer = {"error": error.reason}
        except Exception as error:  # the border of the process: whatever a library raises is the clip's fault
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            _send(out, answer, payload)
        except BrokenPipeError:
            return
        signal.alarm(0)


if __name__ == "__main__":
    main()
