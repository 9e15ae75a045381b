"""Decoding ahead of one consumer, such as an encoder on a GPU: a pool of threads, each with a decoding process of its
own.

    with DecoderPool("auto", timeout_s=60, workers=4) as pool:
        for frames in pool.map(lambda decoder, path: decoder.read(path, [0]), paths):
            …

A process that crashes or hangs costs the clip that it was decoding (DecodeError), as with one SubprocessDecoder, and no
other.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

from stdit.cores import available_cores
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.files import Closable

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")
# `auto` starts no more processes than this, and none for fewer clips than this: a start takes as long as some small
# clips.
MOST_WORKERS = 16
CLIPS_PER_WORKER = 16
# Tasks under way or waiting to be taken, for each process (a DataLoader's prefetch_factor).
PREFETCH_FACTOR = 2


def decoder_workers(wanted: int | Literal["auto"], clips: int | None = None, encoders: int = 1) -> int:
    """Decoding processes of one encoder. auto: one per core, shared by the `encoders` of this machine, as far as there
    are `clips`."""
    if wanted != "auto":
        return wanted
    cores = available_cores() // encoders
    needed = MOST_WORKERS if clips is None else clips // CLIPS_PER_WORKER
    return max(1, min(cores, needed, MOST_WORKERS))


class DecoderPool(Closable):
    """`workers` SubprocessDecoders, started when they are needed. A context manager."""

    def __init__(self, decoder: str, timeout_s: float, workers: int) -> None:
        self.workers = workers
        self._settings = (decoder, timeout_s)
        self._own = threading.local()
        self._decoders: list[SubprocessDecoder] = []
        self._threads = ThreadPoolExecutor(workers, "decode", self._start)

    def map(
        self, function: Callable[[SubprocessDecoder, _Task], _Result], tasks: Iterable[_Task], ahead: int = 0
    ) -> Iterator[_Result]:
        """function(decoder, task) of each task, in the order of the tasks. The next PREFETCH_FACTOR * workers tasks, or
        `ahead` if that is more, are begun before a result is taken, and no further ones. An error is raised where its
        result would be."""
        ahead = max(ahead, PREFETCH_FACTOR * self.workers)
        begun: deque[Future[_Result]] = deque()
        try:
            for task in tasks:
                begun.append(self._threads.submit(self._call, function, task))
                if len(begun) > ahead:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()

    def close(self) -> None:
        """Stops what is under way, and ends the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.abort()
        self._threads.shutdown()
        for decoder in self._decoders:
            decoder.close()

    def _start(self) -> None:
        self._own.decoder = SubprocessDecoder(*self._settings)
        self._decoders.append(self._own.decoder)

    def _call(self, function: Callable[[SubprocessDecoder, _Task], _Result], task: _Task) -> _Result:
        return function(self._own.decoder, task)
