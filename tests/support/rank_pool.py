"""Processes that stay: ranks which run one function after another, so that tests of several ranks pay for one
launch."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

from tests.support import forked

TIMEOUT_S = 240.0


def free_port() -> int:
    """A TCP port that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    import torch

    torch.set_num_threads(1)
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(*args)))
        except Exception as error:
            pipe.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    # No handlers of libraries at exit: they may wait for the other rank.
    os._exit(0)


class RankError(Exception):
    """What a rank raised: .kind is the exception's name."""

    def __init__(self, kind: str, message: str, trace: str) -> None:
        super().__init__(f"{kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


class Pool:
    """`size` ranks over gloo. `pool(function, *args)` runs a module-level function on all; its results by rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Any] = []

    def _start(self) -> None:
        context, port = forked.context(), free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, args))
        results, errors = [], []
        for pipe in self._pipes:
            try:
                if not pipe.poll(TIMEOUT_S):
                    raise TimeoutError(f"{function.__name__}: no answer in {TIMEOUT_S} s")
                fine, result = pipe.recv()
            except (TimeoutError, EOFError) as error:
                self.close()
                raise RuntimeError(f"{function.__name__}: a rank hangs or died") from error
            results.append(result)
            if not fine:
                errors.append(result)
        if errors:
            raise RankError(*errors[0])
        return results

    def close(self) -> None:
        """Ends its own processes, by their ids."""
        for process in self._processes:
            process.kill()
            process.join(10)
        self._processes, self._pipes = [], []
