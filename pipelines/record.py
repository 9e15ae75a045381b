"""The record of a plan, RUN_DIR/plan.json: settings of each part that was run, and seconds of each phase.

Files decide what is finished (done.json of a run, index.json of an extraction); the record decides whether it still
matches the plan.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.changes import Settings
from stdit.config import ConfigError, SealedSchema, read_json
from stdit.files import FolderLock, atomic_write, check_writable, seal

FILE, FORMAT = "plan.json", 1


class RecordFile(SealedSchema):
    """plan.json."""

    format: Literal[1]
    parts: dict[str, dict[str, Any]]
    seconds: dict[str, Annotated[float, Field(ge=0)]]


@dataclass
class Record:
    """`parts`: settings of each when it was started. `seconds`: of each phase, over all runs of the plan."""

    path: Path
    parts: dict[str, Settings] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, run_dir: Path) -> Record:
        """The record in `run_dir`; empty if there is none. ConfigError: another format, or damaged."""
        path = run_dir / FILE
        if not path.exists():
            return cls(path)
        try:
            data = read_json(path, RecordFile)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. Without it, what is complete in {run_dir} is kept and taken as of this plan: remove it if so"
            ) from error
        return cls(path, data["parts"], data["seconds"])

    def write(self) -> None:
        """Writes the record atomically."""
        data = {"format": FORMAT, "parts": self.parts, "seconds": {k: round(v, 2) for k, v in self.seconds.items()}}
        atomic_write(self.path, json.dumps(seal(data), indent=1) + "\n")

    def start(self, part: str, settings: Settings) -> None:
        """Records the settings of a part that is about to run."""
        if self.parts.get(part) != settings:
            self.parts[part] = settings
            self.write()

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Adds to the duration of a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds
        self.write()

    def remove(self, part: str) -> None:
        """Removes a part and its duration: its results have been moved away."""
        self.parts.pop(part, None)
        name = part.removeprefix("stages.")
        self.seconds = {k: v for k, v in self.seconds.items() if k != name and not k.startswith(f"{name}/")}
        self.write()

    @property
    def total_seconds(self) -> float:
        """Seconds of everything that produced the results in the folder."""
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
def lock_run_dir(run_dir: Path) -> Iterator[None]:
    """Locks RUN_DIR for this process. ConfigError: another process holds the lock, or nothing can be written there."""
    try:
        check_writable(run_dir)
    except ValueError as error:
        raise ConfigError(f"run_dir: {error}") from error
    lock = FolderLock(run_dir)
    try:
        lock.acquire()
    except BlockingIOError as error:
        lock.release()
        raise ConfigError(f"{run_dir}: another train_stages is running there ({error})") from error
    try:
        yield
    finally:
        lock.release()
