"""Checkpoint folders: layout, integrity, identity.

    run_dir/checkpoints/step-00000020/   DeepSpeed's shards, one or more per rank
                                         transformer/, transformer_ema/   diffusers folders, float32; of a fine-tuning
                                         run control/, control_ema/ or lora/, lora_ema/
                                         identity.json   config, encoders, step, data position
                                         manifest.json   size and sha256 of every file; written last
                                         ema_profiles/    averages of train.ema.profiles, float32 by parameter name
                                         alignment_head_ema.safetensors   of train.alignment, likewise
                        latest           name of the newest one, for people

A checkpoint is written as step-00000020.partial and renamed when its manifest is complete; it goes the same way when it
is removed. One whose files differ from its manifest is damaged: it is reported, and the one before it is used. A
resumed run renames it to step-00000020.damaged, so that it counts for nothing and that step is saved again.

Nothing is removed that this package did not write: a partial folder holds a mark of its own, a complete one a manifest
that carries its own hash. Folders of other names are ignored.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from stdit import __version__, integrity
from stdit.config import Config, ConfigError, FileSchema, NonNegative, TrainConfig, read_json
from stdit.console import echo
from stdit.errors import CheckpointError
from stdit.files import apply_umask, atomic_write, fsync_folder
from stdit.integrity import IDENTITY, MANIFEST, read_manifest, verify
from stdit.training.identity import Trained, load_identity

# Files of a run directory: it is complete; it was stopped, with a checkpoint.
DONE, STOPPED_FILE = "done.json", "stopped.json"
FOLDER, LATEST = "checkpoints", "latest"
Weights = Literal["ema", "model"]
TRANSFORMER: dict[Weights, str] = {"model": "transformer", "ema": "transformer_ema"}
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL_NAME = re.compile(r"step-\d{8,}\.partial|\.universal")
# A file in every folder that is being written or removed; only folders with it are ever deleted.
PARTIAL_MARK = ".stdit-partial"
# In a folder that is being written: files of each rank for rank 0.
_RANK_PREFIX = ".rank-"
# Entries of a manifest by file name.
FileEntries = Mapping[str, Mapping[str, Any]]


def folder_of_step(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# ----------------------------------------------------------------------------------------- manifest


def partial_folder(checkpoint: Path) -> Path:
    """Where `checkpoint` is written, until it is complete."""
    return checkpoint.with_name(f"{checkpoint.name}.partial")


def start_partial(folder: Path) -> Path:
    """Creates an empty folder with the mark of unfinished ones; an earlier one with that mark is replaced.

    CheckpointError: a folder of that name has no such mark.
    """
    remove_partial(folder)
    folder.mkdir(parents=True)
    (folder / PARTIAL_MARK).touch()
    return folder


def remove_partial(folder: Path) -> None:
    """Removes a marked folder if it exists, its mark last. CheckpointError: it holds files and no mark."""
    mark = folder / PARTIAL_MARK
    if not os.path.lexists(folder):
        return
    if not _is_removable(folder):
        raise CheckpointError(f"{folder}: in the way, and not written by stdit; move it elsewhere")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()
    mark.unlink(missing_ok=True)
    folder.rmdir()


def _is_removable(partial: Path) -> bool:
    """Whether it is a marked folder, or an empty one."""
    if partial.is_symlink() or not partial.is_dir():
        return False
    return (partial / PARTIAL_MARK).is_file() or not any(partial.iterdir())


def complete(partial: Path, checkpoint: Path, expected: FileEntries = MappingProxyType({})) -> None:
    """Turns a partial folder into `checkpoint`: syncs every file, writes the manifest, renames, then writes `latest`.

    expected: files that their writers have synced. CheckpointError: one of them is missing or has another size, or
    `checkpoint` exists.
    """
    seal_partial(partial, checkpoint, expected)
    atomic_write(checkpoint.parent / LATEST, checkpoint.name + "\n")


def seal_partial(partial: Path, folder: Path, expected: FileEntries = MappingProxyType({})) -> None:
    """Turns a partial folder into `folder`: syncs every file, writes the manifest, renames. Errors: as `complete`."""
    write_manifest(partial, expected)
    if os.path.lexists(folder):
        raise CheckpointError(f"{folder}: in the way of a new checkpoint; move it elsewhere")
    partial.rename(folder)
    fsync_folder(folder.parent)
    (folder / PARTIAL_MARK).unlink(missing_ok=True)


def write_manifest(checkpoint: Path, expected: FileEntries = MappingProxyType({})) -> None:
    """Syncs every file that is not in `expected` to disk, then writes the manifest of all. CheckpointError: as
    `complete`."""
    missing = []
    for name, entry in sorted(expected.items()):
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            missing.append(name)
    if missing:
        raise CheckpointError(f"{checkpoint}: {', '.join(missing)} missing or cut; another process changed files there")
    apply_umask(checkpoint)
    files = (p for p in checkpoint.rglob("*") if p.is_file() and p.name not in (MANIFEST, PARTIAL_MARK))
    # What NFS keeps of a removed file as long as a process has it open.
    files = (p for p in files if not p.name.startswith(".nfs"))
    integrity.write_manifest(checkpoint, files, expected)


def write_rank_mark(partial: Path, rank: int, files: Sequence[Path]) -> None:
    """Syncs the files that `rank` has written into `partial`, and says so there: they are complete, with their
    hashes."""
    atomic_write(partial / _rank_mark(rank), json.dumps(integrity.sync_files(partial, files)))


def read_rank_marks(partial: Path, ranks: int) -> dict[str, dict[str, Any]] | None:
    """The files of all ranks with their manifest entries; None as long as a rank has not written all of its own."""
    marks = [partial / _rank_mark(rank) for rank in range(ranks)]
    if not all(mark.is_file() for mark in marks):
        return None
    return {name: entry for mark in marks for name, entry in json.loads(mark.read_text()).items()}


def remove_rank_marks(partial: Path) -> None:
    """Removes what ranks have left for rank 0 alone."""
    for path in partial.glob(f"{_RANK_PREFIX}*"):
        path.unlink()


def rank_partition(partial: Path, rank: int) -> Path:
    """File for rank 0: a rank's partitions of the weights and of their average."""
    return partial / f"{_RANK_PREFIX}{rank:05d}.pt"


def _rank_mark(rank: int) -> str:
    return f"{_RANK_PREFIX}{rank:05d}.json"


def is_own(checkpoint: Path) -> bool:
    """Whether stdit wrote the folder, even if it is damaged now: one that cannot be looked into counts as ours."""
    try:
        return (checkpoint / IDENTITY).is_file() or bool(read_manifest(checkpoint))
    except ValueError:
        return False
    except OSError:
        return True


def list_checkpoints(run_dir: Path) -> list[Path]:
    """All checkpoint folders of a run, newest first, complete or not."""
    return step_folders(run_dir / FOLDER)


def step_folders(folder: Path) -> list[Path]:
    """Folders in `folder` that are named after a step, newest first."""
    found = (p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=step_of, reverse=True)


def find_latest(run_dir: Path, check: Callable[[Path], str | None] = verify) -> Path | None:
    """The newest checkpoint that passes `check`; None if none was ever completed. Reports skipped ones on stderr.

    check: the reason why a checkpoint can't be used, or None. CheckpointError: no completed one passes.
    """
    completed = False
    for checkpoint in list_checkpoints(run_dir):
        reason = check(checkpoint)
        if reason is None:
            return checkpoint
        completed = completed or is_own(checkpoint)
        echo(f"stdit: checkpoint {checkpoint} is skipped: {reason}", file=sys.stderr)
    if completed:
        raise CheckpointError(
            f"{run_dir / FOLDER}: no checkpoint is intact (see above). Remove the folder to start from step 0"
        )
    return None


class Done(FileSchema):
    """done.json: the last step of a complete run, and its checkpoint."""

    step: NonNegative
    samples_seen: NonNegative
    checkpoint: str


def read_done(run_dir: Path) -> dict[str, Any]:
    """done.json of a run. ConfigError: not there or damaged."""
    return read_json(run_dir / DONE, Done)


def is_done(run_dir: Path, steps: int) -> bool:
    """Whether done.json says that the run is complete, with `steps` steps or more. Its checkpoint is not verified
    (`find_final`)."""
    try:
        return read_done(run_dir)["step"] >= steps
    except ConfigError:
        return False


def find_final(run_dir: Path, steps: int) -> Path | None:
    """The intact checkpoint that done.json names; None if the run is not complete, with `steps` steps or more, or if
    file or checkpoint are damaged."""
    path = run_dir / DONE
    if not path.is_file():
        return None
    try:
        checkpoint = run_dir / FOLDER / read_done(run_dir)["checkpoint"]
        reason = "it names no checkpoint"
        if _NAME.fullmatch(checkpoint.name):
            if step_of(checkpoint) < steps:
                return None
            if (reason := verify(checkpoint)) is None:
                load_identity(checkpoint)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{path}: ")
    else:
        if reason is None:
            return checkpoint
        reason = f"{checkpoint.name}: {reason}"
    echo(f"stdit: {path} is ignored: {reason}", file=sys.stderr)
    return None


def unfinished_files(run_dir: Path) -> set[tuple[str, int]]:
    """Files of checkpoints that are being written or removed, with their sizes. Never fails: what is renamed, removed
    or lost meanwhile is left out."""
    found: set[tuple[str, int]] = set()
    with contextlib.suppress(OSError):
        for partial in (run_dir / FOLDER).glob("*.partial"):
            for folder, _, names in os.walk(partial):  # unlike Path.rglob it passes over what it cannot list
                for path in (os.path.join(folder, name) for name in names):
                    with contextlib.suppress(OSError):
                        found.add((path, os.stat(path).st_size))
    return found


def remove_partials(run_dir: Path, name: str = FOLDER) -> None:
    """Removes what interrupted saves, removals and conversions have left in RUN_DIR/NAME: folders with their mark."""
    for folder in (run_dir / name).glob("*"):
        if _PARTIAL_NAME.fullmatch(folder.name) and (folder / PARTIAL_MARK).is_file() and not folder.is_symlink():
            remove_partial(folder)


def check_in_the_way(run_dir: Path, latest: Path | None) -> None:
    """ConfigError: what has a name that this run may write (of a checkpoint newer than `latest`, one that is being
    written or converted, `latest`) is none of ours."""
    done, folder = -1 if latest is None else step_of(latest), run_dir / FOLDER
    for path in [folder, *sorted(folder.glob("*"))]:
        step = _NAME.match(path.name)
        if step is not None and int(step[1]) <= done:
            continue
        if what := _obstacle(path):
            raise ConfigError(
                f"{path} {what} and has a name that this run may write; move it elsewhere. Nothing was changed"
            )


def _obstacle(path: Path) -> str | None:
    """What makes `path`, the folder of checkpoints or an entry of it, one that a run cannot write over by its name."""
    if _NAME.fullmatch(path.name) and not (path.is_dir() and is_own(path)):
        return f"is no checkpoint of stdit (neither {MANIFEST} nor {IDENTITY})"
    if _PARTIAL_NAME.fullmatch(path.name) and not _is_removable(path):
        return f"was not written by stdit (it is no folder with {PARTIAL_MARK})"
    if path.name == LATEST and path.is_dir() and not path.is_symlink():
        return "is a folder"
    if path.name == FOLDER and os.path.lexists(path) and not path.is_dir():
        return "is no folder"
    return None


def set_aside_damaged(run_dir: Path, latest: Path) -> None:
    """Renames checkpoints newer than `latest`, the newest usable one, to NAME.damaged."""
    for checkpoint in list_checkpoints(run_dir):
        if step_of(checkpoint) <= step_of(latest):
            break
        target = set_aside(checkpoint, "damaged")
        echo(f"stdit: the damaged checkpoint {checkpoint.name} is now {target}", file=sys.stderr)


def set_aside(folder: Path, suffix: str) -> Path:
    """Renames `folder` to NAME.suffix, or NAME.suffix-2 and so on where there is one; returns its new path."""
    number, target = 1, folder.with_name(f"{folder.name}.{suffix}")
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}.{suffix}-{number}")
    folder.rename(target)
    return target


def prune(run_dir: Path, keep: int, intact: set[Path], every: int | None = None, best: int = 0) -> None:
    """Removes complete checkpoints older than the `keep` newest of `intact`, those that this process wrote or verified.

    every: those whose step is a multiple of it stay; best: so do so many intact ones with the lowest validation loss,
    which are verified once and added to `intact`. With fewer than `keep` of them nothing is removed: the others may be
    damaged. Folders without a manifest of ours stay.
    """
    kept = sorted((c for c in intact if (c / MANIFEST).exists()), key=step_of, reverse=True)[:keep]
    if len(kept) < keep:
        return
    spared = best_checkpoints(run_dir, best, intact)
    for checkpoint in list_checkpoints(run_dir):
        if step_of(checkpoint) >= step_of(kept[-1]) or checkpoint.is_symlink() or checkpoint in spared:
            continue
        if every is not None and step_of(checkpoint) % every == 0:
            continue
        try:
            read_manifest(checkpoint)
            remove_partial(partial_folder(checkpoint))
        except (CheckpointError, ValueError):
            continue
        # Renamed first, so that it never counts as a damaged one.
        (checkpoint / PARTIAL_MARK).touch()
        checkpoint.rename(partial_folder(checkpoint))
        remove_partial(partial_folder(checkpoint))


def best_checkpoints(run_dir: Path, count: int, intact: set[Path]) -> list[Path]:
    """The `count` intact checkpoints with the lowest validation losses, the best first; those without one do not count.
    Those that are not in `intact` are verified, and added to it."""
    if not count:
        return []
    losses = []
    for checkpoint in list_checkpoints(run_dir):
        with contextlib.suppress(ConfigError):  # damaged, or none of ours
            if (loss := load_identity(checkpoint)["validation_loss"]) is not None:
                losses.append((loss, checkpoint))
    best: list[Path] = []
    for _, checkpoint in sorted(losses):
        if len(best) < count and (checkpoint in intact or verify(checkpoint) is None):
            intact.add(checkpoint)
            best.append(checkpoint)
    return best


# ----------------------------------------------------------------------------------------- identity


def make_identity(
    config: Config,
    architecture: dict[str, Any],
    data: dict[str, Any],
    step: int,
    samples_seen: int,
    data_position: dict[str, int],
    world_size: int,
    base: dict[str, Any] | None = None,
    validation_loss: float | None = None,
    recent_losses: Mapping[str, Sequence[float]] = MappingProxyType({}),
    skipped_steps: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Content of identity.json. architecture: the diffusers config. data: video_encoder, text_encoder, classes,
    frame_rates, and the fingerprint of the features. base: folder and fingerprint of a fine-tuning run's frozen
    weights. recent_losses: the last ones of each bucket. skipped_steps: counts of
    stdit.training.divergence.SkippedSteps. A validation loss that is not finite counts as none."""
    if validation_loss is not None and not math.isfinite(validation_loss):
        validation_loss = None
    return {
        "version": __version__,
        "architecture": architecture,
        "trained": config_kind(config.train),
        "base": base,
        "diffusion": config.diffusion.model_dump(mode="json"),
        **data,
        "step": step,
        "samples_seen": samples_seen,
        "data_position": data_position,
        "world_size": world_size,
        "git_revision": git_revision(),
        "config": config.model_dump(mode="json"),
        "validation_loss": validation_loss,
        "recent_losses": dict(recent_losses),
        "skipped_steps": skipped_steps,
    }


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """identity.json of a checkpoint, or of a run's newest intact one. ConfigError: neither, or unreadable."""
    return load_identity(_checkpoint_of(checkpoint))


def config_kind(train: TrainConfig) -> Trained:
    """What a run with this config trains."""
    if train.lora is not None:
        return "lora"
    return "transformer" if train.control is None else "control"


def common_frame_rate(identity: dict[str, Any]) -> float | None:
    """The most common frame rate of the videos that a run was trained on; None: of stills alone, or not recorded."""
    return next(map(float, identity.get("frame_rates") or ()), None)


def trained_kind(identity: dict[str, Any]) -> Trained:
    """What the run of an identity.json trained."""
    return identity.get("trained", "transformer")


def weights_folder(kind: Trained, weights: Weights) -> str:
    """Name of a checkpoint's folder with trained weights: transformer, transformer_ema, lora, …"""
    return kind if weights == "model" else f"{kind}_ema"


def identity_beside(folder: Path) -> dict[str, Any]:
    """identity.json of the checkpoint that contains the weights folder `folder`."""
    return load_identity(folder.parent)


def find_weights(run_or_checkpoint: Path, weights: Weights = "ema") -> Path:
    """Folder of trained weights in a checkpoint, or in a run's newest intact one.

    ConfigError: there is none. CheckpointError: it is damaged.
    """
    folder = _checkpoint_of(run_or_checkpoint)
    return folder / weights_folder(trained_kind(load_identity(folder)), weights)


def _checkpoint_of(run_or_checkpoint: Path) -> Path:
    path = Path(run_or_checkpoint)
    if (path / IDENTITY).is_file():
        if reason := verify(path):
            raise CheckpointError(f"{path}: {reason}")
        return path
    if (path / FOLDER).is_dir() and (found := find_latest(path)) is not None:
        return found
    raise ConfigError(
        f"{path}: neither a checkpoint (no {IDENTITY}) nor a run directory with one (no complete {FOLDER}/step-*)"
    )


@cache
def git_revision() -> str | None:
    """Commit of the running source at the first call, with "+changes" if the tree is modified; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        output = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return output.stdout.strip()
