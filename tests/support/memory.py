"""Memory that a process takes, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import Self

from stdit.training.deferred import M_MMAP_THRESHOLD


def anonymous_memory() -> int:
    """Bytes of this process in memory, without what is mapped from files, which the kernel may drop."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class PeakMemory:
    """`nbytes`: what this process took at most within the context, looked at every millisecond, beyond what it had
    before."""

    nbytes = 0
    interval_s = 0.001

    def __enter__(self) -> Self:
        gc.collect()
        self._before, self._lock, self._over = self._taken(), threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def start(self) -> None:
        """Forgets what there was since the context began."""
        with self._lock:
            self.nbytes = self._taken() - self._before

    def _taken(self) -> int:
        return anonymous_memory()

    def _watch(self) -> None:
        while not self._over.wait(self.interval_s):
            with self._lock:
                self.nbytes = max(self.nbytes, self._taken() - self._before)


MALLINFO2 = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in MALLINFO2]


class AllocatedMemory(PeakMemory):
    """As PeakMemory, of glibc's malloc, where torch's CPU tensors and gloo's buffers are: touched or not, without what
    malloc keeps free; looked at every half millisecond."""

    interval_s = 0.0005

    def __enter__(self) -> Self:
        self._libc = ctypes.CDLL(None)
        self._libc.mallinfo2.restype = _Mallinfo2
        # Tensors come and go one by one, and none depends on where another one was.
        self._libc.mallopt(M_MMAP_THRESHOLD, 2**16)
        return super().__enter__()

    def _taken(self) -> int:
        found = self._libc.mallinfo2()
        return found.uordblks + found.hblkhd
