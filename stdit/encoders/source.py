"""Where an encoder's weights come from: a local folder or a hub id, and a fingerprint of what lies there.

A fingerprint is of content, never of times, so that it holds on another machine; large files are
sampled, so that 19 GB of T5-XXL cost milliseconds and not a minute.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from stdit.config import ConfigError

BLOCK_BYTES = 16 * 1024
BLOCKS = 64
# What decides an encoder: settings, weights, vocabulary. Not its README.
SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt"}
# HTTP's 40 hex digits that name a commit on the hub.
_COMMIT = re.compile(r"[0-9a-f]{40}")


def fingerprint_file(path: Path | str) -> str:
    """Hex SHA-256 of a file's size and content: all of it up to 1 MiB, beyond that 64 blocks of 16 KiB spread evenly.

    The first and the last block are always among them. OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "little"))
        if size <= BLOCK_BYTES * BLOCKS:
            digest.update(file.read())
        else:
            for block in range(BLOCKS):
                file.seek(block * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def fingerprint_folder(*folders: Path) -> str:
    """Hex SHA-256 over names and fingerprints of the settings, weights and vocabularies directly in `folders`."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file()):
            digest.update(f"{path.name}\0{fingerprint_file(path)}\n".encode())
    return digest.hexdigest()


def folder_of(path: str, key: str) -> Path | None:
    """The local folder that `path` names, or None where it can only be a hub id (owner/name).

    `key`: the setting, for messages. ConfigError: neither a folder that exists nor the form of a hub id.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local.resolve()
    if local.exists():
        raise ConfigError(f"{key}: {path} is a file; a folder with config.json and weights is needed")
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", path):
        raise ConfigError(f"{key}: {path}: no such folder")
    return None


def subfolder_of(folder: Path, subfolder: str | None, key: str) -> Path:
    """`folder/subfolder`, or `folder` without one. ConfigError: it is not there, or has no config.json (with a hint)."""
    place = folder / subfolder if subfolder else folder
    if not place.is_dir():
        raise ConfigError(f"{key}: {folder} has no subfolder {subfolder!r}")
    if not (place / "config.json").is_file():
        parts = sorted(p.parent.name for p in place.glob("*/config.json"))
        hint = f"; it has subfolders with one: {', '.join(parts)} (set {key.rpartition('.')[0]}.subfolder)" if parts else ""
        raise ConfigError(f"{key}: {place} has no config.json{hint}")
    return place


def hub_commit(path: str, subfolder: str | None, revision: str | None) -> str:
    """The commit that a hub id just loaded stands at, which serves as its fingerprint."""
    from huggingface_hub import try_to_load_from_cache

    name = f"{subfolder}/config.json" if subfolder else "config.json"
    cached = try_to_load_from_cache(path, name, revision=revision or "main")
    assert isinstance(cached, str), f"{path} was loaded from the hub but {name} is not in its cache"
    commit = Path(cached).relative_to(Path(cached).parents[1 + bool(subfolder) + 0]).parts[0]
    assert _COMMIT.fullmatch(commit), f"{cached} does not lie under a commit"
    return commit
