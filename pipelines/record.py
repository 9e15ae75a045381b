"""What a plan has done, kept in RUN_DIR/plan.json: what each part was made of, and how long it took.

Files decide what is finished (a run's done.json, an extraction's index.json); the record decides whether that is still
what the plan asks for.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.changes import Piece
from stdit.config import ConfigError
from stdit.files import atomic_write

FILE, FORMAT = "plan.json", 1


@dataclass
class Record:
    """`parts`: what each was made of when it was begun. `seconds`: spent on each phase, over all calls."""

    path: Path
    parts: dict[str, Piece] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: Path) -> Record:
        """The record in `run_dir`; an empty one where there is none. ConfigError: of another format, or damaged."""
        path = run_dir / FILE
        if not path.is_file():
            return cls(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{path}: damaged ({error}); it is written whole or not at all, so look at the disk"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ConfigError(f"{path}: not a record of format {FORMAT}; {path.parent} holds something else")
        return cls(path, data["parts"], data["seconds"])

    def write(self) -> None:
        """Writes the record, whole or not at all."""
        data = {"format": FORMAT, "parts": self.parts, "seconds": {k: round(v, 2) for k, v in self.seconds.items()}}
        atomic_write(self.path, json.dumps(data, indent=1) + "\n")

    def begin(self, part: str, piece: Piece) -> None:
        """Notes what `part` is about to be made of."""
        if self.parts.get(part) != piece:
            self.parts[part] = piece
            self.write()

    def spend(self, phase: str, seconds: float) -> None:
        """Adds to the time that a phase has taken."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.write()

    def forget(self, part: str) -> None:
        """Drops a part and the time spent on it: what it made is set aside."""
        self.parts.pop(part, None)
        name = part.removeprefix("stages.")
        self.seconds = {k: v for k, v in self.seconds.items() if k != name and not k.startswith(f"{name}/")}
        self.write()

    @property
    def whole(self) -> float:
        """Seconds of everything that the results in the folder took."""
        return sum(self.seconds.values())


def set_aside(path: Path, run_dir: Path) -> Path | None:
    """Moves `path` to RUN_DIR/replaced/NAME-1 (or -2, …); None if there is nothing to move. Nothing is ever deleted."""
    if not path.exists():
        return None
    folder = run_dir / "replaced"
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while (target := folder / f"{path.name}-{number}").exists():
        number += 1
    os.replace(path, target)
    return target


@contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Holds RUN_DIR for this process. ConfigError: another one is at work there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise ConfigError(f"{run_dir}: another train_stages is at work there ({lock.read().strip()})") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}")
        lock.flush()
        yield
