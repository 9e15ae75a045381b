"""Analysis in a child process that can be killed: a damaged file can hang or crash a decoder, and must take nothing
with it.

    with AnalysisProcess(stall_timeout_s=60) as process:
        content = process.analyse(path)      # of Analysis.loads

The child runs this file. A request is a line of JSON on its standard input. It answers with lines of JSON, {"frame": n}
now and then and {"error": …} or {"bytes": n} at last, the latter followed by the content.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from stdit.data.decoding import DecodeError
from stdit.data.subprocess_decoder import start_child
from stdit.files import Closable

# How often the child says how far it is.
REPORT_S = 0.5


class Closed(Exception):
    """The process was closed while it was at work."""


class AnalysisProcess(Closable):
    """One child, started when needed and after it hung or died. Not for several threads at once."""

    def __init__(self, stall_timeout_s: float = 60.0) -> None:
        self.stall_timeout_s = stall_timeout_s
        # Whether the file analysed last stood still: another time, on an idle machine, it may not.
        self.stalled = False
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[dict[str, Any] | bytes | None] = queue.Queue()

    def analyse(self, path: Path | str) -> bytes:
        """The analysis of a file, as bytes. A decoder that hangs or crashes leaves the frames before that. DecodeError:
        none."""
        until, trouble = None, None
        self.stalled = False
        while True:
            frame, result = self._attempt(path, until)
            if isinstance(result, bytes):
                return _with_trouble(result, trouble) if trouble else result
            # What the child reported last is at most REPORT_S old.
            if frame is None or frame < 1 or (until is not None and frame >= until):
                raise DecodeError(path, trouble or result)
            trouble, until = trouble or f"broke behind frame {frame}: {result}", frame

    def _attempt(self, path: Path | str, until: int | None) -> tuple[int | None, bytes | str]:
        """The last frame reported, and the content or what happened to the child. DecodeError: the child's own."""
        child = self._living_child()
        assert child.stdin is not None
        frame = None
        try:
            child.stdin.write(json.dumps({"path": os.path.abspath(path), "until": until}).encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass
        while True:
            try:
                answer = self._answers.get(timeout=self.stall_timeout_s)
            except queue.Empty:
                self._end_child()
                self.stalled = True
                return frame, f"decoding stood still for {self.stall_timeout_s:g} s and was stopped"
            except BaseException:
                self._end_child()
                raise
            if answer is None:
                code = child.wait()
                self._end_child()
                return frame, f"the decoder died ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"
            if isinstance(answer, bytes):
                return frame, answer
            if "error" in answer:
                raise DecodeError(path, answer["error"])
            frame = answer["frame"]

    def _living_child(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise Closed
        if self._child is None or self._child.poll() is not None:
            self._end_child()
            self._child = start_child("stdit.curation.analysis_process")
            self._answers = queue.Queue()
            threading.Thread(target=_read, args=(self._child.stdout, self._answers), daemon=True).start()
            if self._closed:  # meanwhile, by another thread
                self._end_child()
                raise Closed
        return self._child

    def close(self) -> None:
        """Ends the child, of a call in another thread too: that raises Closed, and does not try again."""
        self._closed = True
        self._end_child()

    def _end_child(self) -> None:
        """The next attempt starts another."""
        if self._child is not None:
            child, self._child = self._child, None
            child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _read(pipe: Any, answers: queue.Queue[dict[str, Any] | bytes | None]) -> None:
    """Puts the child's answers into the queue; None at its end."""
    try:
        while line := pipe.readline():
            answer = json.loads(line)
            if "bytes" in answer:
                content = pipe.read(answer["bytes"])
                answers.put(content if len(content) == answer["bytes"] else None)
            else:
                answers.put(answer)
    except ValueError:  # closed, or half a line of a child that died
        pass
    answers.put(None)


def _with_trouble(content: bytes, trouble: str) -> bytes:
    from stdit.curation.analysis import Analysis

    analysis = Analysis.loads(content)
    analysis.broken.append(trouble)
    return analysis.dumps()


def main() -> None:
    """Serves requests until standard input ends."""
    from stdit.curation.analysis import analyse

    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to standard output

    def send(message: dict[str, Any], content: bytes = b"") -> None:
        out.write(json.dumps(message).encode() + b"\n" + content)
        out.flush()

    for line in sys.stdin.buffer:
        request = json.loads(line)
        reported = 0.0

        def progress(frame: int) -> None:
            nonlocal reported
            if time.monotonic() - reported > REPORT_S:
                reported = time.monotonic()
                send({"frame": frame})

        try:
            content = analyse(request["path"], progress, request["until"]).dumps()
        except DecodeError as error:
            send({"error": error.reason})
        except Exception as error:  # the border of the process: whatever a library raises is the file's fault
            send({"error": f"{type(error).__name__}: {error}"})
        else:
            send({"bytes": len(content)}, content)


if __name__ == "__main__":
    main()
