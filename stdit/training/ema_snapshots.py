"""Snapshots of a run's EMA profiles, for `stdit ema`: they outlive checkpoints.

    run_dir/ema_snapshots/step-00000020/   sigma_rel-0.05/, sigma_rel-0.1/   weights folders as of a checkpoint, float16
                                           identity.json, manifest.json       as of a checkpoint

float16, as in the paper: half the room of float32 for what is kept for good. Weights that it does not hold stay
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.config import EMAConfig
from stdit.errors import CheckpointError
from stdit.training import checkpoint

FOLDER = "ema_snapshots"
# The same averages in a checkpoint, to resume from: float32, by parameter name.
RESUME_FOLDER = "ema_profiles"


def profile_name(sigma_rel: float) -> str:
    """Name of a profile's folder or file."""
    return f"sigma_rel-{sigma_rel!r}"


def write_profile(folder: Path, name: str, full: dict[str, Tensor]) -> None:
    """Writes a profile of this name, full weights, into the checkpoint `folder`."""
    file = _resume_file(folder, name)
    file.parent.mkdir(exist_ok=True)
    save_file(full, file)


@contextmanager
def open_profile(folder: Path, name: str) -> Iterator[Callable[[str], Tensor]]:
    """Reads full weights of a profile in the checkpoint `folder`, by parameter name."""
    with safe_open(_resume_file(folder, name), framework="pt") as file:
        yield file.get_tensor


def _resume_file(folder: Path, name: str) -> Path:
    return folder / RESUME_FOLDER / f"{name}.safetensors"


def is_due(config: EMAConfig, step: int, steps: int) -> bool:
    """Whether the checkpoint of `step`, in a run of `steps`, has a snapshot: each `every` steps and at the end, once
    there is an average."""
    return config.profiles is not None and step >= config.every and (step == steps or step % config.profiles.every == 0)


def half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` in float16, but for tensors with larger values than that has."""
    limit = torch.finfo(torch.float16).max
    return {name: t if t.numel() and t.abs().max() > limit else t.half() for name, t in state.items()}


@contextmanager
def new_snapshot(run_dir: Path, step: int) -> Iterator[Path]:
    """A folder for the files of a snapshot, which is there once they are written: with its manifest, or not at all."""
    folder = run_dir / FOLDER / checkpoint.folder_of_step(step)
    partial = checkpoint.start_partial(checkpoint.partial_folder(folder))
    try:
        yield partial
        checkpoint.seal_partial(partial, folder)
    except BaseException:
        with suppress(OSError, CheckpointError):
            checkpoint.remove_partial(partial)
        raise


def list_snapshots(run_dir: Path) -> list[Path]:
    """The snapshots of a run, oldest first."""
    return checkpoint.step_folders(run_dir / FOLDER)[::-1]


def prepare(run_dir: Path, step: int) -> None:
    """Before a run goes on after `step`: removes what interrupted saves have left, and renames later snapshots to
    NAME.replaced, as the run writes them anew."""
    checkpoint.remove_partials(run_dir, FOLDER)
    for folder in list_snapshots(run_dir):
        if checkpoint.step_of(folder) > step:
            checkpoint.set_aside(folder, "replaced")
