"""Transfer of the learning rate over widths, with µP (train.optimizer.mup) and without: a table of losses.

    python benchmarks/transfer.py --out runs/transfer [--widths 64 128 256] \\
        [--rates 1e-3 2e-3 4e-3 8e-3 1.6e-2] [--steps 150] [--quick]

Trains a config (--base, by default the demo's stage of images of digits) from scratch at each width, with heads of
--head, and each learning rate; with µP the base is the first width, where both are the same run. The loss is the
validation loss of the model's own weights after the last step, at a constant rate, since an average would hide what a
rate too high does. One process; a second call goes on where the first one stopped. Writes OUT/transfer.json and
OUT/transfer.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from stdit import extract, metrics_log
from stdit.config import Config, ExtractConfig, apply_override, merge, read_extended, validate
from stdit.data.digits import DigitsOptions, Shape, make_digits
from stdit.files import atomic_write
from stdit.train import train

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "stages" / "demo-1-images.yaml"
PLAN = ROOT / "configs" / "plans" / "demo.yaml"


def make_features(args: argparse.Namespace, base: dict[str, Any]) -> Path:
    """Features of the digits, in the shapes of the config's buckets."""
    buckets = [{k: b[k] for k in ("frames", "height", "width")} for b in base["data"]["buckets"]]
    shapes = tuple(Shape.parse("{frames}x{height}x{width}:8:4".format(**b)) for b in buckets)
    manifest = make_digits(args.out / "digits", DigitsOptions(shapes, grid=1, scans=args.scans), workers=1)
    own = {"manifest": str(manifest), "out": str(args.out / "features"), "buckets": buckets, "workers": 1}
    extract.run(validate(read_extended(PLAN)["extraction"] | own, ExtractConfig, "transfer.py, features"))
    return args.out / "features"


def make_config(args: argparse.Namespace, base: dict[str, Any], width: int, rate: float, mup: bool) -> Config:
    optimizer = {
        "learning_rate": rate, "lr_schedule": "constant", "warmup_steps": args.steps // 10,
        "mup": {"base_width": args.widths[0]} if mup else None,
    }  # fmt: skip
    own = {
        "run_dir": str(args.out / f"{'mup' if mup else 'plain'}-{width}-{rate:g}"),
        "seed": args.seed,
        "model": {"hidden_size": width, "num_heads": width // args.head},
        "train": {
            "steps": args.steps, "optimizer": optimizer, "checkpoint_every": None, "keep_checkpoints": 1, "tensorboard": False, "zero_stage": 1,
        },
        "validation": {"every": args.steps, "samples": args.samples, "raw": True},
        "samples": {"every": None},
    }  # fmt: skip
    return validate(merge(base, own), Config, "transfer.py")


def measure(config: Config) -> float:
    """The loss of the model's own weights after the last step; infinite for a run that diverges."""
    try:
        run = train(config)
    except RuntimeError as error:  # stdit.training.divergence.Diverged
        if type(error).__name__ != "Diverged":
            raise
        return math.inf
    entries = metrics_log.read(run / metrics_log.FILE)
    return next(e["raw_validation_loss"] for e in reversed(entries) if e.get("raw_validation_loss") is not None)


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    if args.quick:
        args.widths, args.rates, args.steps, args.scans, args.samples, args.head = [32, 64], [1e-3, 4e-3], 4, 60, 8, 16
    torch.set_num_threads(args.threads)
    base = read_extended(args.base)
    for override in args.set:
        base = apply_override(base, override)
    base = merge(base, {"data": {"features": str(make_features(args, base))}})
    rows: list[dict[str, Any]] = []
    result = {
        "date": str(datetime.date.today()), "device": platform.processor() or platform.machine(), "torch": torch.__version__,
        "base": args.base.name, "set": args.set, "steps": args.steps, "seed": args.seed, "rows": rows,
    }  # fmt: skip
    for width in args.widths:
        for mup in (False, True):
            if mup and width == args.widths[0]:
                rows += [{**row, "mup": True} for row in rows]  # bit for bit the same
                continue
            for rate in args.rates:
                loss = measure(make_config(args, base, width, rate, mup))
                rows.append({"width": width, "mup": mup, "rate": rate, "loss": loss})
                print(json.dumps(rows[-1]), flush=True)
        atomic_write(args.out / "transfer.json", json.dumps(result, indent=1))
        atomic_write(args.out / "transfer.md", table(result) + "\n")
    return result, table(result)


def table(result: dict[str, Any]) -> str:
    """A row for each width, with and without µP; the best rate's loss is bold. `regret`: what the narrowest model's
    best rate loses against the row's own."""
    rows = result["rows"]
    rates, widths = sorted({row["rate"] for row in rows}), sorted({row["width"] for row in rows})
    lines = [
        f"\n{result['date']} · {result['device']} · torch {result['torch']} · {' '.join([result['base'], *result['set']])} · "
        f"{result['steps']} steps · seed {result['seed']}\n",
        "| | width | " + " | ".join(f"{rate:g}" for rate in rates) + " | regret |",
        "|---|---|" + "---|" * (len(rates) + 1),
    ]
    for mup in (False, True):
        by_width = {w: {r["rate"]: r["loss"] for r in rows if (r["width"], r["mup"]) == (w, mup)} for w in widths}
        narrow = by_width[widths[0]]
        chosen = min(narrow, key=lambda rate: narrow[rate])
        for width, losses in by_width.items():
            if not losses:
                continue
            best = min(losses.values())
            cells = (f"**{losses[r]:.4f}**" if losses[r] == best else f"{losses[r]:.4f}" for r in rates)
            lines.append(
                f"| {'µP' if mup else 'plain'} | {width} | {' | '.join(cells)} | {losses[chosen] - best:.4f} |"
            )
    return "\n".join(lines)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--base", type=Path, default=BASE, help="training config")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting of the base")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256], help="the first is µP's base")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--head", type=int, default=32, help="width of a head")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=256, help="of validation")
    parser.add_argument("--scans", type=int, default=1797, help="of handwriting")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps, to see that it runs")
    return parser


if __name__ == "__main__":
    print(run(arguments().parse_args())[1])
