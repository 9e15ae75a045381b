"""Recipes at equal training FLOPs on the embedded handwriting clips: validation loss, digits, Fréchet distance.

    python benchmarks/recipe.py --out runs/recipe [--steps 1000] [--seeds 0 1 2] \\
        [--fractions 0.5 1] [--recipes today wsd …]

Each recipe changes one thing of a config (--base, by default the demo's stage of captions and clips, trained from
scratch). The budget is what --steps steps of it cost; every recipe gets as many steps as the same budget, or a fraction
of it, pays for. FLOPs of forward and backward are counted by stdit.models.cost, those of the optimizer's products by
torch, and a step's arithmetic on each weight (AdamW, clipping, EMA) as PER_WEIGHT. Loss, digits and Fréchet distance
are of the EMA's weights; the loss is the plain objective's. Recipes of noise prediction are compared with `ddpm`, all
others with `today`.

Intervals are 95 %: of loss and distance Student's over seeds, and of their difference at equal seeds; of digits
Wilson's over the pooled clips. One process; a second call goes on where the first one stopped. Writes OUT/recipe.json
and OUT/recipe.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from torch.utils.flop_counter import FlopCounterMode

from stdit import extract, metrics_log
from stdit.config import (
    Bucket,
    Config,
    EvaluationConfig,
    ExtractConfig,
    SamplerConfig,
    apply_override,
    merge,
    read_extended,
    token_grid,
    validate,
)
from stdit.data.digits import DigitsOptions, Shape, make_digits
from stdit.data.loader import BucketSchedule
from stdit.diffusion.schedulers import compatible_scheduler
from stdit.evaluation.evaluator import evaluate_videos
from stdit.evaluation.metrics import accuracy
from stdit.evaluation.validation_clips import validation_prompts, write_prompts
from stdit.files import atomic_write
from stdit.generate import generate
from stdit.inference.prompts import read_prompts
from stdit.models.cost import model_cost
from stdit.models.stdit import STDiT
from stdit.train import train
from stdit.training.data import open_data
from stdit.training.derive import complete
from stdit.training.optimizer import make_optimizer

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "configs" / "stages" / "demo-2-clips.yaml"
PLAN = ROOT / "configs" / "plans" / "demo.yaml"
# FLOPs of a weight and step beside products: AdamW 14, the gradient's norm and clipping 3, the EMA 3.
PER_WEIGHT = 20


def recipes(depth: int) -> dict[str, dict[str, Any]]:
    """What each recipe changes in the config, for a model of `depth` blocks."""
    wsd = {"train": {"optimizer": {"lr_schedule": "wsd"}}}
    muon = {"train": {"optimizer": {"name": "muon"}}}
    routing = {"train": {"token_routing": {"share": 0.5, "start": 1, "end": depth - 1}}}
    sprint = {
        "model": {"sparse_dense": [1, depth - 1]},
        "train": {
            "token_routing": {"share": 0.75, "start": 1, "end": depth - 1, "path_drop": 0.1, "dense_finish": 0.1}
        },
    }
    contrastive = {"diffusion": {"contrastive_weight": 0.05}}
    return {
        "today": {},
        "wsd": wsd,
        "token routing": routing,
        "sparse-dense": sprint,
        "contrastive": contrastive,
        "alignment": {"train": {"alignment": {"block": depth // 3, "weight": 0.5}}},
        "adamw": {"train": {"optimizer": {"name": "adamw"}}},
        "muon": muon,
        "muon, token routing": merge(muon, routing),
        "all": merge(merge(merge(wsd, muon), routing), contrastive),
        "ddpm": {"diffusion": {"objective": "ddpm"}},
        "min-SNR": {"diffusion": {"objective": "ddpm", "min_snr_gamma": 5.0}},
    }


REFERENCE = {"ddpm": "ddpm", "min-SNR": "ddpm"}  # of the others: today

# ------------------------------------------------------------------------------------------ data, configs


def make_data(args: argparse.Namespace, base: dict[str, Any]) -> tuple[Path, Path]:
    """The digits' manifest and their features, with the demo's text encoder."""
    shapes = tuple(Shape.parse(shape) for shape in args.shapes)
    manifest = make_digits(args.out / "digits", DigitsOptions(shapes, grid=1, scans=args.scans), workers=1)
    features = read_extended(PLAN)["extraction"] | {"manifest": str(manifest), "out": str(args.out / "features")}
    features["buckets"] = [{k: b[k] for k in ("frames", "height", "width")} for b in base["data"]["buckets"]]
    features["workers"] = 1
    extract.run(validate(features, ExtractConfig, "recipe.py, features"))
    return manifest, args.out / "features"


def read_base(args: argparse.Namespace) -> dict[str, Any]:
    """The config that recipes change, without a run's own matters."""
    base = read_extended(args.base)
    for override in args.set:
        base = apply_override(base, override)
    own = {
        "run_dir": str(args.out / "unnamed"),
        "data": {"features": str(args.out / "features")},
        "train": {"checkpoint_every": None, "keep_checkpoints": 1, "tensorboard": False},
        "samples": {"every": None},
    }
    return merge(base, own)


def make_config(base: dict[str, Any], changes: dict[str, Any], steps: int, seed: int, run: Path) -> Config:
    data = merge(base, changes)
    data = merge(data, {"run_dir": str(run), "seed": seed, "train": {"steps": steps}, "validation": {"every": steps}})
    return complete(validate(data, Config, f"recipe.py, {run.name}"))


# ------------------------------------------------------------------------------------------ FLOPs


def optimizer_flops(config: Config) -> int:
    """FLOPs of one optimizer step: the products of its matrices as they run, and PER_WEIGHT."""
    model = STDiT.from_settings(config.model)
    optimizer = make_optimizer(model, config.train.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    return counter.get_total_flops() + PER_WEIGHT * sum(p.numel() for p in model.parameters())


def spend(config: Config, steps: int | None = None, budget: float | None = None) -> tuple[int, float]:
    """(steps, training FLOPs): of `steps` steps of the config's own sequence of buckets, or of as many as `budget` pays
    for."""
    data = open_data(config)
    loader = BucketSchedule(data.source, config.data, accumulation=config.train.gradient_accumulation)
    own, cost = optimizer_flops(config), {}
    for bucket in config.data.buckets:
        grid = token_grid(data.latents[bucket.key], config.model.patch_size, bucket.key, config.model.pad_latents)
        found = model_cost(config.model, grid, data.text_tokens, train=config.train)
        cost[bucket.key] = loader.step_size(bucket) * found.training_flops + own
    taken, flops, count = dict.fromkeys(loader.counts, 0), 0.0, 0
    while count != steps:
        bucket = loader.next_bucket(taken)
        if budget is not None and count and flops + cost[bucket.key] > budget:
            break
        taken[bucket.key] += loader.step_size(bucket)
        flops += cost[bucket.key]
        count += 1
    return count, flops


# ------------------------------------------------------------------------------------------ runs


def measure(args: argparse.Namespace, config: Config, manifest: Path) -> dict[str, Any]:
    """Trains and scores one run: validation loss, digits and Fréchet distance of clips for held-out prompts."""
    run = train(config)
    entries = metrics_log.read(run / metrics_log.FILE)
    loss = next(entry["validation_loss"] for entry in reversed(entries) if entry.get("validation_loss") is not None)
    last = Shape.parse(args.shapes[-1])
    shape = Bucket(frames=last.frames, height=last.height, width=last.width)
    rows = validation_prompts(manifest, args.clips, shape)
    if config.model.text_dim is None:  # by class alone
        rows = [{k: v for k, v in row.items() if k != "prompt"} for row in rows]
    write_prompts(run / "prompts.jsonl", rows)
    sampler = SamplerConfig(scheduler="flow_euler", steps=args.sampling_steps, guidance_scale=args.guidance)
    sampler = compatible_scheduler(sampler, config.diffusion)
    prompts = read_prompts(run / "prompts.jsonl")
    generate(run, prompts, run / "drawn", shape, sampler, batch_size=50, threads=args.threads)
    settings = EvaluationConfig(class_name="digit", classifier_steps=args.classifier_steps)
    found = evaluate_videos(run / "drawn", manifest, settings, cache=args.out)
    count = found["counts"]["class"]
    return {
        "validation_loss": loss,
        "digits_correct": round(found["class_accuracy"] * count),
        "digits_count": count,
        "frechet_distance": found["frechet_distance"],
    }


def measure_all(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The result and its table, written to OUT after each run."""
    base = read_base(args)
    manifest, _ = make_data(args, base)
    reference = make_config(base, {}, args.steps, 0, args.out / "unnamed")
    _, budget = spend(reference, steps=args.steps)
    rows: list[dict[str, Any]] = []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    result: dict[str, Any] = {
        "date": str(datetime.date.today()), "device": device, "torch": torch.__version__, "base": args.base.name, "set": args.set,
        "budget_flops": budget, "steps": args.steps, "clips": args.clips, "rows": rows, "summary": [],
    }  # fmt: skip
    for fraction in args.fractions:
        for seed in args.seeds:
            for name, changes in recipes(reference.model.dimensions[1]).items():
                if name not in args.recipes:
                    continue
                steps, flops = spend(
                    make_config(base, changes, 1, seed, args.out / "unnamed"), budget=fraction * budget
                )
                run = args.out / f"{name.replace(', ', '+').replace(' ', '-')}-{fraction:g}-{seed}"
                row = {"recipe": name, "fraction": fraction, "seed": seed, "steps": steps, "flops": flops}
                rows.append(row | measure(args, make_config(base, changes, steps, seed, run), manifest))
                print(json.dumps(rows[-1]), flush=True)
                result["summary"] = summarize(rows)
                atomic_write(args.out / "recipe.json", json.dumps(result, indent=1))
                atomic_write(args.out / "recipe.md", table(result) + "\n")
    return result, table(result)


# ------------------------------------------------------------------------------------------ tables


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of Student's 95 % interval; None of one value."""
    if len(values) < 2:
        return float(values[0]), None
    half = student.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return statistics.fmean(values), float(half)


def summarize(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each recipe and fraction: means with intervals, and paired differences to its reference at the whole
    budget."""
    summary = []
    groups: dict[tuple[str, float], dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["fraction"]), {})[row["seed"]] = row
    for (name, fraction), by_seed in groups.items():
        members = list(by_seed.values())
        correct, count = (sum(row[f"digits_{key}"] for row in members) for key in ("correct", "count"))
        digits = accuracy(["right"] * count, ["right"] * correct + ["wrong"] * (count - correct))
        found: dict[str, Any] = {
            "recipe": name, "fraction": fraction, "seeds": len(members), "steps": members[0]["steps"], "flops": members[0]["flops"],
            "digits": [digits.value, digits.low, digits.high],
        }  # fmt: skip
        against = groups.get((REFERENCE.get(name, "today"), 1.0), {})
        shared = [] if against is by_seed else sorted(by_seed.keys() & against.keys())
        for key in ("validation_loss", "frechet_distance"):
            known = [row[key] for row in members if row[key] is not None]
            found[key] = interval(known) if known else None
            pairs = [(by_seed[s][key], against[s][key]) for s in shared]
            pairs = [a - b for a, b in pairs if a is not None and b is not None]
            found[f"{key}_difference"] = interval(pairs) if pairs else None
        summary.append(found)
    return summary


def table(result: dict[str, Any]) -> str:
    seeds = max(row["seeds"] for row in result["summary"])
    lines = [
        f"\n{result['date']} · {result['device']} · torch {result['torch']} · {' '.join([result['base'], *result['set']])} · budget "
        f"{result['budget_flops']:.3g} FLOPs ({result['steps']} steps of today's recipe) · {result['clips']} clips drawn · {seeds} seeds\n",
        "| recipe | FLOPs | steps | validation loss | difference | digits | Fréchet | difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["summary"]:
        value, low, high = row["digits"]
        lines.append(
            f"| {row['recipe']} | {row['flops'] / result['budget_flops']:.3f} | {row['steps']} | {_shown(row['validation_loss'], 4)} | "
            f"{_shown(row['validation_loss_difference'], 4)} | {100 * value:.1f} % ({100 * low:.1f} to {100 * high:.1f}) | "
            f"{_shown(row['frechet_distance'], 2)} | {_shown(row['frechet_distance_difference'], 2)} |"
        )
    return "\n".join(lines)


def _shown(found: Sequence[float | None] | None, digits: int) -> str:
    if found is None:
        return ""
    mean, half = found
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


QUICK = ["model.hidden_size=48", "model.depth=4", "model.num_heads=4", "validation.samples=4", "train.log_every=1"]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--base", type=Path, default=BASE, help="training config that recipes change")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting of the base")
    parser.add_argument("--steps", type=int, default=1000, help="of today's recipe: the budget")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fractions", type=float, nargs="+", default=[1.0, 0.5], help="of the budget")
    parser.add_argument("--recipes", nargs="+", choices=list(recipes(4)), default=list(recipes(4)))
    parser.add_argument("--shapes", nargs="+", default=["1x12x12:8:4", "4x12x12:8:4"], help="as of stdit.data.digits; the last is drawn")  # fmt: skip
    parser.add_argument("--scans", type=int, default=1797, help="of handwriting")
    parser.add_argument("--clips", type=int, default=400, help="drawn and read of each run")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--classifier-steps", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps, to see that it runs")
    return parser


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """As measure_all, with the sizes of --quick."""
    if args.quick:
        args.steps, args.scans, args.clips, args.sampling_steps, args.classifier_steps = 8, 60, 10, 2, 10
        args.set = [*QUICK, *args.set]
    torch.set_num_threads(args.threads)
    return measure_all(args)


if __name__ == "__main__":
    print(run(arguments().parse_args())[1])
