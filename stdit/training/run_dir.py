"""The run directory: whose it is, its lock, and the files that say what became of the run.

    config.yaml     the resolved config; its first line marks the folder as a run
    done.json       the run is complete: its last step and checkpoint; gone when it is trained on with more steps
    stopped.json    the run was stopped and has saved: step, checkpoint, reason; gone when it goes on

Whoever waits for a run reads these files; launchers' exit codes are their own (stdit.training.launcher).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stdit.config import Config, ConfigError, dump, load_config
from stdit.console import echo
from stdit.files import FolderLock, atomic_write, open_regular
from stdit.training import checkpoint
from stdit.training.checkpoint import DONE, STOPPED_FILE

if TYPE_CHECKING:
    from stdit.training.distributed import Ranks

CONFIG = "config.yaml"
MARK = "# Written by stdit: the resolved config of the run in this folder.\n"
# Begins its second line: the hash of those that follow.
_HASH = "# sha256 "
# A new run waits this long for the ranks of a stopped one, which may be saving.
LOCK_WAIT_S = 60.0
# What launchers and shells write beside a run that has not begun; and a rank that hung, or failed, before its first
# step.
LOG_SUFFIXES = (".log", ".out", ".err")
_REPORT = re.compile(r"(stalled|failed)-rank-(\d+)\.txt")


# ----------------------------------------------------------------------------------- whose it is


def check(run_dir: Path) -> None:
    """ConfigError: `run_dir` is no folder, can't be written, or holds files that are not a run's. Nothing is
    touched."""
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise ConfigError(f"run_dir: {existing} exists and is no folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run_dir: {existing} cannot be written (read-only, or no permission)")
    if not run_dir.is_dir() or is_run(run_dir):
        return
    foreign = sorted(path.name for path in run_dir.iterdir() if not _is_log(path))
    if foreign:
        names = ", ".join(foreign[:3]) + (", …" if len(foreign) > 3 else "")
        raise ConfigError(
            f"run_dir: {run_dir} holds {names} and is no run of stdit; nothing was changed. Choose a new or empty folder"
        )


def is_run(run_dir: Path) -> bool:
    """Whether the folder is a run's: its config.yaml has our mark, or it holds a checkpoint of ours."""
    try:
        with open_regular(run_dir / CONFIG) as file:
            marked = file.read(len(MARK.encode())) == MARK.encode()
    except OSError:
        marked = False
    return marked or any(checkpoint.is_own(folder) for folder in checkpoint.list_checkpoints(run_dir))


def _is_log(path: Path) -> bool:
    """A launcher's log, or a hidden file that a run never touches; our own lock."""
    if not path.is_file():
        return False
    if path.name == ".lock":
        return path.read_bytes()[:8] in (b"", b"process ")  # FolderLock's own
    return path.suffix in LOG_SUFFIXES or path.name.startswith(".") or _REPORT.fullmatch(path.name) is not None


def report_file(run_dir: Path, kind: Literal["stalled", "failed"], rank: int) -> Path | None:
    """Where a rank that hangs, or fails, says so; None if the folder is not there, or no run's."""
    try:
        check(run_dir)
    except ConfigError:
        return None
    return run_dir / f"{kind}-rank-{rank}.txt" if run_dir.is_dir() else None


def reports(run_dir: Path, kind: Literal["stalled", "failed"], since: float = 0.0) -> set[int]:
    """Ranks that have said so since a time (seconds, of the file system's clock)."""
    found: set[int] = set()
    for entry in os.scandir(run_dir):
        with suppress(OSError):
            if (match := _REPORT.fullmatch(entry.name)) and match[1] == kind and entry.stat().st_mtime >= since:
                found.add(int(match[2]))
    return found


def start(config: Config) -> None:
    """Marks the folder as this run's, with its resolved config; the run goes on. OSError: it can't be written."""
    text = dump(config)
    atomic_write(config.run_dir / CONFIG, f"{MARK}{_HASH}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    for outcome in (DONE, STOPPED_FILE):
        (config.run_dir / outcome).unlink(missing_ok=True)


def read_config(run_dir: Path) -> Config:
    """The resolved config of a run. ConfigError: not there, damaged, or edited."""
    file = run_dir / CONFIG
    config = load_config(file, Config)
    head, _, text = file.read_bytes().removeprefix(MARK.encode()).partition(b"\n")
    if head.startswith(_HASH.encode()) and head != f"{_HASH}{hashlib.sha256(text).hexdigest()}".encode():
        raise ConfigError(f"{file}: was changed after it was written (its content does not match its sha256)")
    return config


# ------------------------------------------------------------------------------------------- lock


@contextmanager
def lock(config: Config, ranks: Ranks) -> Iterator[None]:
    """Locks the run directory for the ranks of this run, until the last of them has left or died; collective.

    A run that was stopped a moment ago may still be saving: this waits LOCK_WAIT_S for it. ConfigError: another run
    trains there.
    """
    held = FolderLock(config.run_dir)

    def acquire() -> None:
        try:
            held.acquire(LOCK_WAIT_S, lambda owner: echo(f"{config.run_dir}: waiting for {owner}", file=sys.stderr))
            for rank in reports(config.run_dir, "failed"):  # of an earlier launch
                (config.run_dir / f"failed-rank-{rank}.txt").unlink(missing_ok=True)
            held.share()
        except BlockingIOError as error:
            raise ConfigError(f"{config.run_dir}: another run is training there ({error})") from error

    try:
        ranks.broadcast(acquire)
        if not ranks.is_main:
            held.share()
        ranks.barrier()
        yield
    finally:
        held.release()


# ---------------------------------------------------------------------------------------- outcome


def write_done(config: Config, step: int, samples_seen: int, ranks: Ranks) -> None:
    """Writes done.json, which marks the run as complete. OSError, on every rank: it can't be written."""
    done = {"step": step, "samples_seen": samples_seen, "checkpoint": checkpoint.folder_of_step(step)}
    ranks.broadcast(lambda: atomic_write(config.run_dir / DONE, json.dumps(done)))


def write_stopped(config: Config, saved: Path, reason: str, ranks: Ranks) -> None:
    """Writes stopped.json: the run was stopped and goes on from the checkpoint `saved`. OSError, on every rank: it
    can't be written."""
    stopped = {"step": checkpoint.step_of(saved), "checkpoint": saved.name, "reason": reason}
    ranks.broadcast(lambda: atomic_write(config.run_dir / STOPPED_FILE, json.dumps(stopped)))
