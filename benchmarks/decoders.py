"""Decoding one clip by each reader, as a ratio to decord's time: the whole clip, and 16 frames at random.

    python benchmarks/decoders.py [--rounds 21] [--frames 96] [--side 512]

Both readers open the same H.264 file in one process, in an order drawn anew each round; process CPU time; ratios are
taken within a round, so that a busy machine weighs on both. The row decord/decord is the control. Frames are compared
before anything is timed. Prints one table and appends it to benchmarks/results/decoders.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np

from stdit.data.decoding import open_clip

RESULTS = Path(__file__).parent / "results" / "decoders.md"


def make_clip(path: Path, frames: int, side: int) -> None:
    """An H.264 clip of moving waves, yuv420p, keyframes where x264 puts them."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
        t, y, x = np.mgrid[0:frames, 0:side, 0:side].astype(np.float32)
        waves = (np.sin(x / 9 + t / 3), np.cos(y / 7 + t / 4), np.sin((x + y) / 11 - t / 5))
        for frame in np.stack([127 + 120 * wave for wave in waves], axis=-1).astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def read(path: Path, decoder: str, indices: Sequence[int]) -> np.ndarray:
    reader = open_clip(path, decoder)
    try:
        return reader.get(indices)
    finally:
        reader.close()


def ratios(path: Path, indices: Sequence[int], rounds: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """CPU time of each reader over decord's, per round. decord runs twice: once as the measure, once as the control."""
    runs = {"decord": "decord", "decord (control)": "decord", "pyav": "pyav"}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name in random.permutation(list(runs)):
            began = time.process_time()
            read(path, runs[name], indices)
            seconds[name].append(time.process_time() - began)
    base = np.array(seconds.pop("decord"))
    return {name: np.array(taken) / base for name, taken in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--side", type=int, default=512)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    lines = [
        f"\n{datetime.date.today()} · {platform.processor() or platform.machine()} · H.264 {args.side}×{args.side}, "
        f"{args.frames} frames · {args.rounds} rounds · CPU time over decord's, median (quartiles)\n",
        "| case | reader | ratio |",
        "|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        make_clip(path, args.frames, args.side)
        cases = {
            "whole clip": list(range(args.frames)),
            "16 at random": sorted(random.choice(args.frames, min(16, args.frames), replace=False).tolist()),
        }
        for case, indices in cases.items():
            apart = np.abs(read(path, "decord", indices).astype(int) - read(path, "pyav", indices)).max()
            if apart > 4:
                raise SystemExit(f"{case}: the readers' frames differ by up to {apart} levels; not timed")
            for name, ratio in ratios(path, indices, args.rounds, random).items():
                low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
                lines.append(f"| {case} | {name} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    table = "\n".join(lines)
    print(table)
    with RESULTS.open("a") as file:
        file.write(table + "\n")


if __name__ == "__main__":
    main()
