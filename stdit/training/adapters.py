"""What a run trains: the whole model, or, beside a frozen one (the base), adapters (LoRA) or a control branch.

A checkpoint holds what was trained, and says in identity.json which base it belongs to: its folder, and the fingerprint
of its weights. `open_trained` puts both together again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stdit.config import Config, ConfigError, validate
from stdit.files import fingerprint_files, sha256
from stdit.models import lora
from stdit.models.control import Controlled, STDiTControl
from stdit.models.stdit import STDiT
from stdit.training import checkpoint
from stdit.training.checkpoint import Weights
from stdit.weights.transfer import transfer_weights


def check_targets(config: Config) -> None:
    """ConfigError where train.lora names a layer that the model has not, with those that it has."""
    if config.train.lora is None:
        return
    kwargs = config.model.model_kwargs()
    with torch.device("meta"):
        model = STDiT(**kwargs)
    try:
        lora.chosen(model, config.train.lora.targets)
    except ValueError as error:
        raise ConfigError(f"train.lora.targets: {error}") from error


# --------------------------------------------------------------------------------------------- base


@dataclass(frozen=True)
class Base:
    """The weights that adapters or a control branch belong to: where they lie, and the SHA-256 of what is there."""

    folder: str
    fingerprint: str


# How to say where a base lies that was moved.
WHERE = "say where they are now: with init.source to train on, with base to draw (base=…, or --set base=…)"


def base_of(folder: Path) -> Base:
    """The base that lies in `folder`."""
    return Base(str(folder.resolve()), fingerprint(folder))


def fingerprint(folder: Path) -> str:
    """Hex SHA-256 over the settings and weights in `folder`. ConfigError: there are none."""
    files = sorted(p for p in folder.glob("*") if p.suffix == ".safetensors" or p.name == "config.json")
    if not any(p.suffix == ".safetensors" for p in files):
        raise ConfigError(f"{folder}: holds no weights (*.safetensors)")
    return fingerprint_files(files, sha256)


def check_base(base: Base, found: Path | None = None) -> Path:
    """The folder of `base`, or of it as it now lies in `found`. ConfigError: gone, or not what it was."""
    folder = found or Path(base.folder)
    if not folder.is_dir():
        raise ConfigError(f"the base weights in {folder} are gone; {WHERE}")
    if (now := fingerprint(folder)) != base.fingerprint:
        raise ConfigError(
            f"the base weights in {folder} are not those that were trained on: fingerprint {now[:12]}…, then {base.fingerprint[:12]}…"
        )
    return folder


def find_base(base: Base, config: Config, moved: Path | None = None) -> Path:
    """The folder of `base`: in `moved` (as `weights_of` reads it), if given; else where it lay, or, where that is gone, what
    `config.init.source` means now. Its fingerprint is checked. ConfigError: nowhere, or not what it was."""
    init = config.init
    if moved is None and (Path(base.folder).is_dir() or init is None):
        return check_base(base)
    source = init.source if moved is None and init is not None else moved
    assert source is not None
    try:
        folder = weights_of(source, init.weights if init else "ema")
    except (ConfigError, checkpoint.CheckpointError) as error:
        gone = f"the base weights in {base.folder} are gone, and init.source" if moved is None else "base"
        raise ConfigError(f"{gone} {source}: {error}; {WHERE}") from error
    return check_base(base, folder)


def open_base(folder: Path, config: Config) -> tuple[STDiT, str]:
    """The model of `config` with the weights of `folder`, and the transfer report. ConfigError: they do not fit it."""
    try:
        model, report = transfer_weights(
            open_whole(folder).float(), config.model, config.init.allow if config.init else (), config.seed
        )
    except ValueError as error:
        raise ConfigError(f"init.source {folder}: {error}") from error
    return model, f"weights from {folder}\n{report}"


def open_whole(folder: Path) -> STDiT:
    """The model in `folder`: a diffusers folder, or adapters of a run, which are merged into their base."""
    if not lora.is_adapter(folder):
        return STDiT.from_pretrained(folder)
    model, _ = open_trained(folder)
    lora.merge(model, keep=False)
    return model.requires_grad_(True)


# ------------------------------------------------------------------------------- making, resuming


def begin(base: STDiT, config: Config) -> STDiT | Controlled:
    """What is handed to the engine: `base`, frozen but for new adapters or beside a new branch, if the config has one."""
    if (wanted := config.train.lora) is not None:
        lora.add(base, wanted.rank, wanted.targets, wanted.alpha, wanted.dropout, config.seed)
        return base
    if (control := config.train.control) is not None:
        return Controlled(base, STDiTControl.of(base, control.blocks, seed=config.seed))
    return base


def resume(base: STDiT, trained: Path, config: Config) -> STDiT | Controlled:
    """`begin`, with the adapters or the branch that lie in the folder `trained`."""
    model = begin(base, config)
    if isinstance(model, Controlled):
        model.control = STDiTControl.from_pretrained(trained)
    else:
        lora.restore(model, trained)
    return model


def parts(model: nn.Module) -> list[STDiT]:
    """The diffusers models that `model` is made of."""
    return [model.base, model.control] if isinstance(model, Controlled) else [model]  # pyright: ignore


def write(module: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """A folder of what was trained, from its weights by name: a diffusers model, or an adapter."""
    if isinstance(module, Controlled):
        own = {name.removeprefix("control."): weight for name, weight in state.items()}
        _save(STDiTControl, module.control.config, own, folder)
    elif isinstance(module, STDiT) and lora.names(module):
        lora.write(module, folder, state=state)
    else:
        assert isinstance(module, STDiT)
        _save(STDiT, module.config, state, folder)


def _save(kind: type[STDiT], settings: Any, state: dict[str, Tensor], folder: Path) -> None:
    with torch.device("meta"):
        shell: STDiT = kind.from_config(dict(settings))
    shell.load_state_dict(state, assign=True)
    shell.save_pretrained(folder)


# ------------------------------------------------------------------------------------ afterwards


def open_trained(
    folder: Path, base: Path | None = None, dtype: torch.dtype | None = None
) -> tuple[STDiT, STDiTControl | None]:
    """The model of a checkpoint's `folder` (transformer_ema, lora, …): with its adapter, called `default`; with its branch.

    base: where the base lies now, if neither where it lay nor where the run's init.source says. ConfigError: it is gone or
    changed. ValueError: a damaged file.
    """
    identity = json.loads((folder.parent / checkpoint.IDENTITY).read_text())
    kind = checkpoint.trained(identity)
    if kind == "transformer":
        return STDiT.from_pretrained(folder, torch_dtype=dtype), None
    config = validate(identity["config"], Config, f"{folder.parent}: identity.json: config")
    model, _ = open_base(find_base(Base(**identity["base"]), config, base), config)
    if kind == "lora":
        lora.read(model, folder, lora.TRAINED)
        return model.to(dtype) if dtype else model, None
    control = STDiTControl.from_pretrained(folder, torch_dtype=dtype)
    return model.to(dtype) if dtype else model, control


def weights_of(source: Path, weights: Weights) -> Path:
    """The folder of weights that `source` means: itself, or that of a run or checkpoint. ConfigError: there is none."""
    if (source / "config.json").is_file() or lora.is_adapter(source):
        return source
    folder = checkpoint.trained_folder(source, weights)
    if checkpoint.trained(checkpoint.identity_beside(folder)) == "control":
        raise ConfigError(
            f"{source} trained a control branch, which is no whole model; begin from its base, {checkpoint.identity_beside(folder)['base']['folder']}"
        )
    return folder


def lora_folder(source: Path, weights: Weights = "ema") -> Path:
    """The folder of the adapter that `source` means: itself, or that of a LoRA run or checkpoint. ConfigError: there is none."""
    if lora.is_adapter(source):
        return source
    folder = checkpoint.trained_folder(source, weights)
    if not lora.is_adapter(folder):
        raise ConfigError(
            f"{source}: no adapter here: this run trained the {checkpoint.trained(checkpoint.identity_beside(folder))}"
        )
    return folder
