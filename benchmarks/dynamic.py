"""What dynamic compute saves and costs: multiply-adds and time of sampling against validation loss and digit accuracy.

    python benchmarks/dynamic.py --out runs/dynamic [--steps 1500] [--tune 900] [--rounds 21] [--threads 2] [--quick]

The embedded default's image stage (configs/stages/demo-1-images.yaml: 12x12 digits by class) is trained static, and
then goes on as each variant for equally many steps, static among them: dynamic ones by init.allow: [add_dynamic], as
the paper fine-tunes. FLOPs are counted by torch over whole sampling runs, of which also the time is taken: one process,
one thread, variants interleaved in an order drawn anew each round, process CPU time as a ratio to the static model's
within the round. The row `static (control)` is the static model again. A second call goes on where the first one
stopped.

The digits' model is so small that little of its time is spent in products. So time is also taken of DiT-S/2 and DiT-B/2
at 32x32 latents, untrained, with choices drawn at random: half of the heads, 7/10 of the MLP's groups and of the
tokens.

Prints two tables and appends them to benchmarks/results/dynamic.md (not with --quick).
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from stdit import extract, metrics_log
from stdit.config import (
    Bucket,
    Config,
    EvaluationConfig,
    ExtractConfig,
    ModelConfig,
    SamplerConfig,
    merge,
    read_extended,
    validate,
)
from stdit.data.digits import DigitsOptions, Shape, make_digits
from stdit.diffusion.guidance import guided
from stdit.diffusion.sample import sample
from stdit.diffusion.schedulers import make_scheduler
from stdit.evaluation.evaluator import evaluate_videos
from stdit.evaluation.validation_clips import validation_prompts, write_prompts
from stdit.generate import generate
from stdit.inference.pipeline import STDiTPipeline
from stdit.inference.prompts import read_prompts
from stdit.models.conditioning import ConditionInputs, encode_static, precompute_conditions
from stdit.models.sampling import CachedConditions
from stdit.models.stdit import STDiT
from stdit.ops import onednn
from stdit.train import train

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "dynamic.md"
STAGE = ROOT / "configs" / "stages" / "demo-1-images.yaml"
SHAPE = Bucket(frames=1, height=12, width=12)
SIDE = 32  # of DiT's latents
SAMPLER = SamplerConfig(scheduler="flow_euler", steps=20, guidance_scale=3.0)

WIDTH_AND_TOKENS = {"dynamic_width": True, "dynamic_tokens": True}
EXITS = [[0.8, 2], [0.5, 3]]


def learned(target: float, steps: int) -> dict[str, Any]:
    """A dynamic model trained for a share of the compute, which is reached a third of the way."""
    return {"target_flops_ratio": target, "weight": 2.0, "warmup_steps": steps // 3, "full_model_prob": 0.1}


def variants(steps: int) -> dict[str, dict[str, Any]]:
    """What each variant changes in the static model and in training."""
    return {
        "static": {},
        "dynamic 0.7": {"model": WIDTH_AND_TOKENS, "train": {"dynamic": learned(0.7, steps)}},
        "dynamic 0.5": {"model": WIDTH_AND_TOKENS, "train": {"dynamic": learned(0.5, steps)}},
        "dynamic 0.35": {"model": WIDTH_AND_TOKENS, "train": {"dynamic": learned(0.35, steps)}},
        "early exit": {"model": {"exit_depths": EXITS}},
        "dynamic 0.5, early exit": {
            "model": {**WIDTH_AND_TOKENS, "exit_depths": EXITS},
            "train": {"dynamic": learned(0.5, steps)},
        },
    }


# ------------------------------------------------------------------------------------------ training


def make_data(out: Path, quick: bool) -> Path:
    """The digits' images and their features; the manifest's path."""
    shape = Shape(SHAPE.frames, SHAPE.height, SHAPE.width, 8, 4)
    manifest = make_digits(out / "digits", DigitsOptions((shape,), grid=1, scans=200 if quick else 1797), workers=1)
    features: dict[str, Any] = {
        "manifest": str(manifest),
        "out": str(out / "features"),
        "buckets": [SHAPE.model_dump()],
        "video_encoder": {"kind": "pixels", "channels": 1},
        "decoder": "pyav",
        "batch_size": 128,
    }
    extract.run(validate(features, ExtractConfig, "digits"))
    return manifest


def train_one(out: Path, name: str, steps: int, changes: dict[str, Any], source: Path | None, quick: bool) -> Path:
    """The run directory of one variant; `source`: the run whose weights it begins with."""
    data = merge(read_extended(STAGE), changes)
    data["run_dir"] = str(out / name.replace(", ", " and ").replace(" ", "-"))
    data["data"]["features"] = str(out / "features")
    settings: dict[str, Any] = {"steps": steps, "checkpoint_every": steps, "tensorboard": False, "log_every": 50}
    if source is not None:
        settings["optimizer"] = {"learning_rate": 3e-3, "warmup_steps": min(50, steps)}
        data["init"] = {"source": str(source), "allow": ["add_dynamic"]}
    data = merge(data, {"train": settings, "validation": {"every": steps, "samples": 32 if quick else 256}})
    data["samples"] = {"sampler": SAMPLER.model_dump()}
    return train(validate(data, Config, f"{STAGE}, {name}"))


def last(run: Path, key: str) -> float | None:
    """The last value of `key` in a run's metrics."""
    entries = metrics_log.read(run / metrics_log.FILE)
    return next((entry[key] for entry in reversed(entries) if entry.get(key) is not None), None)


def accuracy(run: Path, manifest: Path, count: int) -> tuple[float, float]:
    """Accuracy of `count` generated digits, and their Fréchet distance to held-out ones."""
    prompts = run / "prompts.jsonl"
    rows = validation_prompts(manifest, count, SHAPE)
    write_prompts(prompts, [{k: v for k, v in row.items() if k != "prompt"} for row in rows])
    generate(run, read_prompts(prompts), run / "drawn", SHAPE, SAMPLER, batch_size=50)
    metrics = evaluate_videos(run / "drawn", manifest, EvaluationConfig(class_name="digit"), cache=run.parent)
    return metrics["class_accuracy"], metrics["frechet_distance"]


# ------------------------------------------------------------------------------------------ sampling


def sampler_of(run: Path, batch: int) -> Callable[[], torch.Tensor]:
    """Draws `batch` digits with guidance, as the pipeline does but for decoding."""
    pipe = STDiTPipeline.from_pretrained(run)
    model = pipe.transformer
    assert isinstance(model, STDiT)
    onednn.set_backend(model.eval())
    labels, steps = torch.arange(batch) % 10, SAMPLER.steps
    noise = torch.randn(batch, 1, 1, SHAPE.height, SHAPE.width, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def draw() -> torch.Tensor:
        scheduler = make_scheduler(SAMPLER, pipe.diffusion, (1, SHAPE.height, SHAPE.width))
        steered = guided(CachedConditions(model), SAMPLER.guidance_scale)
        return sample(steered, scheduler, noise, steps, {"class_labels": labels})

    return draw


def flops(draw: Callable[[], torch.Tensor]) -> float:
    with FlopCounterMode(display=False) as counter:
        draw()
    return float(counter.get_total_flops())


def ratios(draws: dict[str, Callable[[], Any]], rounds: int) -> dict[str, np.ndarray]:
    """CPU time of each over the first one's, per round."""
    random, seconds = np.random.default_rng(0), {name: [] for name in draws}
    for _ in range(rounds):
        for name in random.permutation(list(draws)):
            began = time.process_time()
            draws[name]()
            seconds[name].append(time.process_time() - began)
    base = np.array(seconds[next(iter(draws))])
    return {name: np.array(taken) / base for name, taken in seconds.items()}


def table(out: Path, args: argparse.Namespace) -> str:
    manifest = make_data(out, args.quick)
    base = train_one(out, "base", args.steps, {}, None, args.quick)
    runs = {
        name: train_one(out, name, args.tune, changes, base, args.quick)
        for name, changes in variants(args.tune).items()
    }
    torch.set_float32_matmul_precision("highest")  # training has set its own; sampling has torch's default
    count = 20 if args.quick else 400
    quality = {name: accuracy(run, manifest, count) for name, run in runs.items()}
    torch.set_num_threads(1)
    draws = {name: sampler_of(run, args.batch) for name, run in runs.items()}
    work = {name: flops(draw) for name, draw in draws.items()}
    times = ratios({"static": draws["static"], "static (control)": draws["static"], **draws}, args.rounds)
    lines = [
        f"\n{datetime.date.today()} · {platform.processor() or platform.machine()} · 12x12 digits, {args.steps} + "
        f"{args.tune} steps · {count} digits drawn, {SAMPLER.steps} steps, guidance {SAMPLER.guidance_scale} · batch of "
        f"{args.batch}, {args.rounds} rounds, one thread, CPU time over static's, median (quartiles)\n",
        "| model | FLOPs of sampling | time of sampling | compute in training | validation loss | digits | Fréchet |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, ratio in times.items():
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        taken = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        if name not in runs:
            lines.append(f"| {name} | | {taken} | | | | |")
            continue
        share, (digits, distance) = last(runs[name], "flops_ratio"), quality[name]
        lines.append(
            f"| {name} | {work[name] / work['static']:.2f} | {taken} | {'' if share is None else f'{share:.2f}'} | "
            f"{last(runs[name], 'validation_loss'):.4f} | {100 * digits:.1f} % | {distance:.2f} |"
        )
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- published sizes


@torch.no_grad()
def chosen_at_random(model: STDiT, latents: torch.Tensor) -> None:
    """Sets routers to half of the heads, 7/10 of the groups, and 7/10 of the tokens of `latents`."""
    generator = torch.Generator().manual_seed(0)
    # New blocks are the identity, so that all of them read what the first one reads.
    x, _ = model.embed_latents(latents, (1, SIDE // 2, SIDE // 2), None)
    for block in model.blocks:
        routers: Any = block.get_submodule("dynamic")
        for router, share in ((routers.heads, 0.5), (routers.groups, 0.7)):
            count = router.bias.numel()
            on = torch.randperm(count, generator=generator) < round(share * (count + 1)) - 1
            router.bias.copy_(torch.where(on, 5.0, -5.0))
        last = routers.tokens[2]
        last.weight.copy_(torch.randn(last.weight.shape, generator=generator))
        last.bias.zero_()
        last.bias.copy_(-routers.tokens(x).quantile(0.3))


def published(size: str, batch: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Two steps of a static and a dynamic DiT of patch 2, by class."""
    latents = torch.randn(batch, 4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for name, changes in (("static", {}), ("dynamic", WIDTH_AND_TOKENS)):
        settings = {"size": size, "conditioning": "adaln_zero", "num_classes": 1000, "temporal": False, **changes}
        model = STDiT.from_settings(validate(settings, ModelConfig, size)).eval()
        onednn.set_backend(model)
        if changes:
            chosen_at_random(model, latents)

        @torch.no_grad()
        def draw(model: STDiT = model) -> torch.Tensor:
            labels, x = torch.arange(batch), latents
            static = encode_static(model, ConditionInputs(class_labels=labels))
            for step in precompute_conditions(model, torch.tensor([900.0, 400.0]), static):
                x = model(latents, 0.0, conditions=step, return_dict=False)[0]
            return x

        calls[name] = draw
    return calls


def published_table(args: argparse.Namespace) -> str:
    lines = [
        f"\n{datetime.date.today()} · untrained, at random half of the heads, 7/10 of groups and tokens · batch of "
        f"{args.batch_published}, {SIDE}x{SIDE} latents, two steps, {args.rounds} rounds, one thread, CPU time\n",
        "| model | FLOPs | time | time of static again |",
        "|---|---|---|---|",
    ]
    for size in args.sizes:
        calls = published(size, args.batch_published)
        work = {name: flops(call) for name, call in calls.items()}
        times = ratios({"static": calls["static"], "control": calls["static"], **calls}, args.rounds)
        shown = {}
        for name, ratio in times.items():
            low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
            shown[name] = f"{middle:.2f} ({low:.2f} to {high:.2f})"
        share = work["dynamic"] / work["static"]
        lines.append(f"| DiT-{size}/2 | {share:.2f} | {shown['dynamic']} | {shown['control']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("runs/dynamic"))
    parser.add_argument("--steps", type=int, default=1500, help="of the static model")
    parser.add_argument("--tune", type=int, default=900, help="of each variant, from the static model's weights")
    parser.add_argument("--batch", type=int, default=50, help="digits that are drawn at a time where time is taken")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--sizes", nargs="*", default=["S", "B"], choices=("S", "B", "L", "XL"), help="of DiT")
    parser.add_argument("--batch-published", type=int, default=2, help="samples of DiT")
    parser.add_argument("--threads", type=int, default=2, help="in training")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.tune, args.batch, args.rounds, args.sizes = 6, 6, 4, 2, ["S"]
    torch.set_num_threads(args.threads)
    made = table(args.out, args) + "\n" + published_table(args)
    print(made)
    if not args.quick:
        with RESULTS.open("a") as file:
            file.write(made + "\n")


if __name__ == "__main__":
    main()
