"""Watches a rank, from its start to its last step: what takes too long is named, with its stack, and ends the process
with code 75.

A rank that hangs (in a collective that another one never joins, on a disk, in a decoder) would else be silent until the
process group's time-out, and a request to stop would have no effect on it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from stdit.config import TrainConfig
from stdit.console import echo
from stdit.training.checkpoint import unfinished_files
from stdit.training.run_dir import report_file, reports
from stdit.training.stopping import STOPPED, Stop

POLL_S = 0.5
# Once a stop is requested, the step may take this long, or this many times the longest step so far.
STOP_GRACE_S, STOP_GRACE_STEPS = 10.0, 5.0
# Validation is rare, so that no step may have had one yet.
VALIDATION_GRACE_S = 300.0
# A rank that cannot write its own report ends after this.
REPORT_S = 10.0
# For the other ranks' reports, which are due at about the same time.
OTHERS_S = 3.0
# Phases, by the outermost function that train() is in: before the first step, and of a step.
PHASES = {
    "_find_and_load": "importing",
    "complete": "reading the data's settings",
    "open_data": "reading the data's settings",
    "is_finished": "verifying the run's last checkpoint",
    "check_machine": "checking this machine",
    "init_distributed": "waiting for the other ranks to start",
    "sequence_group": "waiting for the other ranks to start",
    "lock": "locking the run directory",
    "fetch": "fetching a checkpoint from train.upload_to",
    "check_ranks": "comparing the ranks",
    "find_resume_state": "verifying checkpoints",
    "find_init": "looking for the weights of init.source",
    "build_model": "building the model",
    "Engine.__init__": "starting DeepSpeed",
    "load_checkpoint": "loading a checkpoint",
    "clean_up": "removing unfinished checkpoints",
    "Tracker.__init__": "opening metrics",
    "RunMirror.begin": "uploading the config to train.upload_to",
    "Validator.__init__": "reading validation data",
    "Loader.__init__": "reading data",
    "Ranks.broadcast": "waiting for rank 0",
    "Ranks.gather": "waiting for the other ranks",
    "Loader.__iter__": "reading data",
    "Inputs.loss": "forward",
    "Engine.backward": "backward",
    "Engine.step": "optimizer step",
    "Ranks.all_reduce": "exchange of metrics",
    "find_bad_samples": "exchange of metrics",
    "LossSpikes.veto": "exchange of metrics",
    "keep_bad_batches": "writing metrics",
    "Validator.run": "validation",
    "Tracker.step": "writing metrics",
    "Saver.save": "saving a checkpoint",
    "Saver.finish": "waiting for a checkpoint to be written",
    "Saver.close": "waiting for a checkpoint to be written, after an error",
}


class Watchdog:
    """A thread that ends the process when the thread that created it takes more than `train.start_timeout_s` until its
    first step, or more than `train.step_timeout_s` for a step.

    A save may take longer, as long as its files change. A step that was asked to stop has what STOP_GRACE says; before
    the first one a request ends the process by itself.
    """

    def __init__(self, rank: int, run_dir: Path, train: TrainConfig, stop: Stop) -> None:
        self.rank, self.run_dir, self.stop = rank, run_dir, stop
        self.start_s, self.limit_s = train.start_timeout_s, train.step_timeout_s
        self._thread = threading.get_ident()
        self._step, self._since, self._longest, self._saving = 0, time.monotonic(), 0.0, False
        self._closed = threading.Event()
        for watch in (self._watch, self._watch_files):
            threading.Thread(target=watch, daemon=True, name="watchdog").start()

    @property
    def trains(self) -> bool:
        """Whether a step has begun."""
        return self._step > 0

    def start_step(self, step: int) -> None:
        """Called as each step begins."""
        now = time.monotonic()
        if self._step:
            self._longest = max(self._longest, now - self._since)
        self._step, self._since = step, now

    @contextmanager
    def saving(self) -> Iterator[None]:
        """While a checkpoint is saved; the time that it takes is no part of the step."""
        step, began = self._since, time.monotonic()
        self._since, self._saving = began, True
        try:
            yield
        finally:
            self._saving = False
            self._since = step + time.monotonic() - began

    def where(self, error: Exception) -> str:
        """Step and phase in which train() raised `error`."""
        phase = _phase(frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__))
        return f"{self._when()}, {phase}"

    def close(self) -> None:
        """Ends watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            if (reason := self._overdue(time.monotonic())) and not self._closed.is_set():
                self._end(reason)

    def _watch_files(self) -> None:
        """In a thread of its own, which a dead disk may hold for ever."""
        files: set[tuple[str, int]] = set()
        while not self._closed.wait(POLL_S):
            if self._saving and (now := unfinished_files(self.run_dir)) != files:
                files, self._since = now, time.monotonic()

    def _overdue(self, now: float) -> str | None:
        """Why the process has to end; None as long as it need not."""
        limit, key = (self.limit_s, "train.step_timeout_s") if self._step else (self.start_s, "train.start_timeout_s")
        if now - self._since > limit:
            return f"more than {limit:g} s ({key})"
        if self._step and not self._saving and self.stop.since is not None:
            grace = max(STOP_GRACE_S, STOP_GRACE_STEPS * self._longest)
            if self._phase() == PHASES["Validator.run"]:
                grace = max(grace, VALIDATION_GRACE_S)
            if now - max(self._since, self.stop.since) > grace:
                return f"more than {grace:.0f} s since the stop was requested ({self.stop.reason})"
        return None

    def _phase(self) -> str:
        return phase_of(sys._current_frames().get(self._thread))

    def _when(self) -> str:
        return f"step {self._step}" if self._step else "before the first step"

    def _end(self, reason: str) -> None:
        threading.Thread(target=lambda: (time.sleep(REPORT_S), os._exit(STOPPED)), daemon=True).start()
        text = (
            f"[rank {self.rank}] {self._when()}, {self._phase()}: {reason}. This rank waits for others or for a disk; "
            f"it ends with code {STOPPED}, and the same command goes on from the newest checkpoint. Its stack:"
        )
        with contextlib.suppress(OSError, ValueError, AttributeError):
            echo(text, file=sys.__stderr__, flush=True)
            assert sys.__stderr__ is not None
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        # Under Ray, stderr is far away.
        with contextlib.suppress(OSError):
            if path := report_file(self.run_dir, "stalled", self.rank):
                with path.open("w") as file:
                    file.write(text + "\n")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
                    file.flush()
                    if others := self._others(path, time.monotonic() - self._since):
                        file.write(others + "\n")
                        echo(others, file=sys.__stderr__, flush=True)
        os._exit(STOPPED)

    def _others(self, own: Path, waited_s: float) -> str | None:
        """Which ranks have written no report as this one has, in `own`: their host may be gone. None: this is the only
        rank."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return None
        until, earliest = (
            time.monotonic() + OTHERS_S,
            own.stat().st_mtime - waited_s,
        )  # files of other launches are older
        while (
            silent := sorted({*range(size)} - reports(own.parent, "stalled", earliest))
        ) and time.monotonic() < until:
            time.sleep(POLL_S / 5)
        if silent:
            names = ", ".join(map(str, silent[:8])) + (", …" if len(silent) > 8 else "")
            return f"[rank {self.rank}] no report of rank {names}: the process, its host or the link to it may be gone"
        return f"[rank {self.rank}] every rank reports that it waits: the network between their hosts, or a disk, may be gone"


def phase_of(frame: FrameType | None) -> str:
    """What a thread in train() is doing."""
    names: list[str] = []
    while frame is not None:
        names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return _phase(reversed(names))


def _phase(functions: Iterable[str]) -> str:
    """By the outermost function that has a name in PHASES; `functions`: from the outermost on."""
    return next((PHASES[name] for name in functions if name in PHASES), "between phases")
