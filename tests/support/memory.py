"""Memory that a process takes, as the kernel counts it."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Self


def anonymous_memory() -> int:
    """Bytes of this process in memory, without what is mapped from files, which the kernel may drop."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """`nbytes`: what this process took at most within the context, looked at every millisecond, beyond what it had before."""

    nbytes = 0

    def __enter__(self) -> Self:
        gc.collect()
        self._before, self._over = anonymous_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.001):
            self.nbytes = max(self.nbytes, anonymous_memory() - self._before)
