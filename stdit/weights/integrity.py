"""manifest.json of a checkpoint: the size and SHA-256 of each of its files, written last. What is read is what it lists.

reason = verify(run_dir / "checkpoints" / "step-00000020")    # None: every byte is as it was written
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stdit.config import ConfigError, FileSchema, NonNegative, Sha256, read_json
from stdit.files import sha256

MANIFEST, IDENTITY = "manifest.json", "identity.json"
# Threads that hash files; hashlib releases the GIL.
HASH_THREADS = 8
# Files that loaders of weights look for by name or suffix: an unlisted one could be read in place of what was written.
LOADED_SUFFIXES = (".json", ".safetensors", ".bin", ".pt", ".pth")


class FileEntry(FileSchema):
    size: NonNegative
    sha256: Sha256


class CheckpointManifest(FileSchema):
    """manifest.json. `sha256`: of `files`."""

    files: dict[str, FileEntry]
    sha256: Sha256


def digest(files: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's own entries."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """{file: {"size", "sha256"}} of a checkpoint. ValueError: no manifest, or one that is damaged or not ours."""
    file = checkpoint / MANIFEST
    if not file.is_file():
        raise ValueError(f"no {MANIFEST}: the save was interrupted")
    try:
        content = read_json(file, CheckpointManifest)
    except ConfigError as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error
    files = content["files"]
    if content["sha256"] != digest(files):
        raise ValueError(f"{MANIFEST} is damaged (its entries do not match its sha256)")
    if IDENTITY not in files:
        raise ValueError(f"{MANIFEST} is damaged (it does not list {IDENTITY})")
    return files


def verify(checkpoint: Path) -> str | None:
    """None if every file of `checkpoint` matches its manifest, and its folders of weights hold no other files that could be
    loaded; else the reason why it can't be used."""
    try:
        files = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size} bytes, its manifest says {entry['size']}"
    for folder in sorted({(checkpoint / name).parent for name in files} - {checkpoint}):
        for path in sorted(folder.iterdir()):
            if path.suffix in LOADED_SUFFIXES and (name := path.relative_to(checkpoint).as_posix()) not in files:
                return f"{name} is not listed in its manifest: it was added later; move it away"
    try:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for name, found in zip(files, pool.map(lambda n: sha256(checkpoint / n), files), strict=True):
                if found != files[name]["sha256"]:
                    return f"{name} is not what was written (sha256 {found[:12]}…, its manifest says {files[name]['sha256'][:12]}…)"
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    return None
