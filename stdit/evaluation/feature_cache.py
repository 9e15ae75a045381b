"""Features of a set of media, computed once: in chunks, each a file, so that work is resumed and shared between
workers.

    job = FeatureJob(network, media, cache)
    compute_features(job)                      # what is missing, in this process
    features = load_features(job)              # {"features": (n, D)}

A chunk's file is named by the network, its preprocessing and the contents of its media, so nothing else invalidates it.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from stdit.console import printable
from stdit.data.features import digest_of
from stdit.evaluation.media_set import MediaSet, Medium
from stdit.evaluation.networks import Network
from stdit.files import atomic_path

CHUNK = 64  # media
# Incremented when features of the same pixels, or what their files hold, change.
VERSION = 3
# Metadata of a chunk: SHA-256 of its arrays.
DIGEST = "sha256"


@dataclass(frozen=True)
class FeatureJob:
    """Features of `media` by `network`, kept below `cache`. Small enough to send to a worker."""

    network: Network
    media: MediaSet
    cache: Path
    threads: int = 1

    def chunk(self, number: int) -> Sequence[Medium]:
        return self.media.media[number * CHUNK : (number + 1) * CHUNK]

    def file(self, number: int) -> Path:
        listed = [[m.fingerprint, m.prompt] for m in self.chunk(number)]
        key = json.dumps([VERSION, self.network.digest, self.media.shape, self.media.crop, listed])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        return self.cache / f"{self.network.key}-{self.network.digest[:16]}" / f"{name}.safetensors"

    def missing(self) -> list[int]:
        """Chunks that have no file yet."""
        return [n for n in range(-(-len(self.media) // CHUNK)) if not self.file(n).is_file()]


def compute_chunk(job: FeatureJob, number: int) -> None:
    """Computes and writes one chunk. ValueError: a file that cannot be decoded, features that are not finite."""
    if job.network.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda, but torch finds no GPU here")
    before = torch.get_num_threads()
    torch.set_num_threads(job.threads)
    found: dict[str, list[NDArray[np.float32]]] = {}
    try:
        media = job.chunk(number)
        for medium, frames in zip(media, job.media.frames(media), strict=True):
            for name, row in job.network.rows(frames, medium.prompt).items():
                if not np.isfinite(row).all():
                    raise ValueError(f"{medium.file}: features of {job.network.key} are not finite (NaN or infinity)")
                found.setdefault(name, []).append(row)
    finally:
        torch.set_num_threads(before)
    # A row for each medium, or none: some have no prompt.
    arrays = {name: np.stack(rows) for name, rows in found.items() if len(rows) == len(media)}
    with atomic_path(job.file(number)) as part:
        save_file(arrays, part, {DIGEST: _digest(arrays)})


def compute_features(job: FeatureJob) -> None:
    """Computes the missing chunks in this process, with a progress bar and the time left."""
    from tqdm import tqdm

    missing = job.missing()
    with tqdm(total=len(missing) * CHUNK, desc=printable(f"{job.network.key} of {job.media.source.name}"), unit="media",
              disable=not (missing and sys.stderr.isatty())) as bar:  # fmt: skip
        for number in missing:
            compute_chunk(job, number)
            bar.update(CHUNK)


def load_features(job: FeatureJob) -> dict[str, NDArray[np.float32]]:
    """Rows of all media, (n, D) by name; only names that every chunk has. ValueError: a damaged file."""
    chunks = [_load_chunk(job.file(n)) for n in range(-(-len(job.media) // CHUNK))]
    names = set.intersection(*(set(chunk) for chunk in chunks))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in sorted(names)}


def _load_chunk(file: Path) -> dict[str, NDArray[np.float32]]:
    try:
        with safe_open(file, "numpy") as opened:
            stored = (opened.metadata() or {}).get(DIGEST)
        found = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged ({error}); remove it, and its features are computed again") from error
    if stored != _digest(found):
        raise ValueError(
            f"{file}: damaged (its features do not match its sha256); remove it, and its features are computed again"
        )
    return found


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    return digest_of({name: torch.from_numpy(array) for name, array in arrays.items()})
