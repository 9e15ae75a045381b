"""Progress of a plan: lines with the seconds since its start, and a line that follows the steps of a stage."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import TextIO

from stdit import metrics_log
from stdit.config import Config
from stdit.console import printable


class Clock:
    """Prints lines with the seconds since its creation."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout
        self._start = time.monotonic()

    def say(self, line: str) -> None:
        self.write(f"[{time.monotonic() - self._start:7.1f} s] {printable(line)}\n")

    def write(self, text: str) -> None:
        """Writes text as it is; to a terminal or pipe that is gone, nothing."""
        with suppress(OSError):
            print(text, end="", file=self.out, flush=True)


class StepLine:
    """Follows a run's metrics.jsonl, which rank 0 writes: on a terminal one line in place, elsewhere one every 10 s."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self.terminal = clock.out.isatty()
        self._every_s = 1.0 if self.terminal else 10.0
        # Steps logged before a resume do not count for the speed.
        self._path = config.run_dir / metrics_log.FILE
        before = metrics_log.read_last(self._path)
        self._printed, self._step, self._first = time.monotonic(), int(before["step"]) if before else 0, (0.0, -1)
        self._shown = False

    def tick(self) -> None:
        """Prints if the interval has passed and there is a new step; called often."""
        now = time.monotonic()
        if now - self._printed < self._every_s:
            return
        entry = metrics_log.read_last(self._path)
        if entry is None or entry["step"] == self._step:
            return
        self._printed, self._step = now, int(entry["step"])
        if self._first[1] < 0 or self._step < self._first[1]:
            self._first = (now, self._step)
        line = self._line(now, entry["loss"])
        if self.terminal:
            self._shown = True
            self.clock.write(f"\r\x1b[K{printable(line)}")
        else:
            self.clock.say(line)

    def _line(self, now: float, loss: float | None) -> str:
        steps = self.config.train.steps
        line = (
            f"{self.config.name}: step {self._step}/{steps}, loss {'not a number' if loss is None else f'{loss:.4f}'}"
        )
        since, first = self._first
        if now > since and self._step > first:
            rate = (self._step - first) / (now - since)
            line += f", {rate:.2f} steps/s, {(steps - self._step) / rate:.0f} s to go"
        return line

    def close(self) -> None:
        """Ends a line that was written in place."""
        if self._shown:
            self.clock.write("\n")
