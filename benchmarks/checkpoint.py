"""How long training stands still for a checkpoint: written while it waits, and in the background.

    python benchmarks/checkpoint.py [--hidden 768 --depth 9] [--zero 2] [--rounds 5] [--steps 6] [--out FOLDER]

One engine of one rank trains in steps of two tiny images; each round saves both ways, in turn, and takes `--steps`
steps after either.
Stall: seconds in which training waits for the save, collecting what became of it included. Slower steps: what steps
take beyond those without a write under way, while there is one, in all. Prints one table and appends it to
benchmarks/results/checkpoint.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from stdit.config import Config, merge, validate
from stdit.cores import available_cores
from stdit.data.loader import Loader
from stdit.models.stdit import STDiT
from stdit.training import checkpoint
from stdit.training.data import open_data
from stdit.training.ema import EMA
from stdit.training.engine import Engine, init_distributed
from stdit.training.inputs import Inputs
from stdit.training.resume import TrainState
from stdit.training.saving import Saver

RESULTS = Path(__file__).parent / "results" / "checkpoint.md"


def settings(args: argparse.Namespace, run_dir: Path, background: bool) -> Config:
    bucket = {"frames": 1, "height": 8, "width": 8, "batch_size": 2}
    data: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "hidden_size": args.hidden,
            "depth": args.depth,
            "num_heads": 12,
            "in_channels": 4,
            "num_classes": 10,
        },
        "data": {"features": "synthetic", "buckets": [bucket]},
        "train": {"steps": 10**6, "zero_stage": args.zero, "keep_checkpoints": 1, "checkpoint_every": 1},
    }
    return validate(merge(data, {"train": {"checkpoint_in_background": background}}), Config, "benchmark")


class Training:
    """One engine, whose steps both ways of saving share."""

    def __init__(self, args: argparse.Namespace, run_dir: Path) -> None:
        config = settings(args, run_dir, True)
        self.data, self.ranks, self.state = open_data(config), init_distributed(), TrainState()
        model = STDiT.from_settings(config.model, config.seed)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.engine = Engine(model, config, self.ranks)
        self.ema = EMA(self.engine.masters, config.train.ema)
        self.inputs = Inputs(config, self.data.video_encoder, self.ranks.device)
        self.batches = iter(Loader(self.data.source, config.data, config.seed))
        self.savers = {
            name: Saver(
                self.engine,
                self.ema,
                settings(args, run_dir, name == "background"),
                self.data,
                self.state,
                self.ranks,
                print,
            )
            for name in ("waiting", "background")
        }

    def step(self) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        data_step = next(self.batches)
        for batch in data_step.batches:
            self.engine.backward(
                self.inputs.loss(self.engine, batch, self.state.step + 1).total, len(data_step.batches)
            )
        self.engine.step(1e-4)
        self.ema.update(self.state.step + 1)
        self.state.advance(data_step.samples, data_step.position)
        return time.perf_counter() - start


def measure(training: Training, name: str, least_steps: int) -> tuple[float, float, int, list[float]]:
    """(stall, background seconds, steps meanwhile, their seconds) of one save; then steps until it is complete, or so
    many."""
    saver, stall, meanwhile, wrote = training.savers[name], 0.0, [], 0.0
    before = saver.background_seconds
    start = time.perf_counter()
    saver.save(last=False)
    stall += time.perf_counter() - start
    done = 0
    while done < least_steps or saver.status[0]:
        under_way = saver.status[0] > 0
        seconds = training.step()
        if under_way and saver.status[0]:
            meanwhile.append(seconds)
        if saver.is_over(*saver.status):
            start = time.perf_counter()
            saver.finish()
            stall += time.perf_counter() - start
        done += 1
    saver.finish()
    wrote = saver.background_seconds - before
    return stall, wrote, len(meanwhile), meanwhile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--depth", type=int, default=9)
    parser.add_argument("--zero", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, help="where checkpoints go (default: a temporary folder)")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", available_cores())))
    names = ("waiting", "background")
    stalls: dict[str, list[float]] = {name: [] for name in names}
    plain, meanwhile, wrote = [], [], []
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        training = Training(args, Path(folder))
        print(f"steps: {[round(training.step(), 2) for _ in range(2)]} s", file=sys.stderr)
        for name in names:  # the first of each allocates
            measure(training, name, 1)
        for round_ in range(args.rounds):
            for name in names if round_ % 2 else names[::-1]:
                plain.append(training.step())
                stall, seconds, _, slow = measure(training, name, args.steps)
                stalls[name].append(stall)
                print(
                    f"{name}: stall {stall:.2f} s, written in {seconds:.2f} s, {len(slow)} steps meanwhile",
                    file=sys.stderr,
                )
                if name == "background":
                    wrote.append(seconds)
                    meanwhile += slow
        size = sum(p.stat().st_size for p in checkpoint.list_checkpoints(Path(folder))[0].rglob("*") if p.is_file())
        training.engine.close()
    step = statistics.median(plain)
    slower = statistics.mean(meanwhile) - step if meanwhile else 0.0
    steps = len(meanwhile) / args.rounds
    ratio = statistics.median(b / w for b, w in zip(stalls["background"], stalls["waiting"], strict=True))
    lines = [
        f"\n{datetime.date.today()} · {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads · "
        f"{training.parameters / 1e6:.0f} M parameters, ZeRO-{args.zero}, fp32, 1 rank, checkpoint of {size / 2**30:.2f} GiB · "
        f"{args.rounds} rounds, medians (least to most)\n",
        "| | waiting | background |",
        "|---|---|---|",
        f"| stall, s | {spread(stalls['waiting'])} | {spread(stalls['background'])} |",
        f"| of waiting | 1 | {ratio:.3f} |",
        f"| written in, s | {statistics.median(stalls['waiting']):.2f} | {spread(wrote)} |",
        f"| step without a write {step:.2f} s: slower by, s (steps) | | {slower:+.2f} ({steps:.1f}) |",
    ]
    print("\n".join(lines))
    with RESULTS.open("a") as file:
        file.write("\n".join(lines) + "\n")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


if __name__ == "__main__":
    main()
