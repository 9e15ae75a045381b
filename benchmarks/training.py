"""What the framework adds to a training step: `train` beside DeepSpeed driven bare, and beside a plain PyTorch loop.

    python benchmarks/training.py [--hidden 384 --depth 12] [--side 32 --frames 1 --batch 4] \\
        [--zero 2] [--precision fp32] [--steps 20]

The same model (spatial-temporal DiT, class-conditional), batches, flow-matching loss, AdamW, gradient clipping and
weight average three times, in one process of one rank, a step of each in turn: `train` reports after each of its steps,
and the other two take theirs then. CPU seconds, all threads, so that other programs matter less; a ratio of each round,
its median. `train` is all that a user's run does: data from features, seeded noise, checks, metrics.jsonl, watchdog.
Prints a table and appends it to benchmarks/results/training.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.config import Config, validate
from stdit.cores import available_cores
from stdit.models.stdit import STDiT
from stdit.train import train
from stdit.training.deepspeed_config import make_deepspeed_config

RESULTS = Path(__file__).parent / "results" / "training.md"
# Steps of each that are not counted: memory is allocated, kernels are chosen.
WARM_UP = 2
DECAY = 0.999


def settings(args: argparse.Namespace, run_dir: Path) -> Config:
    bucket = {"frames": args.frames, "height": args.side, "width": args.side, "batch_size": args.batch}
    data: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {
            "hidden_size": args.hidden, "depth": args.depth, "num_heads": args.hidden // 64, "in_channels": 4,
            "patch_size": [1, 2, 2], "num_classes": 10,
        },
        "data": {"features": "synthetic", "buckets": [bucket]},
        "diffusion": {"caption_dropout": 0.0},
        "train": {
            "steps": WARM_UP + args.steps + 1, "zero_stage": args.zero, "precision": args.precision, "log_every": 1,
            "checkpoint_every": 10**6, "tensorboard": False, "ema": {"decay": DECAY},
            "optimizer": {"learning_rate": 1e-4, "max_grad_norm": 1.0},
        },
    }  # fmt: skip
    return validate(data, Config, "benchmark")


class Bare:
    """A loop as one writes it: no data set, no logging, no checks. DeepSpeed's engine, or torch alone."""

    def __init__(self, config: Config, model: nn.Module, deepspeed: bool) -> None:
        self.model: Any = copy.deepcopy(model).train()
        self.parameters = list(self.model.parameters())
        rate = config.train.optimizer.learning_rate
        self.optimizer: Any = torch.optim.AdamW(self.parameters, lr=rate, fused=True)
        self.engine: Any = None
        self.dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        # With DeepSpeed the masters are the optimizer's; the average is of as many numbers.
        self.average = [p.detach().clone() for p in self.parameters]
        if deepspeed:
            import deepspeed as ds

            generated = make_deepspeed_config(config.train, sum(p.numel() for p in self.parameters), "cpu")
            self.engine = ds.initialize(model=self.model, optimizer=self.optimizer, config=generated)[0]
        (bucket,) = config.data.buckets
        self.shape = (bucket.batch_size or 1, 4, bucket.frames, bucket.height, bucket.width)

    def step(self) -> None:
        x0, noise, t = torch.randn(self.shape), torch.randn(self.shape), torch.rand(self.shape[0])
        share = t.view(-1, 1, 1, 1, 1)
        labels = torch.randint(0, 10, (self.shape[0],))
        call = self.engine or self.model
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype != torch.float32 and self.engine is None):
            found: Tensor = call(torch.lerp(x0, noise, share), t * 1000, class_labels=labels, return_dict=False)[0]
        loss = F.mse_loss(found.float(), noise - x0)
        if self.engine is not None:
            self.engine.backward(loss)
            self.engine.step()
        else:
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        with torch.no_grad():
            for average, weight in zip(self.average, self.parameters, strict=True):
                average.lerp_(weight.float(), 1 - DECAY)


def measure(config: Config) -> dict[str, list[float]]:
    """CPU seconds of each step of "train", "DeepSpeed" and "PyTorch"."""
    seconds: dict[str, list[float]] = {"train": [], "DeepSpeed": [], "PyTorch": []}
    loops: dict[str, Callable[[], None]] = {}
    began = 0.0

    def others(metrics: dict[str, Any]) -> None:
        nonlocal began
        if began:
            seconds["train"].append(time.process_time() - began)
        if not loops:  # after a first step, which has made the process group
            model = STDiT.from_settings(config.model, config.seed)
            loops.update({"DeepSpeed": Bare(config, model, True).step, "PyTorch": Bare(config, model, False).step})
        # Each goes first in turn, so that none finds the caches always warm.
        for name in sorted(loops, reverse=metrics["step"] % 2 == 0):
            start = time.process_time()
            loops[name]()
            if began:  # train's first step is not timed
                seconds[name].append(time.process_time() - start)
        began = time.process_time()

    train(config, others)
    return {name: each[WARM_UP:] for name, each in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default in (
        ("hidden", 384),
        ("depth", 12),
        ("side", 32),
        ("frames", 1),
        ("batch", 4),
        ("zero", 2),
        ("steps", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to which the table is appended")
    args = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", available_cores())))
    with tempfile.TemporaryDirectory() as folder:
        config = settings(args, Path(folder) / "run")
        seconds = measure(config)
    parameters = sum(p.numel() for p in STDiT.from_settings(config.model).parameters())
    tokens = args.frames * (args.side // 2) ** 2
    lines = [
        f"\n{datetime.date.today()} · {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads · "
        f"{parameters / 1e6:.0f} M parameters, {args.batch} samples of {tokens} tokens, ZeRO-{args.zero}, {args.precision}, 1 rank · "
        f"{args.steps} steps of each, medians (quartiles)\n",
        "| a step of | CPU seconds | of PyTorch's | of DeepSpeed's |",
        "|---|---|---|---|",
    ]
    for name, each in seconds.items():
        ratios = [quartiles([a / b for a, b in zip(each, seconds[of], strict=True)]) for of in ("PyTorch", "DeepSpeed")]
        lines.append(f"| {name} | {quartiles(each)} | {' | '.join(ratios)} |")
    print("\n".join(lines))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("a") as file:
        file.write("\n".join(lines) + "\n")


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


if __name__ == "__main__":
    main()
