"""Averages of a run's weights over any width, from snapshots of its EMA profiles: `stdit ema` (post-hoc EMA, Karras et
al. 2024, section 3.2 and algorithm 3).

    stdit ema runs/xl --sigma-rel 0.08 --out runs/xl-ema-0.08

How much an average has of the weights of each step is its profile. That of the width wanted is approximated by the sum
of the snapshots' profiles with the least squared error, and its weights by the same sum of their weights. The
coefficients add up to 1, which the paper does not ask for: weights that stand still come out as they are, however few
snapshots there are.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit import arguments
from stdit.config import Config, ConfigError, validate
from stdit.config.train import MAX_SIGMA_REL, MIN_SIGMA_REL
from stdit.console import echo
from stdit.errors import CheckpointError, exit_code
from stdit.files import atomic_folder, atomic_write
from stdit.integrity import IDENTITY, read_manifest, verify
from stdit.models import lora
from stdit.training import checkpoint, ema_snapshots
from stdit.training.ema import power_function_exponent
from stdit.training.identity import load_identity
from stdit.weights.convert import failed_writes_named

# The largest error of a profile, and the largest share of the weights that the snapshots' rounding to float16 may come
# to.
MAX_ERROR, MAX_ROUNDING = 0.1, 0.01
# Directions in which the snapshots differ by less than this are rounding errors of float64.
_RCOND = 1e-13


@dataclass(frozen=True)
class Snapshot:
    """One profile of one snapshot. time: of the average's last update, in steps."""

    folder: Path
    sigma_rel: float
    time: int


@dataclass(frozen=True)
class Solution:
    """Coefficients of the snapshots; error of their profile, as a share of the wanted one's norm; what the snapshots'
    rounding may come to, as a share of the weights."""

    coefficients: np.ndarray
    error: float
    rounding: float

    @property
    def is_usable(self) -> bool:
        return self.error <= MAX_ERROR and self.rounding <= MAX_ROUNDING


def inner_product(time_a: Any, gamma_a: Any, time_b: Any, gamma_b: Any) -> Any:
    """Integral of the product of two power-function profiles, of the weights until times a and b; arrays or numbers."""
    exponent = np.where(time_a < time_b, gamma_b, -gamma_a)
    product = (gamma_a + 1) * (gamma_b + 1) * (time_a / time_b) ** exponent
    return product / ((gamma_a + gamma_b + 1) * np.maximum(time_a, time_b))


class LeastSquares:
    """Approximates profiles by those of snapshots. times, sigma_rel: of each snapshot."""

    def __init__(self, times: Sequence[float], sigma_rel: Sequence[float]) -> None:
        self.times = np.asarray(times, np.float64)
        self.gammas = np.asarray([power_function_exponent(width) for width in sigma_rel])
        column = self.times[:, None], self.gammas[:, None]
        self.gram = inner_product(*column, self.times, self.gammas)
        self._norms = np.sqrt(np.diag(self.gram))
        values, vectors = np.linalg.eigh(self.gram / np.outer(self._norms, self._norms))
        kept = values > _RCOND * values[-1]
        self._values, self._vectors = values[kept], vectors[:, kept]

    def solve(self, time: float, sigma_rel: float) -> Solution:
        """The profile of this width over the weights until `time`."""
        gamma = power_function_exponent(sigma_rel)
        target = inner_product(self.times, self.gammas, np.float64(time), gamma)
        found, ones = self._inverse(target), self._inverse(np.ones_like(target))
        found += ones * ((1 - found.sum()) / ones.sum())
        norm = float(inner_product(np.float64(time), gamma, np.float64(time), gamma))
        squared = max(norm - 2 * float(found @ target) + float(found @ self.gram @ found), 0.0)
        rounding = float(np.linalg.norm(found)) * torch.finfo(torch.float16).eps / 2
        return Solution(found, float(np.sqrt(squared / norm)), rounding)

    def _inverse(self, target: np.ndarray) -> np.ndarray:
        scaled = self._vectors @ ((self._vectors.T @ (target / self._norms)) / self._values)
        return scaled / self._norms


# ---------------------------------------------------------------------------------------- a run's


def find_snapshots(run_dir: Path, step: int | None = None) -> list[Snapshot]:
    """Snapshots of a run up to `step` (None: all), oldest first. ConfigError: there are none, none of that step, or one
    is damaged."""
    folders = ema_snapshots.list_snapshots(run_dir)
    if not folders:
        raise ConfigError(
            f"{run_dir}: no snapshots of EMA profiles here ({ema_snapshots.FOLDER}/step-*), which runs with train.ema.profiles write"
        )
    steps = [checkpoint.step_of(folder) for folder in folders]
    if step is not None and step not in steps:
        raise ConfigError(f"--step {step}: no snapshot of it in {run_dir}; there are {', '.join(map(str, steps))}")
    found = []
    for folder, at in zip(folders, steps, strict=True):
        if step is not None and at > step:
            continue
        if reason := verify(folder):
            raise ConfigError(f"{folder}: {reason}. Without it, if it is moved away, the others serve")
        ema = validate(load_identity(folder)["config"], Config, f"{folder}: identity.json: config").train.ema
        profiles = {width: folder / ema_snapshots.profile_name(width) for width in ema.widths}
        found += [Snapshot(path, width, at - at % ema.every) for width, path in profiles.items()]
    return found


def choose(snapshots: Sequence[Snapshot], sigma_rel: float) -> Solution:
    """Coefficients of `snapshots` for the average of this width over the weights until the last of them. ConfigError:
    they do not give it exactly enough; says which ones they give."""
    last = snapshots[-1].time
    squares = LeastSquares([s.time for s in snapshots], [s.sigma_rel for s in snapshots])
    found = squares.solve(last, sigma_rel)
    if found.is_usable:
        return found
    widths = np.unique([*np.geomspace(MIN_SIGMA_REL, MAX_SIGMA_REL, 100), *(s.sigma_rel for s in snapshots)])
    usable = [width for width in widths if squares.solve(last, width).is_usable]
    raise ConfigError(
        f"--sigma-rel {sigma_rel:g}: {describe(snapshots)} give its profile with an error of {found.error:.1%} ({MAX_ERROR:.0%} at most), and "
        f"their rounding comes to {found.rounding:.1%} of the weights ({MAX_ROUNDING:.0%} at most); they serve for {min(usable):.3g} to "
        f"{max(usable):.3g}"
    )


def describe(snapshots: Sequence[Snapshot]) -> str:
    widths = ", ".join(f"{width:g}" for width in sorted({s.sigma_rel for s in snapshots}))
    return f"{len({s.time for s in snapshots})} snapshots of sigma_rel {widths}"


def weighted_sum(files: Sequence[Path], coefficients: Sequence[float]) -> dict[str, Tensor]:
    """Sum of the tensors of safetensors files, in float32; of the files it holds one tensor at a time. ConfigError:
    files of other tensors."""
    total: dict[str, Tensor] = {}
    for file, coefficient in zip(files, coefficients, strict=True):
        try:
            with safe_open(file, framework="pt") as source:
                shapes = {name: list(source.get_slice(name).get_shape()) for name in source.keys()}  # noqa: SIM118
                if total and shapes != {name: list(tensor.shape) for name, tensor in total.items()}:
                    raise ConfigError(f"{file}: other tensors than {files[0]}; these are not snapshots of one run")
                for name in shapes:
                    part = source.get_tensor(name).float()
                    total[name] = total[name].add_(part, alpha=coefficient) if name in total else part * coefficient
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file}: cannot be read ({error})") from error
    return total


def write_average(run_dir: Path, sigma_rel: float, out: Path, step: int | None = None) -> str:
    """Writes the average of a run's weights over this width until `step` (None: its last snapshot) to the folder OUT,
    which is a checkpoint to all that read weights; returns what was done, in a line. Holds the tensors of one file of
    OUT in memory.

    ConfigError: no snapshots, damaged ones, or none that give this width; OUT is there, and no earlier average.
    """
    if not MIN_SIGMA_REL <= sigma_rel <= MAX_SIGMA_REL:
        raise ConfigError(f"--sigma-rel {sigma_rel:g}: expected {MIN_SIGMA_REL:g} to {MAX_SIGMA_REL:g}")
    _check_out(run_dir, out)
    snapshots = find_snapshots(run_dir, step)
    solution = choose(snapshots, sigma_rel)
    newest = snapshots[-1].folder
    identity = load_identity(newest.parent)
    weights = checkpoint.weights_folder(checkpoint.trained_kind(identity), "ema")
    with failed_writes_named(out), atomic_folder(out) as folder:
        _write_weights(snapshots, solution.coefficients.tolist(), newest, folder / weights)
        atomic_write(folder / IDENTITY, json.dumps({**identity, "ema_sigma_rel": sigma_rel}, indent=1, allow_nan=False))
        checkpoint.write_manifest(folder)
    return (
        f"{out}: sigma_rel {sigma_rel:g} at step {snapshots[-1].time}, from {describe(snapshots)}; error of the profile {solution.error:.2%}, "
        f"rounding {solution.rounding:.2%} of the weights at most"
    )


def _write_weights(snapshots: Sequence[Snapshot], coefficients: Sequence[float], like: Path, target: Path) -> None:
    """Writes the folder `target` with the sums of the snapshots' tensors, and all else as in the folder `like`."""
    target.mkdir()
    size = 0
    for file in sorted(like.iterdir()):
        if file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)
            continue
        found = weighted_sum([s.folder / file.name for s in snapshots], coefficients)
        size += sum(tensor.nbytes for tensor in found.values())
        with safe_open(file, framework="pt") as source:
            metadata = source.metadata()
        if lora.is_adapter(like):
            lora.write_adapter(target, found, metadata[lora.LORA_ADAPTER_METADATA_KEY])
        else:
            save_file(found, target / file.name, metadata)
    for index in target.glob("*.safetensors.index.json"):  # of several files
        content = json.loads(index.read_text())
        atomic_write(index, json.dumps({**content, "metadata": {"total_size": size}}, indent=2) + "\n")


def _check_out(run_dir: Path, out: Path) -> None:
    """ConfigError: OUT is there, and no average that was written here and left as it was; or among what the run itself
    writes."""
    own = [(run_dir / name).resolve() for name in (checkpoint.FOLDER, ema_snapshots.FOLDER)]
    if {out.resolve(), *out.resolve().parents} & set(own):
        raise ConfigError(f"--out {out}: is where the run itself writes; choose another folder")
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConfigError(f"--out {out}: exists and is no folder")
    if not out.exists() or not any(out.iterdir()):
        return
    try:
        files = set(read_manifest(out)) | {checkpoint.MANIFEST}
        others = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()} - files
        ours = load_identity(out).get("ema_sigma_rel") is not None and not others
    except ValueError:
        ours = False
    if not ours:
        raise ConfigError(
            f"--out {out}: holds files that stdit ema has not written; nothing was changed. Choose another folder"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0; 1: a file cannot be written; 2: snapshots or arguments that cannot be used."""
    args = arguments.ema().parse_args(argv)
    try:
        echo(write_average(args.run, args.sigma_rel, args.out, args.step))
    except (ValueError, CheckpointError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
