"""Checkpoints that say what they are and whether they are whole.

    run_dir/checkpoints/step-00000020/   DeepSpeed's shards, one or more a rank
                                         transformer/, transformer_ema/   diffusers' folders, float32; or of a run
                                         beside a frozen model control/, control_ema/; or lora/, lora_ema/
                                         identity.json   what this is: config, encoders, step, place in the data
                                         manifest.json   every file's size and sha256: written last, so there or not
                        latest           the newest one's name, for people

A folder without a manifest was cut off and counts as not there; one whose files are not what the manifest says is
refused with the reason, and the one before it is used.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from stdit import __version__
from stdit.config import Config, ConfigError, TrainConfig
from stdit.files import atomic_write, fsync_folder, sha256

FOLDER, MANIFEST, IDENTITY, LATEST = "checkpoints", "manifest.json", "identity.json", "latest"
Weights = Literal["ema", "model"]
# What a run trains: the model, or adapters of a frozen one, or a control branch beside a frozen one.
Trained = Literal["transformer", "lora", "control"]
TRANSFORMER: dict[Weights, str] = {"model": "transformer", "ema": "transformer_ema"}
# Threads that hash files; hashlib leaves the interpreter free meanwhile.
HASHERS = 8


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used or written; the message names the folder and the reason."""


def tag_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# ----------------------------------------------------------------------------------------- manifest


def seal(checkpoint: Path) -> None:
    """Writes every file in `checkpoint` through to the disk, then the manifest that makes it whole, then `latest`."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST)
    with ThreadPoolExecutor(HASHERS) as pool:
        entries = list(pool.map(_entry, files))
    for folder in {p.parent for p in files}:
        fsync_folder(folder)
    content = {str(p.relative_to(checkpoint)): entry for p, entry in zip(files, entries, strict=True)}
    atomic_write(checkpoint / MANIFEST, json.dumps({"files": content}, indent=1))
    atomic_write(checkpoint.parent / LATEST, checkpoint.name + "\n")


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def problem(checkpoint: Path) -> str | None:
    """Why `checkpoint` cannot be used, or None if every file in it is what its manifest says."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"no {MANIFEST}: its writing was cut off"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, its manifest says {entry['size']}"
    with ThreadPoolExecutor(HASHERS) as pool:
        for name, found in zip(files, pool.map(lambda n: sha256(checkpoint / n), files), strict=True):
            if found != files[name]["sha256"]:
                return f"{name} is not what was written (sha256 {found[:12]}…, its manifest says {files[name]['sha256'][:12]}…)"
    return None


def all_of(run_dir: Path) -> list[Path]:
    """Every checkpoint folder of a run, newest first, whole or not."""
    return sorted((p for p in (run_dir / FOLDER).glob("step-*") if p.is_dir()), key=step_of, reverse=True)


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files are all as its manifest says; None where no checkpoint was ever completed.

    Says on stderr which it passes over, and why. CheckpointError: there are completed ones, and all are damaged.
    """
    completed = False
    for checkpoint in all_of(run_dir):
        reason = problem(checkpoint)
        if reason is None:
            return checkpoint
        completed = completed or (checkpoint / MANIFEST).exists()
        print(f"stdit: checkpoint {checkpoint} is not used: {reason}", file=sys.stderr)
    if completed:
        raise CheckpointError(
            f"{run_dir / FOLDER}: no checkpoint is intact (see above). Remove the folder to begin from step 0"
        )
    return None


def remove_torn(run_dir: Path) -> None:
    """Removes checkpoints that were cut off while they were written: they hold disk and nothing else."""
    for checkpoint in all_of(run_dir):
        if not (checkpoint / MANIFEST).exists():
            shutil.rmtree(checkpoint)


def prune(run_dir: Path, keep: int) -> None:
    """Removes all but the `keep` newest completed checkpoints."""
    for checkpoint in [c for c in all_of(run_dir) if (c / MANIFEST).exists()][keep:]:
        # First what makes it count, so that a half-removed one is not taken for a damaged one.
        (checkpoint / MANIFEST).unlink()
        shutil.rmtree(checkpoint)


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
) -> dict[str, Any]:
    """identity.json. architecture: the diffusers config. data: identities of video_encoder and text_encoder, classes, and
    `features`, their fingerprint. base: folder and fingerprint of the weights that what was trained belongs to."""
    return {
        "version": __version__,
        "architecture": architecture,
        "trained": kind_of(config.train),
        "base": base,
        "diffusion": config.diffusion.model_dump(mode="json"),
        **data,
        "step": step,
        "samples_seen": samples_seen,
        "data_position": data_position,
        "world_size": world_size,
        "git_revision": git_revision(),
        "config": config.model_dump(mode="json"),
    }


def identity(checkpoint: Path) -> dict[str, Any]:
    """The identity.json of a checkpoint, or of the newest intact one of a run directory.

    ConfigError: neither, or one that cannot be read.
    """
    path = _checkpoint_of(checkpoint) / IDENTITY
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error


def kind_of(train: TrainConfig) -> Trained:
    """What `train` trains."""
    if train.lora is not None:
        return "lora"
    return "transformer" if train.control is None else "control"


def trained(identity: dict[str, Any]) -> Trained:
    """What the run of an identity.json trained."""
    return identity.get("trained", "transformer")


def folder_name(kind: Trained, weights: Weights) -> str:
    """transformer, transformer_ema, lora, …: the folder of a checkpoint with what was trained."""
    return kind if weights == "model" else f"{kind}_ema"


def identity_beside(folder: Path) -> dict[str, Any]:
    """The identity.json of the checkpoint that `folder`, one with weights, is in."""
    return json.loads((folder.parent / IDENTITY).read_text())


def trained_folder(run_or_checkpoint: Path, weights: Weights = "ema") -> Path:
    """The folder of what was trained, of a checkpoint, or of the newest intact one of a run directory.

    ConfigError: there is none. CheckpointError: it is damaged.
    """
    place = _checkpoint_of(run_or_checkpoint)
    return place / folder_name(trained(json.loads((place / IDENTITY).read_text())), weights)


def _checkpoint_of(run_or_checkpoint: Path) -> Path:
    path = Path(run_or_checkpoint)
    if (path / IDENTITY).is_file():
        if reason := problem(path):
            raise CheckpointError(f"{path}: {reason}")
        return path
    if (path / FOLDER).is_dir() and (found := newest(path)) is not None:
        return found
    raise ConfigError(
        f"{path}: neither a checkpoint (no {IDENTITY}) nor a run directory with one (no whole {FOLDER}/step-*)"
    )


def git_revision() -> str | None:
    """The commit of the source that is running, with "+changes" if it differs from it; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
