"""Low-rank adapters (Hu et al. 2021, LoRA) through peft: W x + scale · alpha / rank · B A x, with B initialised at
zero.

    add_adapter(model, rank=8, seed=0)                        freezes the model; A and B of every target layer train
    save_adapter(model, folder)                               pytorch_lora_weights.safetensors, as diffusers writes it
    load_adapter(other, folder, "style", scale=0.8)           several adapters add up
    merge_adapters(other), delete_adapters(other)             into the weights, and out again bit-exactly

A target is the name of a linear layer or its suffix: `attn.qkv` matches that of every block.
"""

from __future__ import annotations

import hashlib
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
from safetensors.torch import load_file, save
from torch import Tensor, nn

from stdit.files import parse_json
from stdit.models.attention import Attention, CrossAttention
from stdit.models.stdit import STDiT

# The name of the adapter that training adds.
TRAINED = "default"
# Metadata of a file: SHA-256 of its tensors and its peft config.
DIGEST_KEY = "stdit_sha256"
# Attribute that holds the unmerged weights between `merge_adapters` and `unmerge_adapters`.
_UNMERGED = "_unmerged_weights"


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer, with or without an adapter, by its full name."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def target_names(model: nn.Module) -> list[str]:
    """Names that can be targets: linear layers, those of the blocks once, without `blocks.N`."""
    return list(dict.fromkeys(re.sub(r"^blocks\.\d+\.", "", name) for name in linear_layers(model)))


def attention_layers(model: nn.Module) -> list[str]:
    """Names of the query, key, value and output projections of every attention."""
    parts = [name for name, module in model.named_modules() if isinstance(module, Attention | CrossAttention)]
    return [name for name in linear_layers(model) if name.rpartition(".")[0] in parts]


def match_targets(model: nn.Module, target_modules: Sequence[str] | None) -> list[str]:
    """Names of the layers that match (None: every attention's). ValueError: a target without a match, listing all
    names."""
    if target_modules is None:
        return attention_layers(model)
    names = linear_layers(model)
    found = {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in target_modules}
    if absent := [target for target, layers in found.items() if not layers]:
        raise ValueError(f"no linear layer is called {', '.join(absent)}; there are {', '.join(target_names(model))}")
    matched = {name for layers in found.values() for name in layers}
    return [name for name in names if name in matched]


# ------------------------------------------------------------------------------- training, files


def add_adapter(
    model: STDiT,
    rank: int,
    target_modules: Sequence[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> None:
    """Freezes `model` and adds a trainable adapter, initialised from `seed`. alpha: None for the rank (a factor of 1).

    ValueError: a target without a match. torch's global random state is left alone.
    """
    names = match_targets(model, target_modules)
    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, lora_dropout=dropout, target_modules=names)  # pyright: ignore
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.add_adapter(config, TRAINED)


def save_adapter(model: STDiT, folder: Path, name: str = TRAINED, state: dict[str, Tensor] | None = None) -> None:
    """Writes adapter `name` as diffusers' save_lora_adapter does. state: gathered weights by parameter name, where the
    model's own are partitioned (ZeRO)."""
    found: Mapping[str, Tensor] = get_peft_model_state_dict(model, state_dict=state, adapter_name=name)  # pyright: ignore
    weights = {k: v.detach().contiguous().cpu() for k, v in found.items()}
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in _configs(model)[name].to_dict().items()}
    write_adapter(folder, weights, json.dumps(config, indent=2, sort_keys=True))


def write_adapter(folder: Path, weights: dict[str, Tensor], text: str) -> None:
    """Writes an adapter's file. text: its peft config, as in the metadata of the file."""
    metadata = {"format": "pt", LORA_ADAPTER_METADATA_KEY: text, DIGEST_KEY: _digest(weights, text)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LORA_WEIGHT_NAME_SAFE).write_bytes(_with_sorted_metadata(save(weights, metadata)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file with its metadata in order: safetensors writes several entries in an order that differs from
    call to call, and equal adapters would have unequal bytes."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _digest(weights: Mapping[str, Tensor], config: str | None) -> str:
    """SHA-256 of an adapter's tensors (names, types, shapes, bytes) and of its peft config."""
    digest = hashlib.sha256((config or "").encode())
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def restore_adapter(model: STDiT, folder: Path) -> None:
    """Loads the adapter in `folder` into the one being trained. ValueError: other layers, or another rank."""
    try:
        weights, own = load_file(folder / LORA_WEIGHT_NAME_SAFE), dict(model.named_parameters())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / LORA_WEIGHT_NAME_SAFE}: cannot be read ({error})") from error
    into = {name: name.replace(".weight", f".{TRAINED}.weight") for name in weights}
    trained = {name for name, parameter in own.items() if parameter.requires_grad}
    if set(into.values()) != trained or any(own[into[n]].shape != weight.shape for n, weight in weights.items()):
        raise ValueError(f"{folder}: not the adapter that this config trains (other layers, or another rank)")
    for name, weight in weights.items():
        own[into[name]].copy_(weight)


def is_adapter(folder: Path) -> bool:
    """Whether `folder` holds an adapter, as `save_adapter` or diffusers writes it."""
    return (folder / LORA_WEIGHT_NAME_SAFE).is_file()


def load_adapter(model: STDiT, folder: Path, name: str, scale: float = 1.0) -> None:
    """Adds the adapter in `folder` as `name`, active beside the active ones.

    ValueError: no adapter there; other layers or widths, which are listed; a name that is taken or has a dot.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(f"adapter name {name!r}: expected letters, digits, _ and -")
    if name in _configs(model):
        raise ValueError(f"adapter name {name!r} is taken; there are {', '.join(_configs(model))}")
    if merged_adapters(model):
        raise ValueError(
            f"{folder}: adapters are merged into the weights; unmerge or remove them before adding another"
        )
    if not math.isfinite(scale):  # before anything is loaded
        raise ValueError(f"adapter {name}: scale {scale}; expected a finite number")
    _check_file(model, folder / LORA_WEIGHT_NAME_SAFE)
    scales, training = active_adapters(model), model.training
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    with _quiet():
        # Without weight_name diffusers takes any file of the folder whose name ends so.
        cast(Any, model).load_lora_adapter(
            folder, prefix=None, adapter_name=name, use_safetensors=True, weight_name=LORA_WEIGHT_NAME_SAFE
        )
    set_adapters(model, {**scales, name: scale})
    for parameter in model.parameters():
        if id(parameter) in trained:  # peft has frozen it
            parameter.requires_grad_(True)
    model.train(training)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's and diffusers' warnings about a second adapter."""
    logger = logging.getLogger("diffusers.utils.peft_utils")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _check_file(model: STDiT, file: Path) -> None:
    """ValueError if the adapter in `file` does not fit `model`'s layers."""
    if not file.is_file():
        raise ValueError(f"{file.parent}: no adapter here ({file.name})")
    try:
        with safe_open(file, framework="pt") as file_weights:
            weights = {name: file_weights.get_tensor(name) for name in file_weights.keys()}  # noqa: SIM118
            metadata = file_weights.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    shapes, text = (
        {name: tuple(weight.shape) for name, weight in weights.items()},
        metadata.get(LORA_ADAPTER_METADATA_KEY),
    )
    targets = _recorded_layers(model, file, text)
    layers = linear_layers(model)
    wrong: list[str] = []
    for key, shape in shapes.items():
        name, _, part = key.partition(".lora_")
        layer: Any = layers.get(name)
        if layer is None or part not in ("A.weight", "B.weight"):
            wrong.append(f"{key}: no such layer")
        elif shape[int(part[0] == "A")] != (layer.in_features if part[0] == "A" else layer.out_features):
            expected = (layer.out_features, layer.in_features)
            wrong.append(f"{key} has shape {shape}; the layer's weight has {expected}")
        elif (other := shapes.get(f"{name}.lora_{'BA'[part[0] == 'B']}.weight")) is None:
            wrong.append(f"{key}: its other half is missing")
        elif part[0] == "A" and other[1] != shape[0]:
            wrong.append(f"{key} has rank {shape[0]}, its other half {other[1]}")
    wrong += [
        f"{name}: missing, though the adapter's own config names it"
        for name in sorted(targets - {key.partition(".lora_")[0] for key in shapes})
    ]
    if wrong or not shapes:
        lines = "\n  ".join(wrong[:20] or ["it is empty"])
        raise ValueError(f"{file}: not an adapter of this model\n  {lines}")
    if metadata.get(DIGEST_KEY, found := _digest(weights, text)) != found:
        raise ValueError(f"{file}: not what was written (its tensors do not match {DIGEST_KEY} in its metadata)")


def _recorded_layers(model: STDiT, file: Path, text: str | None) -> set[str]:
    """Full names of the layers that an adapter has, by the peft config in its metadata; empty where it does not say.

    ValueError: damaged metadata.
    """
    if text is None:
        return set()
    try:
        config = parse_json(text)
        targets = [] if config.get("layers_to_transform") or config.get("exclude_modules") else config["target_modules"]
    except (ValueError, AttributeError, KeyError) as error:
        raise ValueError(f"{file}: {LORA_ADAPTER_METADATA_KEY} in its metadata is damaged ({error})") from error
    # peft shortens many names to suffixes.
    suffixes = tuple(f".{name}" for name in targets) if isinstance(targets, list) else ()
    return {name for name in linear_layers(model) if f".{name}".endswith(suffixes)}


# ------------------------------------------------------------------------------- several adapters


def _configs(model: STDiT) -> dict[str, Any]:
    return getattr(model, "peft_config", None) or {}


def _lora_layers(model: STDiT) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_names(model: STDiT) -> list[str]:
    """Names of the model's adapters, in the order they were added."""
    return list(_configs(model))


def active_adapters(model: STDiT) -> dict[str, float]:
    """Active adapters and their scales."""
    found: dict[str, float] = {}
    for layer in _lora_layers(model).values():
        for name in layer.active_adapters:
            if name in layer.scaling:
                found[name] = layer.scaling[name] * layer.r[name] / layer.lora_alpha[name]
    return {name: found[name] for name in adapter_names(model) if name in found}


def set_adapters(model: STDiT, scales: Mapping[str, float]) -> None:
    """Activates these adapters with their scales, and deactivates the others. ValueError: an unknown adapter."""
    if absent := [name for name in scales if name not in _configs(model)]:
        raise ValueError(f"no adapter {', '.join(absent)}; there are {', '.join(adapter_names(model)) or 'none'}")
    if wrong := [f"{name} {scale}" for name, scale in scales.items() if not math.isfinite(scale)]:
        raise ValueError(f"scales of adapters are finite numbers; found {', '.join(wrong)}")
    if merged_adapters(model):
        raise ValueError("adapters are merged into the weights; unmerge them before choosing others")
    for layer in _lora_layers(model).values():
        # In the order they were added, so that sums are reproducible.
        here = [name for name in adapter_names(model) if name in scales and name in layer.scaling]
        # Not with inference_mode: requires_grad affects which matrix product torch picks.
        layer.set_adapter(here)
        for name in here:
            layer.scaling[name] = scales[name] * layer.lora_alpha[name] / layer.r[name]


def merged_adapters(model: STDiT) -> list[str]:
    """Adapters that are merged into the weights."""
    return list(dict.fromkeys(name for layer in _lora_layers(model).values() for name in layer.merged_adapters))


@torch.no_grad()
def merge_adapters(model: STDiT, keep: bool = True) -> None:
    """Merges the active adapters into the weights, where they cost nothing; the original weights are stored.

    keep: False drops the originals and the adapters: a plain model is left. ValueError: nothing to merge.
    """
    if not active_adapters(model):
        raise ValueError("no adapter is active; load one first")
    if not merged_adapters(model):
        original = {
            name: cast(Any, layer).get_base_layer().weight.detach().clone()
            for name, layer in _lora_layers(model).items()
        }
        setattr(model, _UNMERGED, original if keep else {})
        for layer in _lora_layers(model).values():
            layer.merge()  # pyright: ignore[reportCallIssue]
    if not keep:
        _unwrap(model)


@torch.no_grad()
def unmerge_adapters(model: STDiT) -> None:
    """Restores the weights from before merging, bit-exactly."""
    original: dict[str, Tensor] = getattr(model, _UNMERGED, {})
    for name, layer in _lora_layers(model).items():
        if layer.merged_adapters:
            cast(Any, layer).get_base_layer().weight.data.copy_(original[name])
            layer.merged_adapters.clear()
    setattr(model, _UNMERGED, {})


def delete_adapters(model: STDiT, some: Sequence[str] | None = None) -> None:
    """Deletes adapters (None: all), merged or not, and restores the weights bit-exactly."""
    gone = adapter_names(model) if some is None else list(some)
    if absent := [name for name in gone if name not in _configs(model)]:
        raise ValueError(f"no adapter {', '.join(absent)}; there are {', '.join(adapter_names(model)) or 'none'}")
    left, were_merged = {n: s for n, s in active_adapters(model).items() if n not in gone}, bool(merged_adapters(model))
    unmerge_adapters(model)
    if set(gone) == set(adapter_names(model)):
        _unwrap(model)
        return
    model.delete_adapters(gone)
    set_adapters(model, left)
    if were_merged and left:
        merge_adapters(model)


def _unwrap(model: STDiT) -> None:
    """Replaces LoRA layers by their plain base layers."""
    if _configs(model):
        model.unload_lora()
        model._hf_peft_config_loaded = False
    setattr(model, _UNMERGED, {})
