"""metrics.jsonl of a training run: one JSON object per logged step, appended."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, ValidationError

from stdit.config import FileSchema, NonNegative
from stdit.console import echo
from stdit.files import parse_json

FILE = "metrics.jsonl"
# `read_last` looks no further back than this.
_TAIL_BYTES = 64 * 1024


class MetricsEntry(FileSchema):
    """A line. Further keys are numbers and names, by what the run measures."""

    model_config = ConfigDict(extra="allow")

    step: NonNegative
    loss: float | None = None


class MetricsLog:
    """Appends to RUN_DIR/metrics.jsonl, line by line, after dropping what lies beyond `step`."""

    def __init__(self, run_dir: Path, step: int) -> None:
        self.path = run_dir / FILE
        truncate(self.path, step)
        self._file = self.path.open("ab", buffering=0)
        self._pending = b""

    def write(self, entry: Mapping[str, Any]) -> None:
        """One line. NaN and infinity become null: JSON has neither, and every reader must read every line.

        OSError, with the path: not written; the line is kept and written with the next one.
        """
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self._pending += (json.dumps(clean) + "\n").encode()
        try:
            while self._pending:
                self._pending = self._pending[self._file.write(self._pending) or 0 :]
        except OSError as error:
            raise OSError(error.errno, f"metrics could not be written ({error.strerror})", str(self.path)) from error

    @property
    def pending(self) -> int:
        """Lines that are not on disk."""
        return self._pending.count(b"\n")

    def close(self) -> None:
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All entries in order; [] without a file. A last line that was cut off is left out; so are damaged lines, which
    are counted on stderr."""
    damaged: list[str] = []
    entries = [entry for _, entry in _entries(path.read_bytes(), damaged)] if path.is_file() else []
    if damaged:
        lines = f"{len(damaged)} damaged lines are" if len(damaged) > 1 else "a damaged line is"
        echo(f"{path}: {lines} left out ({damaged[0]})", file=sys.stderr)
    return entries


def read_last(path: Path) -> dict[str, Any] | None:
    """The newest entry with a loss, without reading the whole file; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return None
    return next((entry for _, entry in reversed(list(_entries(tail, []))) if "loss" in entry), None)


def truncate(path: Path, step: int) -> None:
    """Drops every entry after `step`, and a last line that was cut off: a resumed run logs those steps again."""
    if not path.exists():
        return
    end = 0
    for line_end, entry in _entries(path.read_bytes(), []):
        if entry["step"] > step:
            break
        end = line_end
    os.truncate(path, end)


def _entries(content: bytes, damaged: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(offset of the line's end, entry) for each line that is whole; what is wrong with others goes to `damaged`."""
    end = 0
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        end += len(line) + 1
        if not line.strip():
            continue
        try:
            entry = parse_json(line.decode())
            MetricsEntry.model_validate(entry, strict=True)
        except (ValueError, ValidationError) as error:
            reason = "no entry of metrics" if isinstance(error, ValidationError) else str(error)
            damaged.append(f"line {number}: {reason}")
        else:
            yield end, entry
