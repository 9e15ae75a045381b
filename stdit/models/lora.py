"""Low-rank adapters (Hu et al. 2021, LoRA) through peft: W x + scale · alpha / rank · B A x, with B at zero at the start.

    add(model, rank=8, seed=0)                 the model is frozen, and A and B of every target are trained
    write(model, folder)                       pytorch_lora_weights.safetensors, as diffusers' save_lora_adapter has it
    read(other, folder, "style", scale=0.8)    beside other adapters; their sum is what the model then adds
    merge(other) · remove(other)               into the weights, and away again, to the last bit

A target is the name of a linear layer, or the end of one: `attn.qkv` is that of every block.
"""

from __future__ import annotations

import json
import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stdit.models.attention import Attention, CrossAttention
from stdit.models.stdit import STDiT

# The name of the adapter that training adds.
TRAINED = "default"
# Where the weights that `merge` has changed are kept for `remove`.
_KEPT = "_unmerged_weights"


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can have an adapter, or has, by its whole name."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def targets(model: nn.Module) -> list[str]:
    """What may be called a target: the names of linear layers, those of all blocks once, without `blocks.N`."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in layers(model)))


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the projections of every attention: queries, keys, values and output."""
    parts = [name for name, module in model.named_modules() if isinstance(module, Attention | CrossAttention)]
    return [name for name in layers(model) if name.rpartition(".")[0] in parts]


def chosen(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Names of the layers that `wanted` means (None: every attention's). ValueError: one that means none; what there is."""
    if wanted is None:
        return attention_layers(model)
    names = layers(model)
    found = {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in wanted}
    if absent := [target for target, of in found.items() if not of]:
        raise ValueError(f"no linear layer is called {', '.join(absent)}; there are {', '.join(targets(model))}")
    meant = {name for of in found.values() for name in of}
    return [name for name in names if name in meant]


# ------------------------------------------------------------------------------- training, files


def add(
    model: STDiT,
    rank: int,
    wanted: Sequence[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freezes `model` and gives it adapters to train, drawn from `seed`. alpha: None for the rank (a factor of 1).

    ValueError: a target that is none. torch's global random state is left alone.
    """
    names = chosen(model, wanted)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, target_modules=names)  # pyright: ignore
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.add_adapter(config, TRAINED)


def write(model: STDiT, folder: Path, name: str = TRAINED, state: dict[str, Tensor] | None = None) -> None:
    """Writes adapter `name` as diffusers' save_lora_adapter does. state: its weights by their names in the model, where the
    model's own are not whole (ZeRO)."""
    held: Mapping[str, Tensor] = get_peft_model_state_dict(model, state_dict=state, adapter_name=name)  # pyright: ignore
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in _configs(model)[name].to_dict().items()}
    told = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.detach().contiguous().cpu() for k, v in held.items()}, folder / LORA_WEIGHT_NAME_SAFE, told)


@torch.no_grad()
def restore(model: STDiT, folder: Path) -> None:
    """The adapter in `folder` into the one that `add` made. ValueError: it is not of the same layers and rank."""
    held, own = load_file(folder / LORA_WEIGHT_NAME_SAFE), dict(model.named_parameters())
    into = {name: name.replace(".weight", f".{TRAINED}.weight") for name in held}
    wanted = {name for name, parameter in own.items() if parameter.requires_grad}
    if set(into.values()) != wanted or any(own[into[n]].shape != weight.shape for n, weight in held.items()):
        raise ValueError(f"{folder}: not the adapter that this config trains (other layers, or another rank)")
    for name, weight in held.items():
        own[into[name]].copy_(weight)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, as `write` or diffusers leaves it."""
    return (folder / LORA_WEIGHT_NAME_SAFE).is_file()


def read(model: STDiT, folder: Path, name: str, scale: float = 1.0) -> None:
    """Gives `model` the adapter in `folder`, called `name`, active beside those that are active.

    ValueError: no adapter there; one of other layers or widths, which are listed; a name that is taken or has a dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"adapter name {name!r}: expected letters, digits, _ and -")
    if name in _configs(model):
        raise ValueError(f"adapter name {name!r} is taken; there are {', '.join(_configs(model))}")
    if merged(model):
        raise ValueError(
            f"{folder}: adapters are merged into the weights; unmerge or remove them before adding another"
        )
    if not math.isfinite(scale):  # before anything is loaded
        raise ValueError(f"adapter {name}: scale {scale}; expected a finite number")
    _check_file(model, folder / LORA_WEIGHT_NAME_SAFE)
    scales, training = active(model), model.training
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    with _quiet():
        cast(Any, model).load_lora_adapter(folder, prefix=None, adapter_name=name, use_safetensors=True)
    stack(model, {**scales, name: scale})
    for parameter in model.parameters():
        if id(parameter) in trained:  # peft has frozen it
            parameter.requires_grad_(True)
    model.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what peft and diffusers say of a second adapter: that there is one, and that its file lacks the first."""
    loud = logging.getLogger("diffusers.utils.peft_utils")
    before = loud.level
    loud.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        loud.setLevel(before)


def _check_file(model: STDiT, file: Path) -> None:
    """ValueError where the adapter in `file` is not one of `model`'s layers."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: no adapter here ({file.name})")
    try:
        with safe_open(file, framework="pt") as held:
            shapes = {name: tuple(held.get_slice(name).get_shape()) for name in held.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    known = layers(model)
    wrong: list[str] = []
    for key, shape in shapes.items():
        name, _, part = key.partition(".lora_")
        layer: Any = known.get(name)
        if layer is None or part not in ("A.weight", "B.weight"):
            wrong.append(f"{key}: no such layer")
        elif shape[int(part[0] == "A")] != (layer.in_features if part[0] == "A" else layer.out_features):
            wide = (layer.out_features, layer.in_features)
            wrong.append(f"{key} has shape {shape}; the layer's weight has {wide}")
    if wrong or not shapes:
        lines = "\n  ".join(wrong[:20] or ["it is empty"])
        raise ValueError(f"{file}: not an adapter of this model\n  {lines}")


# ---------------------------------------------------------------------------------- several at once


def _configs(model: STDiT) -> dict[str, Any]:
    return getattr(model, "peft_config", None) or {}


def _adapted(model: STDiT) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def names(model: STDiT) -> list[str]:
    """Adapters that the model has, in the order in which they came."""
    return list(_configs(model))


def active(model: STDiT) -> dict[str, float]:
    """Adapters that are added, and by how much."""
    found: dict[str, float] = {}
    for layer in _adapted(model).values():
        for name in layer.active_adapters:
            if name in layer.scaling:
                found[name] = layer.scaling[name] * layer.r[name] / layer.lora_alpha[name]
    return {name: found[name] for name in names(model) if name in found}


def stack(model: STDiT, scales: Mapping[str, float]) -> None:
    """Makes these adapters the ones that are added, each times its scale; others stay in wait. ValueError: one there is not."""
    if absent := [name for name in scales if name not in _configs(model)]:
        raise ValueError(f"no adapter {', '.join(absent)}; there are {', '.join(names(model)) or 'none'}")
    if wrong := [f"{name} {scale}" for name, scale in scales.items() if not math.isfinite(scale)]:
        raise ValueError(f"scales of adapters are finite numbers; found {', '.join(wrong)}")
    if merged(model):
        raise ValueError("adapters are merged into the weights; unmerge them before choosing others")
    for layer in _adapted(model).values():
        # In the order in which they came, so that sums are taken in one order.
        here = [name for name in names(model) if name in scales and name in layer.scaling]
        # Not its inference mode: by whether weights want gradients torch chooses how products are taken.
        layer.set_adapter(here)
        for name in here:
            layer.scaling[name] = scales[name] * layer.lora_alpha[name] / layer.r[name]


def merged(model: STDiT) -> list[str]:
    """Adapters that are in the weights."""
    return list(dict.fromkeys(name for layer in _adapted(model).values() for name in layer.merged_adapters))


@torch.no_grad()
def merge(model: STDiT, keep: bool = True) -> None:
    """Adds the active adapters into the weights, where they cost nothing; what they change is kept beside.

    keep: False forgets the weights as they were, and the adapters: a plain model is left. ValueError: nothing to merge.
    """
    if not active(model):
        raise ValueError("no adapter is active; load one first")
    if not merged(model):
        kept = {
            name: cast(Any, layer).get_base_layer().weight.detach().clone() for name, layer in _adapted(model).items()
        }
        setattr(model, _KEPT, kept if keep else {})
        for layer in _adapted(model).values():
            layer.merge()  # pyright: ignore[reportCallIssue]
    if not keep:
        _unwrap(model)


@torch.no_grad()
def unmerge(model: STDiT) -> None:
    """Takes merged adapters out of the weights, which are then as they were, to the last bit."""
    kept: dict[str, Tensor] = getattr(model, _KEPT, {})
    for name, layer in _adapted(model).items():
        if layer.merged_adapters:
            cast(Any, layer).get_base_layer().weight.data.copy_(kept[name])
            layer.merged_adapters.clear()
    setattr(model, _KEPT, {})


def remove(model: STDiT, some: Sequence[str] | None = None) -> None:
    """Takes adapters away (None: all), merged or not; the weights are then as they were, to the last bit."""
    gone = names(model) if some is None else list(some)
    if absent := [name for name in gone if name not in _configs(model)]:
        raise ValueError(f"no adapter {', '.join(absent)}; there are {', '.join(names(model)) or 'none'}")
    left, were_merged = {n: s for n, s in active(model).items() if n not in gone}, bool(merged(model))
    unmerge(model)
    if set(gone) == set(names(model)):
        _unwrap(model)
        return
    model.delete_adapters(gone)
    stack(model, left)
    if were_merged and left:
        merge(model)


def _unwrap(model: STDiT) -> None:
    """Plain layers in the adapted ones' place."""
    if _configs(model):
        model.unload_lora()
        model._hf_peft_config_loaded = False
    setattr(model, _KEPT, {})
