"""manifest.json of a checkpoint, a saved pipeline or a converted model: the size and SHA-256 of each of its files,
written last. What is read is what it lists.

reason = verify(run_dir / "checkpoints" / "step-00000020")    # None: every byte is as it was written
check_saved("weights/dit-xl")     # ValueError, if there is a manifest that it does not match
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

from stdit.config import ConfigError, FileSchema, NonNegative, Sha256, read_json
from stdit.files import atomic_write, fsync_folder, sha256

MANIFEST, IDENTITY = "manifest.json", "identity.json"
# Threads that hash files; hashlib releases the GIL.
HASH_THREADS = 8
# Files that loaders of weights and tokenizers look for by name or suffix: an unlisted one could be read in place of
# what was written.
LOADED_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt")


class FileEntry(FileSchema):
    size: NonNegative
    sha256: Sha256


class Manifest(FileSchema):
    """manifest.json. `sha256`: of `files`."""

    files: dict[str, FileEntry]
    sha256: Sha256


def digest(files: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's own entries."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(
    folder: Path, files: Iterable[Path], known: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
) -> None:
    """Writes the manifest of `files`, which are in `folder`. known: `sync_files` of some of them; the others are synced
    here."""
    files = sorted(files)
    content = dict(known) | sync_files(folder, [p for p in files if p.relative_to(folder).as_posix() not in known])
    for parent in {p.parent for p in files}:
        fsync_folder(parent)
    content = {name: content[name] for p in files if (name := p.relative_to(folder).as_posix())}
    atomic_write(folder / MANIFEST, json.dumps({"files": content, "sha256": digest(content)}, indent=1))


def sync_files(folder: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Syncs files in `folder` to disk; returns their entries of a manifest, by name in it."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return {
            p.relative_to(folder).as_posix(): entry for p, entry in zip(files, pool.map(_entry, files), strict=True)
        }


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def seal_model(folder: Path) -> None:
    """Writes the manifest of a folder with one model: its config and weights."""
    write_manifest(folder, (p for p in folder.iterdir() if p.suffix in LOADED_SUFFIXES and p.name != MANIFEST))


def is_manifest(folder: Path) -> bool:
    """Whether `folder` has a manifest of ours, whatever it lists."""
    try:
        read_manifest(folder, identity=False)
    except ValueError:
        return False
    return True


def check_saved(folder: Path) -> None:
    """ValueError unless a saved pipeline or model is what its manifest lists. Folders without a manifest pass."""
    if os.path.lexists(folder / MANIFEST) and (reason := verify(folder, identity=False)):
        raise ValueError(f"{folder}: {reason}. If it was changed on purpose, remove its {MANIFEST}")


def read_manifest(folder: Path, identity: bool = True) -> dict[str, dict[str, Any]]:
    """{file: {"size", "sha256"}}. identity: of a checkpoint, which has an identity.json.

    ValueError: no manifest, or one that is damaged or not ours.
    """
    file = folder / MANIFEST
    try:
        if not file.is_file():
            raise ValueError(f"no {MANIFEST}: the save was interrupted")
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror})") from error
    try:
        content = read_json(file, Manifest)
    except ConfigError as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    files = content["files"]
    if content["sha256"] != digest(files):
        raise ValueError(f"{MANIFEST} is damaged (its entries do not match its sha256)")
    if identity and IDENTITY not in files:
        raise ValueError(f"{MANIFEST} is damaged (it does not list {IDENTITY})")
    return files


def verify(folder: Path, identity: bool = True) -> str | None:
    """None if every file of `folder` matches its manifest, and the folders of weights hold no other files that could be
    loaded; else the reason why it can't be used. identity: as `read_manifest`."""
    try:
        files = read_manifest(folder, identity)
    except ValueError as error:
        return str(error)
    try:
        return _difference(folder, files)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"


def _difference(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The first difference between a folder and its manifest. OSError: a file cannot be read."""
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, its manifest says {entry['size']}"
    is_model = any(Path(name).parent == Path() and name.endswith(".safetensors") for name in files)
    for parent in sorted({(folder / name).parent for name in files} - (set() if is_model else {folder})):
        for path in sorted(parent.iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.suffix in LOADED_SUFFIXES and name not in files and name != MANIFEST:
                return f"{name} is not listed in its manifest: it was added later; move it away"
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        for name, found in zip(files, pool.map(lambda n: sha256(folder / n), files), strict=True):
            if found != files[name]["sha256"]:
                return f"{name} is not what was written (sha256 {found[:12]}…, its manifest says {files[name]['sha256'][:12]}…)"
    return None
