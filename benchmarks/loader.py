"""How fast batches come, and how long a training step waits for them: features on a local disk, and at a URL behind 50
ms of latency.

    python -m benchmarks.loader        # two minutes

512 images with captions; an S3 server on loopback (rclone, dev extra).

Peer: one file a sample with its caption padded, read by torch.utils.data.DataLoader, as PixArt's and Open-Sora's
training code does; over the store one object a sample. Samples per second without a step, first batch left out, on the
local disk the median of seven turns; then the share of time that steps wait, where a step is a pause of
`--step-s`: what a GPU would take. In a first epoch each sample is compared with its hash. Prints a table and appends it
to benchmarks/results/loader.md.
"""

from __future__ import annotations

import argparse
import datetime
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from stdit import extract
from stdit.config import (
    ByteT5Config,
    CacheConfig,
    DataConfig,
    ExtractBucket,
    ExtractConfig,
    TextEncoderConfig,
    Url,
)
from stdit.data import manifest, objects
from stdit.data.features import FeatureSet
from stdit.data.loader import Loader
from tests.support.object_store import ObjectStore

RESULTS = Path(__file__).parent / "results" / "loader.md"
SIDE, IMAGES, BATCH = 32, 512, 16
ROUNDS = 7
# Caption features: up to so many tokens, a fifth of them on average, of this width.
TOKENS, WIDTH = 120, 512


def make_features(folder: Path) -> Path:
    random, rows = np.random.default_rng(0), []
    for i in range(IMAGES):
        Image.fromarray(random.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{i}.png")
        length = TOKENS - 1 if i == 0 else int(random.integers(5, 2 * TOKENS // 5))
        rows.append({"path": f"{i}.png", "caption": "x" * length, "frames": 1, "height": SIDE, "width": SIDE})
    manifest.write(folder / "manifest.jsonl", rows)
    text = TextEncoderConfig(byte_t5=ByteT5Config(width=WIDTH, depth=1, num_heads=4), max_text_tokens=TOKENS)
    buckets = (ExtractBucket(frames=1, height=SIDE, width=SIDE),)
    out = folder / "features"
    extract.run(
        ExtractConfig(
            manifest=folder / "manifest.jsonl", out=out, buckets=buckets, text_encoder=text, clips_per_shard=32
        )
    )
    return out


def write_files(features: FeatureSet, folder: Path) -> None:
    """One file a sample, its caption padded."""
    folder.mkdir(parents=True)
    for id in features.ids:
        sample = features.sample(int(id))
        assert sample.text is not None
        text = torch.zeros(TOKENS, WIDTH)
        text[: len(sample.text)] = sample.text
        mask = torch.arange(TOKENS) < len(sample.text)
        torch.save({"mean": sample.mean, "text": text, "mask": mask}, folder / f"{id}.pt")


class Files(Dataset[Any]):
    """Samples of one file each; shuffled by the loader."""

    def __init__(self, folder: Path | Url) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.folder, Path):
            return torch.load(self.folder / f"{index}.pt")
        return torch.load(io.BytesIO(objects.read(self.folder / f"{index}.pt", 1 << 30)))


def batches(features: FeatureSet, workers: int) -> Iterable[Any]:
    bucket = {"frames": 1, "height": SIDE, "width": SIDE, "batch_size": BATCH}
    return Loader(
        features, DataConfig.model_validate({"features": "synthetic", "buckets": [bucket], "workers": workers}), 0
    )


def rate(loader: Iterable[Any]) -> float:
    """Samples per second of one epoch, after a first batch."""
    source = iter(loader)
    next(source)
    start, count = time.perf_counter(), IMAGES // BATCH - 1
    for _ in islice(source, count):
        pass
    return count * BATCH / (time.perf_counter() - start)


def waiting(loader: Iterable[Any], step_s: float) -> tuple[float, float]:
    """Seconds before the first step, and the share of the time of all later ones that is spent waiting."""
    began, waited, first = time.monotonic(), 0.0, 0.0
    asked = began
    for number, _ in enumerate(islice(iter(loader), IMAGES // BATCH)):
        spent = time.monotonic() - asked
        first, waited = (spent, 0.0) if number == 0 else (first, waited + spent)
        time.sleep(step_s)
        asked = time.monotonic()
    return first, waited / (asked - began - first)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--step-s", type=float, default=0.1)
    parser.add_argument("--latency-s", type=float, default=0.05)
    args = parser.parse_args(argv)
    lines = ["| | samples/s | of the peer's | first batch, s | time waiting |", "|---|---|---|---|---|"]

    def add(name: str, loader: Any, of: float = 0.0, found: float = 0.0) -> float:
        first, share = waiting(loader(), args.step_s)
        found = found or rate(loader())
        lines.append(f"| {name} | {found:,.0f} | {found / (of or found):.1f} | {first:.2f} | {share:.1%} |")
        return found

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "clips").mkdir()
        local, bucket = make_features(home / "clips"), home / "store/bucket"
        write_files(FeatureSet(local), bucket / "files")
        shutil.copytree(local, bucket / "features")
        options: Any = {"batch_size": BATCH, "shuffle": True}
        known = FeatureSet(local)
        rate(batches(known, 0))
        loaders: dict[str, Callable[[], Any]] = {
            "a padded file a sample, DataLoader": lambda: DataLoader(Files(bucket / "files"), **options),
            "features, local disk, first epoch": lambda: batches(FeatureSet(local), 0),
            "features, local disk, later epochs": lambda: batches(known, 0),
        }
        # In turns, as the machine's speed changes.
        turns = [{name: rate(loader()) for name, loader in loaders.items()} for _ in range(ROUNDS)]
        peer = 0.0
        for name, loader in loaders.items():
            found = statistics.median(turn[name] for turn in turns)
            peer = peer or found
            add(name, loader, peer, found)
        with ObjectStore(home / "store") as store:
            os.environ.update(store.environment)
            store.latency_s = args.latency_s
            # Two workers fetch while the step runs, as our loader's threads do.
            far = add(
                "a padded object a sample, DataLoader of two workers",
                lambda: DataLoader(Files(Url("s3://bucket/files")), num_workers=2, **options),
            )
            caches = iter(range(4))

            def empty() -> Iterable[Any]:
                return batches(
                    FeatureSet(Url("s3://bucket/features"), CacheConfig(folder=home / f"cache{next(caches)}")), 2
                )

            add("features at a URL, empty cache", empty, far)
            full = CacheConfig(folder=home / "cache0")
            add("features at a URL, full cache", lambda: batches(FeatureSet(Url("s3://bucket/features"), full), 2), far)
    title = f"## {datetime.date.today()} · steps of {args.step_s:g} s, latency {args.latency_s:g} s · {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}"
    text = "\n".join([title, "", *lines, ""])
    print(text)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"\n{text}")


if __name__ == "__main__":
    main()
