"""Fine-tuning with a frozen base: LoRA adapters, or a control branch beside it.

A checkpoint holds the trained weights alone; its identity.json names the base by folder and fingerprint. `load_trained`
loads both.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stdit.config import Config, ConfigError, validate
from stdit.errors import CheckpointError
from stdit.files import fingerprint_files, sha256
from stdit.models import lora
from stdit.models.alignment import Aligned
from stdit.models.control import Controlled, STDiTControl
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT
from stdit.training import checkpoint
from stdit.training.checkpoint import Weights
from stdit.training.identity import load_identity
from stdit.weights.state_dict import check_finite
from stdit.weights.transfer import transfer_weights


def check_lora_targets(config: Config) -> None:
    """ConfigError: train.lora.targets names a layer that the model does not have; lists those it has."""
    if config.train.lora is None:
        return
    kwargs = config.model.model_kwargs()
    with torch.device("meta"):
        model = STDiT(**kwargs)
    try:
        lora.match_targets(model, config.train.lora.targets)
    except ValueError as error:
        raise ConfigError(f"train.lora.targets: {error}") from error


# --------------------------------------------------------------------------------------------- base


@dataclass(frozen=True)
class Base:
    """Frozen weights of adapters or a control branch: their folder, and its SHA-256 fingerprint."""

    folder: str
    fingerprint: str


# Average of the weights of an alignment's head, in a checkpoint that has one: what resumes from it alone reads it.
HEAD = "alignment_head_ema.safetensors"
# Ends the messages about a base that was moved.
MOVED_HINT = "if they were moved, set init.source (training) or base (generation: base=…, or --set base=…)"


def make_base(folder: Path) -> Base:
    """Base record of the weights in `folder`."""
    return Base(str(folder.resolve()), weights_fingerprint(folder))


def weights_fingerprint(folder: Path) -> str:
    """SHA-256 over config and weights in `folder`. ConfigError: there are no weights, or what cannot be read."""
    files = sorted(p for p in folder.glob("*") if p.suffix == ".safetensors" or p.name == "config.json")
    if not any(p.suffix == ".safetensors" for p in files):
        raise ConfigError(f"{folder}: holds no weights (*.safetensors)")
    try:
        return fingerprint_files(files, sha256)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be read ({error.strerror})") from error


def check_base(base: Base, found: Path | None = None) -> Path:
    """Folder of `base`, now perhaps in `found`, after comparing fingerprints. ConfigError: missing, or other
    weights."""
    folder = found or Path(base.folder)
    if not folder.is_dir():
        raise ConfigError(f"the base weights in {folder} are gone; {MOVED_HINT}")
    if (current := weights_fingerprint(folder)) != base.fingerprint:
        raise ConfigError(
            f"the base weights in {folder} are not those of the training: fingerprint {base.fingerprint[:12]}… -> {current[:12]}…"
        )
    return folder


def find_base(base: Base, config: Config, moved: Path | None = None) -> Path:
    """Folder of `base`: `moved` (a folder, run or checkpoint) if given; else its recorded folder; if that is gone,
    `config.init.source`. ConfigError: not found, or another fingerprint."""
    init = config.init
    if moved is None and (Path(base.folder).is_dir() or init is None):
        return check_base(base)
    source = init.source if moved is None and init is not None else moved
    assert source is not None
    try:
        folder = resolve_weights(source, init.weights if init else "ema")
    except (ConfigError, CheckpointError) as error:
        prefix = f"the base weights in {base.folder} are gone, and init.source" if moved is None else "base"
        raise ConfigError(f"{prefix} {source}: {error}; {MOVED_HINT}") from error
    return check_base(base, folder)


def load_base(folder: Path, config: Config) -> tuple[STDiT, str]:
    """The model of `config` with the weights of `folder`, and the transfer report. ConfigError: they do not fit it."""
    try:
        source = load_merged(folder)
        check_finite(source.named_parameters(), "its weights")
        model, report = transfer_weights(
            source.float(), config.model, config.init.allow if config.init else (), config.seed
        )
    except ValueError as error:
        raise ConfigError(f"init.source {folder}: {error}") from error
    return model, f"weights from {folder}\n{report}"


def load_merged(folder: Path) -> STDiT:
    """Model in `folder`: a diffusers folder, or LoRA adapters of a run, merged into their base."""
    if not lora.is_adapter(folder):
        return STDiT.from_pretrained(folder)
    model, _ = load_trained(folder)
    lora.merge_adapters(model, keep=False)
    return model.requires_grad_(True)


# ---------------------------------------------------------------------------------------- training


def load_trainable(base: STDiT, trained: Path, config: Config) -> STDiT | Controlled:
    """`add_trainable`, with adapters or branch from the folder `trained`."""
    model = add_trainable(base, config.train, config.seed)
    assert not isinstance(model, Aligned)
    if isinstance(model, Controlled):
        model.control = STDiTControl.from_pretrained(trained)
    else:
        lora.restore_adapter(model, trained)
    return model


def save_trained(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Saves trained weights (by name) of `module` to `folder`, as a diffusers model (without the head of an alignment)
    or a LoRA adapter."""
    if isinstance(module, Aligned):
        own = {name.removeprefix("base."): weight for name, weight in state.items() if name.startswith("base.")}
        _save(STDiT, module.base.config, own, folder)
    elif isinstance(module, Controlled):
        own = {name.removeprefix("control."): weight for name, weight in state.items()}
        _save(STDiTControl, module.control.config, own, folder)
    elif isinstance(module, STDiT) and lora.adapter_names(module):
        lora.save_adapter(module, folder, state=state)
    else:
        assert isinstance(module, STDiT)
        _save(STDiT, module.config, state, folder)


def save_head(state: dict[str, Tensor], checkpoint: Path) -> None:
    """Writes the head of an alignment into a checkpoint's folder, from all trained weights (by name)."""
    save_file({name: weight for name, weight in state.items() if name.startswith("head.")}, checkpoint / HEAD)


def load_head(model: Aligned, checkpoint: Path) -> None:
    """Sets the head's weights to those in a checkpoint's folder."""
    found = load_file(checkpoint / HEAD)
    model.head.load_state_dict({name.removeprefix("head."): weight for name, weight in found.items()})


def _save(kind: type[STDiT], settings: Any, state: dict[str, Tensor], folder: Path) -> None:
    with torch.device("meta"):
        # Without the path that the weights were loaded from.
        shell: STDiT = kind.from_config({k: v for k, v in dict(settings).items() if k != "_name_or_path"})
    shell.load_state_dict(state, assign=True)
    shell.save_pretrained(folder)


# ----------------------------------------------------------------------------------------- loading


def load_trained(
    folder: Path, base: Path | None = None, dtype: torch.dtype | None = None
) -> tuple[STDiT, STDiTControl | None]:
    """Model, and control branch if any, of a checkpoint's weights `folder` (transformer_ema, lora, …). A LoRA adapter
    is named `default`.

    base: where the base is, if neither in its recorded folder nor in the run's init.source. ConfigError: not found, or
    changed. ValueError: a damaged file.
    """
    identity = load_identity(folder.parent)
    kind = checkpoint.trained_kind(identity)
    if kind == "transformer":
        return STDiT.from_pretrained(folder, torch_dtype=dtype), None
    config = validate(identity["config"], Config, f"{folder.parent}: identity.json: config")
    model, _ = load_base(find_base(Base(**identity["base"]), config, base), config)
    if kind == "lora":
        lora.load_adapter(model, folder, lora.TRAINED)
        return model.to(dtype) if dtype else model, None
    control = STDiTControl.from_pretrained(folder, torch_dtype=dtype)
    return model.to(dtype) if dtype else model, control


def resolve_weights(source: Path, weights: Weights) -> Path:
    """Weights folder of `source`: itself, or that of a run or checkpoint. ConfigError: there is none."""
    if (source / "config.json").is_file() or lora.is_adapter(source):
        return source
    folder = checkpoint.find_weights(source, weights)
    if checkpoint.trained_kind(checkpoint.identity_beside(folder)) == "control":
        raise ConfigError(
            f"{source} trained a control branch, not a model; start from its base, {checkpoint.identity_beside(folder)['base']['folder']}"
        )
    return folder


@contextmanager
def full_model(source: Path, weights: Weights = "ema") -> Iterator[Path]:
    """`source`; of a LoRA run, its checkpoint or its adapters, a temporary folder with them merged into their base; of
    a control run, the folder of its branch.

    ConfigError: a base that is gone or changed, no intact checkpoint.
    """
    try:
        kind = "lora" if lora.is_adapter(source) else checkpoint.trained_kind(checkpoint.read_identity(source))
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
    except (ConfigError, OSError):  # weights of others, which know no runs
        kind = "transformer"
    if kind == "transformer":
        yield source
        return
    if kind == "control":
        yield checkpoint.find_weights(source, weights)
        return
    model = load_merged(resolve_weights(source, weights))
    with tempfile.TemporaryDirectory(prefix="stdit-merged-") as folder:
        model.save_pretrained(folder)
        yield Path(folder)


def recorded_base(folder: Path) -> Base | None:
    """The base that the adapter in a checkpoint's `folder` was trained on; None for an adapter outside a checkpoint."""
    if not (folder.parent / checkpoint.IDENTITY).is_file():
        return None
    base = load_identity(folder.parent)["base"]
    return base and Base(**base)


def resolve_lora(source: Path, weights: Weights = "ema") -> Path:
    """Adapter folder of `source`: itself, or that of a LoRA run or checkpoint. ConfigError: there is none."""
    if lora.is_adapter(source):
        return source
    folder = checkpoint.find_weights(source, weights)
    if not lora.is_adapter(folder):
        raise ConfigError(
            f"{source}: no adapter here: this run trained the {checkpoint.trained_kind(checkpoint.identity_beside(folder))}"
        )
    return folder
