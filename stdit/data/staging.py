"""Features that are written to an object store: made in a staging folder of this machine, uploaded shard by shard, the
index last.

    staging = staging_of(config)         # None: `out` is a folder of this machine
    staging.pull()                       # what is at the URL: settings, records, index; shards stay there
    staging.push_shard(7)                # the shard, then its record, which completes it; removed here
    staging.push("index.json")

An object appears whole or not at all, and a shard counts once its record is there, so that an interrupted extraction
goes on from any machine. index.json is removed before the first change, and uploaded last: a reader sees complete
features or none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stdit.config import ConfigError, ExtractConfig, Url
from stdit.data import objects
from stdit.data.features import INDEX, REPORT, SAMPLES, shard_path
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import NoSuchObject
from stdit.data.records import record_path
from stdit.files import atomic_path, atomic_write

# Requests at a time.
REQUESTS = 16
# Names at the URL below which shards and records lie.
SHARDS, PARTS = "shards/", "parts/"
_RECORD = re.compile(r"parts/\d{5,}\.parquet")


@dataclass(frozen=True)
class Staging:
    """folder: where the features at `url` are made; what is missing there comes from the URL."""

    url: Url
    folder: Path

    def pull(self, settings: str) -> None:
        """Copies all but the shards from the URL, in place of what is here; a record stays whose shard was made here
        and is not uploaded yet.

        settings: the file that begins an extraction. ConfigError: the folder at the URL has other files and not this
        one. StoreError.
        """
        there = objects.listing(self.url)
        if there and settings not in there:
            raise ConfigError(
                f"out: {self.url} holds {next(iter(there))} and no extraction; features go into a folder of their own"
            )
        names = [name for name in there if name in (settings, INDEX, REPORT, SAMPLES) or _RECORD.fullmatch(name)]
        waiting = {record_path(self.folder, number).name for number in self._shards_here()}
        for path in (self.folder / "parts").glob("*"):
            if path.name not in waiting and f"{PARTS}{path.name}" not in there:
                path.unlink()
        for name in (settings, INDEX, REPORT, SAMPLES):
            if name not in there:
                (self.folder / name).unlink(missing_ok=True)
        with ThreadPoolExecutor(REQUESTS) as pool:
            list(pool.map(self._fetch, (name for name in names if name.removeprefix(PARTS) not in waiting)))

    def stored(self) -> dict[str, int]:
        """Sizes of the objects at the URL, by name."""
        return objects.listing(self.url)

    def push(self, *names: str) -> None:
        """Uploads files, in this order."""
        for name in names:
            objects.upload(self.folder / name, self.url / name)

    def begin_shard(self, number: int) -> None:
        """From here on the features at the URL are incomplete: without index, and an old record of the shard is an
        empty one."""
        self.remove([INDEX])
        record = record_path(self.folder, number)
        with suppress(NoSuchObject):
            objects.stat(self.url / f"{PARTS}{record.name}")
            atomic_write(record, b"")
            self.push(f"{PARTS}{record.name}")

    def push_shard(self, number: int) -> None:
        """Uploads a shard, if it has samples, and then its record, and removes the shard here."""
        shard, record = shard_path(self.folder, number), record_path(self.folder, number)
        if shard.exists():
            self.push(f"{SHARDS}{shard.name}")
        self.push(f"{PARTS}{record.name}")
        shard.unlink(missing_ok=True)

    def push_waiting(self, stale: Container[int]) -> None:
        """Uploads the shards that an earlier extraction made here and could not upload; the `stale` ones are made
        again."""
        for number in self._shards_here():
            if number not in stale and record_path(self.folder, number).exists():
                self.push_shard(number)

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects, in this order."""
        for name in names:
            with suppress(NoSuchObject):
                objects.delete(self.url / name)

    def _shards_here(self) -> list[int]:
        """Numbers of the shards that are in the folder."""
        return sorted(int(path.stem) for path in (self.folder / "shards").glob("[0-9]*.safetensors"))

    def _fetch(self, name: str) -> None:
        with atomic_path(self.folder / name) as part, part.open("wb") as target:
            objects.download(self.url / name, target)


def local_folder(config: ExtractConfig) -> Path:
    """The folder of this machine in which an extraction makes its features: `out`, or of a URL one in the cache's
    folder."""
    if isinstance(config.out, Path):
        return config.out
    return ObjectCache.of(config.cache).folder / f"staging-{hashlib.sha256(config.out.encode()).hexdigest()[:16]}"


def staging_of(config: ExtractConfig) -> Staging | None:
    """None: `out` is a folder of this machine."""
    return Staging(config.out, local_folder(config)) if isinstance(config.out, Url) else None
