"""Files and folders of weights to named tensors, whoever wrote them.

Pickled files (.pt, .pth, .bin, .ckpt) are opened as weights alone: a pickle that would run code is refused, and its code
does not run. Checkpoints of training are unwrapped, and what wrappers of training put into names is taken out.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stdit.weights.layouts.layout import State, listed

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
# The files of a diffusers folder, the better one first.
HUB_FILES = tuple(
    f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")
)
# Under which keys checkpoints of training have the averaged weights, and the trained ones.
AVERAGED = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model")
TRAINED = ("state_dict", "model", "module", "model_state_dict", "net")
# What wrappers add before all names, or anywhere in one.
PREFIXES = ("module.", "model.", "net.", "ema_model.", "diffusion_model.", "transformer.")
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def read_source(source: Path, averaged: bool | None = None) -> tuple[State, dict[str, Any], str]:
    """The tensors of a file or folder, the config.json beside them ({} if there is none), and the name of what was read.

    averaged: of a checkpoint that has both, the averaged weights (True), the trained ones (False), or the averaged ones
    where there are any (None). ValueError: nothing there, damaged, refused, or nothing in it that weights could be.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    file = _weights_in(source, averaged) if source.is_dir() else source
    if source.is_dir() and (source / "transformer_ema").is_dir():  # which was the choice
        averaged = None
    config = file.parent / "config.json"
    found = read_config(config) if config.is_file() else {}
    if file.name.endswith(".index.json"):
        return _bare(_read_shards(file)), found, str(file)
    return _bare(_unwrapped(_read_file(file), str(file), averaged)), found, str(file)


def _weights_in(folder: Path, averaged: bool | None) -> Path:
    """The weights file, or the index of several, of a folder: diffusers', a pipeline's or one of our checkpoints with the
    transformer in it, or one with a single file."""
    for name in HUB_FILES:
        if (folder / name).is_file():
            return folder / name
    for name in ("transformer",) if averaged is False else ("transformer_ema", "transformer"):
        if (folder / name).is_dir():
            return _weights_in(folder / name, averaged)
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return indices[0]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    if not files:
        raise ValueError(
            f"{folder}: no weights in this folder ({', '.join(HUB_FILES)}, transformer/, or one {', '.join(SUFFIXES)} file)"
        )
    raise ValueError(f"{folder}: {len(files)} files of weights, name one of them: {', '.join(p.name for p in files)}")


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError: it cannot be read, or is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object, found {type(found).__name__}")
    return found


def _read_shards(index: Path) -> State:
    """All tensors that an index lists, from the files beside it."""
    places = read_config(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(p, str) for p in places.values()):
        raise ValueError(f"{index}: no weight_map in it, which says which file has which tensor")
    state: State = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise ValueError(f"{index}: {name}, which it lists, is not a file beside it")
        state |= _unwrapped(_read_file(shard), str(shard), None)
    missing, extra = [n for n in places if n not in state], [n for n in state if n not in places]
    if missing or extra:
        raise ValueError(
            f"{index}: not in the files that it lists: {listed(missing)}; not in the index: {listed(extra)}"
        )
    return state


def _read_file(path: Path) -> Any:
    """What a file holds: tensors by name, perhaps wrapped."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    if path.suffix not in PICKLED:
        raise ValueError(f"{path}: not a file of weights by its name ({', '.join(SUFFIXES)})")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        # DiT's own training script keeps its arguments in the file: plain values by name.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        if "Weights only load failed" not in reason:
            raise ValueError(f"{path}: not a whole file of weights ({reason})") from error
        told = next(
            (line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "invalid load key" in line), reason
        )
        raise ValueError(
            f"{path}: refused: it is damaged, or holds more than weights, such as code that opening it would run ({told}). "
            "If you trust it, save its state dict alone, where it was made, and convert that"
        ) from error
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        IndexError,
        TypeError,
        AssertionError,
    ) as error:
        raise ValueError(
            f"{path}: not a whole file of weights ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error


def _unwrapped(found: Any, where: str, averaged: bool | None) -> State:
    """The state dict in a checkpoint. ValueError: there is none, or it has values that are not tensors."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: expected tensors by name, found {type(found).__name__}")
    choices = [
        (any(key in AVERAGED for key in path), path, state)
        for path, state in _state_dicts(found, ())
        if averaged is None or averaged == any(key in AVERAGED for key in path)
    ]
    if not choices:
        wanted = {None: (*AVERAGED, *TRAINED), True: AVERAGED, False: TRAINED}[averaged]
        raise ValueError(
            f"{where}: no weights at the top or under {', '.join(wanted)}; keys: {listed(map(str, found))}"
        )
    _, path, state = max(choices, key=lambda choice: choice[0])  # the first of the averaged ones, or the first
    where = where + "".join(f"[{key!r}]" for key in path)
    others = [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{where}: among the weights are values that are no tensors: {listed(others)}")
    if absent := [str(name) for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"{where}: tensors on the meta device have a shape but no values: {listed(absent)}")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _state_dicts(
    found: Mapping[Any, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """The mappings of names to tensors in a checkpoint, with the keys that lead to each."""
    if any(isinstance(value, Tensor) and "." in str(name) for name, value in found.items()):
        yield path, found
        return
    for key in (*AVERAGED, *TRAINED):
        if isinstance(found.get(key), Mapping):
            yield from _state_dicts(found[key], (*path, key))


def _bare(state: State) -> State:
    """Names without what wrappers of training put before or into them."""
    bare = {re.sub("|".join(map(re.escape, INFIXES)), "", name): tensor for name, tensor in state.items()}
    prefix: str | None = ""
    while prefix is not None and bare:
        bare = {name.removeprefix(prefix): tensor for name, tensor in bare.items()}
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in bare)), None)
    return bare if len(bare) == len(state) else state
