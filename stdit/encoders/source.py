"""Where an encoder's weights come from: a local folder or a hub id, and a fingerprint of what lies there.

A fingerprint is of content, never of times, so that it holds on another machine; large files are
sampled, so that 19 GB of T5-XXL cost milliseconds and not a minute.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stdit.config import ConfigError
from stdit.files import fingerprint_files

# What decides an encoder: settings, weights, vocabulary. Not its README.
SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".txt"}
# What an identity says that has no part in the features.
UNCHECKED = {"path", "frames_at_once"}
# Where the hub's cache keeps one commit of a repository.
_COMMIT_LENGTH = 40
_COMMIT = re.compile(r"/snapshots/([0-9a-f]{40})/")


def fingerprint_folder(*folders: Path) -> str:
    """Fingerprint of the settings, weights and vocabularies directly in `folders`."""
    return fingerprint_files(
        path
        for folder in folders
        for path in sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    )


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
    """`folder/subfolder`, or `folder` without one. ConfigError: it is not there, or has no config.json (with a
    hint)."""
    place = folder / subfolder if subfolder else folder
    if not place.is_dir():
        raise ConfigError(f"{key}: {folder} has no subfolder {subfolder!r}")
    if not (place / "config.json").is_file():
        parts = sorted(p.parent.name for p in place.glob("*/config.json"))
        hint = (
            f"; it has subfolders with one: {', '.join(parts)} (set {key.rpartition('.')[0]}.subfolder)"
            if parts
            else ""
        )
        raise ConfigError(f"{key}: {place} has no config.json{hint}")
    return place


def hub_commit(path: str, subfolder: str | None, revision: str | None) -> str:
    """The commit that a hub id stands at (the one in the cache, where there is no network): its fingerprint.

    OSError: not on the hub, or no config.json there.
    """
    from huggingface_hub import hf_hub_download

    cached = hf_hub_download(path, "config.json", subfolder=subfolder, revision=revision)
    commit = _COMMIT.search(cached)
    assert commit, f"{cached} does not lie under a commit"
    return commit[1]


def revision_of(identity: dict[str, Any], path: str | None) -> str | None:
    """The hub's commit to load so that the weights are those of `identity`; None for a local folder, or no folder at
    all."""
    if path is None or Path(path).expanduser().is_dir():
        return None
    return identity["fingerprint"] if len(identity["fingerprint"]) == _COMMIT_LENGTH else None


def check_same(then: dict[str, Any], now: dict[str, Any], what: str) -> None:
    """ConfigError where the encoder `now` is not the one whose identity was `then`; says what differs.

    The path may differ, and how many frames are encoded at once. So may a hub's commit from the fingerprint of a
    local folder: neither tells of the other.
    """
    lengths = {len(identity["fingerprint"] or "") for identity in (then, now)}
    unchecked = {*UNCHECKED, "fingerprint"} if len(lengths) == 2 and _COMMIT_LENGTH in lengths else UNCHECKED
    changed = [key for key in then if key not in unchecked and then[key] != now.get(key)]
    if changed:
        found = "; ".join(f"{key}: {then[key]} then, {now.get(key)} now" for key in changed)
        raise ConfigError(f"{what} is not the one that these features were made with: {found}")
