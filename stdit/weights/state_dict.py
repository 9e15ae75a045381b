"""Reads state dicts from files and folders of any origin.

Pickled files (.pt, .pth, .bin, .ckpt) are read with weights_only: a pickle with code is refused, and the code does not
run. Training checkpoints are unwrapped, and the prefixes of training wrappers are removed from names.
"""

from __future__ import annotations

import argparse
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stdit.data.features import digest_of
from stdit.files import read_json
from stdit.integrity import IDENTITY, check_saved, verify
from stdit.weights.layouts.layout import State, format_names

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *PICKLED)
# The files of a diffusers folder, in order of preference.
DIFFUSERS_FILES = tuple(
    f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "safetensors.index.json", "bin", "bin.index.json")
)
# Folders of a pipeline or a checkpoint of ours.
TRANSFORMER, EMA_TRANSFORMER = "transformer", "transformer_ema"
# Keys of training checkpoints that hold the EMA weights, and the model's.
EMA_KEYS = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model")
MODEL_KEYS = ("state_dict", "model", "module", "model_state_dict", "net")
# Prefixes and infixes that training wrappers add to names.
PREFIXES = ("module.", "model.", "net.", "ema_model.", "diffusion_model.", "transformer.")
INFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# What a damaged or hostile file makes torch.load raise.
LOAD_ERRORS = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError, AttributeError, TypeError),
    *(AssertionError, ArithmeticError, MemoryError, struct.error, zipfile.BadZipFile),
)
# First bytes of files that are often saved or renamed in place of weights.
SIGNATURES = (
    (rb"\s*<(!doctype html|html)", "an HTML page, not weights: the download saved a web page in place of the file"),
    (rb"\s*<\?xml", "an XML file, not weights: the download probably saved an error message"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the weights themselves: run `git lfs pull`"),
    (rb"\x1f\x8b", "a gzip archive: unpack it"),
    (rb"GGUF", "a GGUF file, which is not supported"),
)


# Name of a checkpoint of a run.
STEP = re.compile(r"step-\d{8,}")


# In the metadata of .safetensors files that stdit writes: SHA-256 of names, types, shapes and bytes of the tensors.
DIGEST = "stdit_sha256"


class WeightsFile(NamedTuple):
    """A state dict, the config.json beside its file ({} if none), the file's path, and notes on which weights were
    taken."""

    state: State
    config: dict[str, Any]
    where: str
    notes: tuple[str, ...]


def read_state_dict(source: Path, ema: bool | None = None) -> WeightsFile:
    """Reads the state dict of a file or folder.

    Args:
        source: a file, a diffusers folder, a pipeline, a checkpoint of ours or a run directory.
        ema: of a checkpoint with both, the EMA weights (True), the model's (False), or EMA where present (None).

    Raises:
        ValueError: missing, damaged or unsafe file, or no weights in it.
    """
    if not source.exists():
        raise ValueError(f"{source}: no such file or folder")
    file = _find_weights(source, ema) if source.is_dir() else source
    notes: tuple[str, ...] = ()
    if file.parent not in (source, source.parent) and (file.parent.parent / EMA_TRANSFORMER).is_dir():
        ema = None  # the folder was the choice
        notes = (_choice_note(str(file.parent.parent), file.parent.name, (EMA_TRANSFORMER, TRANSFORMER)),)
    config_path = file.parent / "config.json"
    config = read_config(config_path) if config_path.is_file() else {}
    if file.name.endswith(".index.json"):
        return WeightsFile(_strip_wrappers(_read_shards(file)), config, str(file), notes)
    state, chosen = _unwrap(read_file(file), str(file), ema)
    return WeightsFile(_strip_wrappers(state), config, str(file), (*notes, *chosen))


def check_finite(weights: Iterable[tuple[str, Tensor]], where: str) -> None:
    """ValueError: a tensor holds NaN or infinity; names the first and counts the rest."""
    bad = [name for name, tensor in weights if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
        raise ValueError(f"{where}: {bad[0]}{more} hold NaN or infinity")


def _choice_note(where: str, taken: str, available: tuple[str, ...]) -> str:
    """Which of several weights was read."""
    return f"{where} has weights under {' and '.join(available)}: {taken} was taken (--weights ema or model chooses)"


def _find_weights(folder: Path, ema: bool | None) -> Path:
    """The weights file, or the index of a sharded one, of a folder: diffusers', a pipeline's, our checkpoint's or
    run's, or one with a single file."""
    for checkpoint in (folder, folder.parent):
        if (checkpoint / IDENTITY).is_file() and (reason := verify(checkpoint)):
            raise ValueError(f"{checkpoint}: {reason}")
    if not (folder / IDENTITY).is_file():
        check_saved(folder)
    if (folder.parent / "model_index.json").is_file():
        check_saved(folder.parent)
    for name in DIFFUSERS_FILES:
        if (folder / name).is_file():
            return folder / name
    for name in (TRANSFORMER,) if ema is False else (EMA_TRANSFORMER, TRANSFORMER):
        if (folder / name).is_dir():
            return _find_weights(folder / name, ema)
    checkpoints = [p.parent for p in folder.glob("checkpoints/*/manifest.json") if STEP.fullmatch(p.parent.name)]
    if checkpoints:  # the manifest is written last, so the checkpoint is complete
        return _find_weights(max(checkpoints, key=lambda path: int(path.name.removeprefix("step-"))), ema)
    for name in ("lora", "control"):
        if (folder / name).is_dir():
            raise ValueError(
                f"{folder}: a checkpoint of {name} training has no full model; its base is in identity.json "
                "(`stdit convert` takes the run)"
            )
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) == 1:
        return indices[0]
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in SUFFIXES)
    if len(files) == 1:
        return files[0]
    if not files:
        raise ValueError(
            f"{folder}: no weights in this folder ({', '.join(DIFFUSERS_FILES)}, transformer/, or one {', '.join(SUFFIXES)} file)"
        )
    raise ValueError(f"{folder}: {len(files)} weight files; give one of them: {', '.join(p.name for p in files)}")


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file. ValueError: unreadable, or not an object."""
    return read_json(path)


def _read_shards(index: Path) -> State:
    """All tensors of an index, from the shards beside it."""
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(p, str) for p in weight_map.values()):
        raise ValueError(f"{index}: no weight_map from tensors to files")
    state: State = {}
    for name in sorted(set(weight_map.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise ValueError(f"{index}: {name}, which it lists, is not a file in the same folder")
        state |= _unwrap(read_file(shard), str(shard), None)[0]
    missing, extra = [n for n in weight_map if n not in state], [n for n in state if n not in weight_map]
    if missing or extra:
        raise ValueError(
            f"{index}: not in the files that it lists: {format_names(missing)}; not in the index: {format_names(extra)}"
        )
    return state


def read_file(path: Path) -> Any:
    """A file's content: a state dict, or a checkpoint that holds one."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: not a weight file by its suffix ({', '.join(SUFFIXES)})")
    if not path.is_file():
        raise ValueError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    try:
        found, damaged = (_load_safetensors if path.suffix == ".safetensors" else _load_pickled)(path)
    except (SafetensorError, *LOAD_ERRORS) as error:
        raise ValueError(f"{path}: {_describe_failure(path, error)}") from error
    if damaged:
        raise ValueError(f"{path}: {damaged}: the file is damaged or was changed after it was written")
    return found


def write_safetensors(state: State, path: Path) -> None:
    """A .safetensors file with the digest of its tensors in its metadata, which `read_file` compares."""
    save_file(state, path, {DIGEST: digest_of(state)})


def _load_safetensors(path: Path) -> tuple[State, str]:
    """Tensors, and what is wrong with them by the file's own digest, if it has one; else ""."""
    with safe_open(path, "pt") as file:
        expected = (file.metadata() or {}).get(DIGEST)
    state = load_file(path)
    wrong = expected is not None and expected != digest_of(state)
    return state, f"its tensors do not match {DIGEST} in its metadata" if wrong else ""


def _load_pickled(path: Path) -> tuple[Any, str]:
    """Content, and which part of the file is damaged by its checksum, if any; else "". torch.load does not compare
    them."""
    # DiT's training script stores its argparse.Namespace in the checkpoint.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")
        found = torch.load(path, map_location="cpu", weights_only=True)
    if zipfile.is_zipfile(path):  # else of a torch before 1.6
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                # 0: saved without, by torch.serialization.set_crc32_options.
                if part.CRC and not _is_intact(archive, part):
                    return found, f"{part.filename} in it does not match its CRC-32"
    return found, ""


def _is_intact(archive: zipfile.ZipFile, part: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(part) as file:
            while file.read(2**24):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _describe_failure(path: Path, error: Exception) -> str:
    """Why a file could not be read, from its content. torch's own messages advise to load without weights_only."""
    with path.open("rb") as file:
        start = file.read(4096)
    for pattern, description in SIGNATURES:
        if re.match(pattern, start, re.IGNORECASE):
            return description
    if _is_text(start):
        return "a text file, not weights"
    if path.suffix == ".safetensors":
        return f"not a valid safetensors file: damaged or cut short ({error})"
    if re.match(rb".{6}\x00\x00\{", start, re.DOTALL):
        return "a safetensors file: give it the suffix .safetensors"
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            return "damaged or cut short: a PyTorch archive without its directory, which is at the end"
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
        except zipfile.BadZipFile as damage:
            return f"damaged: a PyTorch archive whose directory cannot be read ({damage})"
        if "constants.pkl" in names:
            return "a TorchScript archive, which is code: save the model's state dict instead"
        if "data.pkl" not in names:
            return "a zip archive without PyTorch's data.pkl: unpack it"
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"refused: damaged, or contains more than tensors, such as code that unpickling would run ({found[1]}). "
            "If you trust it, load it where it was written, save its state dict alone, and convert that"
        )
    return "not a valid weight file: damaged, or not written by torch.save"


def _is_text(start: bytes) -> bool:
    """Whether a file that starts with these bytes is text: UTF-8 (a last character may be cut) without control
    codes."""
    text = start.decode(errors="ignore")
    return 0 <= len(start) - len(text.encode()) < min(4, len(start)) and all(
        c.isprintable() or c.isspace() for c in text
    )


def _unwrap(content: Any, where: str, ema: bool | None) -> tuple[State, tuple[str, ...]]:
    """The state dict of a checkpoint, and a note where it has several.

    ValueError: there is none, or it has values that are not tensors.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a state dict, found {type(content).__name__}")
    available = [(any(key in EMA_KEYS for key in path), path, state) for path, state in _state_dicts(content, ())]
    choices = [choice for choice in available if ema is None or ema == choice[0]]
    if not choices:
        keys = {None: (*EMA_KEYS, *MODEL_KEYS), True: EMA_KEYS, False: MODEL_KEYS}[ema]
        raise ValueError(
            f"{where}: no weights at the top level or under {', '.join(keys)}; keys: {format_names(map(str, content))}"
        )
    _, path, state = max(choices, key=lambda choice: choice[0])  # the first EMA one, or the first
    names = tuple(".".join(keys) for _, keys, _ in available)
    notes = (_choice_note(where, ".".join(path), names),) if len(names) > 1 else ()
    where = where + "".join(f"[{key!r}]" for key in path)
    if others := [f"{name} ({type(value).__name__})" for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{where}: the state dict has values that are not tensors: {format_names(others)}")
    if meta := [str(name) for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"{where}: tensors on the meta device have no values: {format_names(meta)}")
    return {str(name): tensor.detach() for name, tensor in state.items()}, notes


def _state_dicts(
    content: Mapping[Any, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """The state dicts in a checkpoint, each with the keys that lead to it."""
    if any(isinstance(value, Tensor) and "." in str(name) for name, value in content.items()):
        yield path, content
        return
    for key in (*EMA_KEYS, *MODEL_KEYS):
        if isinstance(content.get(key), Mapping):
            yield from _state_dicts(content[key], (*path, key))


def _strip_wrappers(state: State) -> State:
    """Removes the prefixes and infixes of training wrappers from names, unless names would collide."""
    stripped = {re.sub("|".join(map(re.escape, INFIXES)), "", name): tensor for name, tensor in state.items()}
    prefix: str | None = ""
    while prefix is not None and stripped:
        stripped = {name.removeprefix(prefix): tensor for name, tensor in stripped.items()}
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in stripped)), None)
    return stripped if len(stripped) == len(state) else state
