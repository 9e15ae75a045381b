"""How busy an encoder is that several processes decode for, where the encoder is a pause: what a GPU would take.

    python -m benchmarks.extraction        # four minutes on two cores

2-second clips of 512×512 H.264 are read at 256×256, by 1, 2 and 4 decoders.

The pause for a clip is `--load` times what one decoder takes for one, measured first: below 1, one decoder cannot keep
the encoder busy, and two can where two cores are free. `--encode-s` sets it instead. Everything else is
`stdit extract`: hashing, conversion to pixels, shards, records. What the encoder's own thread does with pixels and
latents counts as encoding; the start, until the first batch is decoded, counts as waiting. Prints a table and appends
it to benchmarks/results/extraction.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from stdit.config import ExtractBucket, ExtractConfig
from stdit.data import manifest
from stdit.data.extraction import encoder_settings, read_report, write_settings
from stdit.data.extractor import Extractor
from stdit.encoders.video import load_video_encoder
from stdit.extract import collect, plan_shards

RESULTS = Path(__file__).parent / "results" / "extraction.md"
FRAMES, SIDE, SOURCE_SIDE = 49, 256, 512
NAMES = ("decode", "encode", "wait")


class SleepingEncoder:
    """Latents of 8×8 px, after a pause of `seconds` a clip in which the processor is free, as beside a GPU."""

    dtype = torch.float32

    def __init__(self, identity: dict[str, Any], seconds: float) -> None:
        self.identity, self.seconds = identity, seconds

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(self.seconds * len(pixels))
        return pixels[:, :, ::4, ::8, ::8].contiguous(), None


def make_clips(folder: Path, count: int) -> Path:
    """`count` copies of a clip of moving noise; their manifest."""
    noise = np.random.default_rng(0).integers(0, 256, (SOURCE_SIDE, SOURCE_SIDE, 3), np.uint8)
    with av.open(str(folder / "0.mp4"), "w") as container:
        stream: Any = container.add_stream("libx264", rate=24, options={"threads": "1", "crf": "28"})
        stream.height = stream.width = SOURCE_SIDE
        stream.pix_fmt = "yuv420p"
        for i in range(FRAMES):
            image = np.roll(noise // 8 + 16 * (i % 8), 5 * i, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    for i in range(1, count):
        os.link(folder / "0.mp4", folder / f"{i}.mp4")
    size = {"fps": 24, "frames": FRAMES, "height": SOURCE_SIDE, "width": SOURCE_SIDE}
    manifest.write(folder / "manifest.jsonl", [{"path": f"{i}.mp4", "caption": "", **size} for i in range(count)])
    return folder / "manifest.jsonl"


def measure(folder: Path, clips: Path, decoders: int, encode_s: float) -> tuple[dict[str, float], int]:
    """`seconds` of report.json, and the number of clips."""
    config = ExtractConfig(
        manifest=clips,
        out=folder / f"features-{decoders}-{encode_s}",
        buckets=(ExtractBucket(frames=FRAMES, height=SIDE, width=SIDE),),
        clips_per_shard=32,
        batch_size=4,
    )
    plan = plan_shards(config)
    write_settings(plan)
    video = SleepingEncoder(load_video_encoder(config.video_encoder).identity, encode_s)
    with Extractor(config, video, None, encoder_settings(plan.settings), decoders) as extractor:
        collect(plan, plan.shards, extractor.extract_all(plan.shards))
    report = read_report(config.out)
    return report["seconds"], report["kept"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--clips", type=int, default=160)
    parser.add_argument("--decoders", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--load", type=float, default=0.5, help="seconds of encoding for each of one decoder's")
    parser.add_argument("--encode-s", type=float, help="seconds of encoding a clip")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        clips = make_clips(Path(folder), args.clips)
        alone, count = measure(Path(folder), clips, 1, 0.0)
        encode_s = args.encode_s or args.load * alone["decode"] / count
        lines = [
            f"\n## {datetime.date.today()} · {count} clips of {FRAMES}×{SOURCE_SIDE}×{SOURCE_SIDE} at {SIDE}×{SIDE} · one decoder takes "
            f"{alone['decode'] / count:.3f} s a clip, the encoder {encode_s:.3f} s · {os.cpu_count()} cores, load {os.getloadavg()[0]:.0f}\n",
            "| decoders | decode s/clip | encode s/clip | wait s/clip | encoder busy |",
            "|---|---|---|---|---|",
        ]
        for decoders in args.decoders:
            found, count = measure(Path(folder), clips, decoders, encode_s)
            each = " | ".join(f"{found[name] / count:.3f}" for name in NAMES)
            lines.append(f"| {decoders} | {each} | {found['encode'] / found['total']:.1%} |")
    table = "\n".join(lines)
    print(table)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(table + "\n")


if __name__ == "__main__":
    main()
