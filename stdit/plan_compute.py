"""Which model to train with a budget of FLOPs: `stdit plan-compute --config FILE --budget 1e19 --out DIR`.

Trains a ladder of smaller runs below DIR: three sizes, the config's own and two narrower and shallower ones, each with
the config's FLOPs, half and a quarter of them (5.25 times the config's run in all); the same command again goes on.
Then it fits the validation loss (stdit.training.scaling_law) and writes DIR/proposal.yaml with the size and steps of
least loss at the budget, DIR/ladder.json with all numbers and DIR/ladder.png. The largest run is also predicted from
the others, as a check.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.config import Config, ConfigError, ModelConfig, apply_override, load_config, validate
from stdit.console import echo
from stdit.errors import CheckpointError, exit_code
from stdit.files import atomic_write
from stdit.outputs import claim_outputs

if TYPE_CHECKING:
    from stdit.training.scaling_law import Point, ScalingLaw

LADDER, PLOT, PROPOSAL = "ladder.json", "ladder.png", "proposal.yaml"
# Sizes of the ladder by hidden size and depth, and its budgets, as shares of the config's.
SIZES = (1.0, 0.71, 0.5)
BUDGETS = (1.0, 0.5, 0.25)
RESAMPLED = 100


@dataclass(frozen=True)
class Rung:
    """One run of the ladder. flops: of all its steps."""

    config: Config
    parameters: int
    flops: float

    @property
    def name(self) -> str:
        return self.config.run_dir.name


class Costs:
    """FLOPs of a config's steps on its data, which is opened once. ranks: of every run."""

    def __init__(self, config: Config, ranks: int) -> None:
        from stdit.training.data import open_data

        self.ranks, self.data = ranks, open_data(config, ranks)

    def steps(self, config: Config) -> Iterator[float]:
        """FLOPs of each step, without end."""
        from stdit.data.loader import BucketSchedule
        from stdit.training.machine import sample_cost

        ranks = config.train.data_ranks(self.ranks)
        train = config.train
        schedule = BucketSchedule(
            self.data.source, config.data, ranks, train.gradient_accumulation, train.packing_budget
        )
        flops = {}
        for bucket in config.data.buckets:
            samples = config.micro_batches(self.ranks)[bucket.key].samples
            cost = sample_cost(config, bucket, self.data.latents[bucket.key], self.data.text_tokens, samples)
            flops[bucket.key] = cost.training_flops
        position = dict.fromkeys(flops, 0)
        while True:
            step = schedule.plan_step(position)
            position = step.position
            yield float(sum(samples * flops[key] for key, samples in step.samples_by_bucket.items()))

    def total(self, config: Config) -> float:
        """FLOPs of the run."""
        return sum(flops for flops, _ in zip(self.steps(config), range(config.train.steps), strict=False))

    def steps_of(self, config: Config, budget: float) -> int:
        """Steps after which `budget` is spent. Those of large budgets follow from the mean of the first thousand."""
        spent, count = 0.0, 0
        for flops in self.steps(config):
            spent, count = spent + flops, count + 1
            if spent >= budget:
                return count
            if count == 1000:
                return round(budget / (spent / count))
        raise AssertionError("steps have no end")


def resized(config: Config, width: int) -> Config:
    """`config` with this hidden size, the same head width, and depth in proportion."""
    base, depth, heads = config.model.dimensions
    head = base // heads
    step = 2 if config.model.attention == "alternating" else 1
    size = {
        "size": None, "hidden_size": width, "num_heads": width // head,
        "depth": max(step, step * round(depth * width / base / step)),
    }  # fmt: skip
    model = validate({**config.model.model_dump(), **size}, ModelConfig, f"model of hidden_size {width}")
    return config.model_copy(update={"model": model})


def with_steps(config: Config, steps: int, run_dir: Path) -> Config:
    """`config` with so many steps, the warm-up in proportion, and validated and saved at the end alone."""
    optimizer = config.train.optimizer
    warmup = round(optimizer.warmup_steps * steps / config.train.steps)
    train = config.train.model_copy(
        update={
            "steps": steps, "checkpoint_every": steps, "keep_checkpoints": 1, "upload_to": None,
            "ema": config.train.ema.model_copy(update={"profiles": None}),
            "optimizer": optimizer.model_copy(update={"warmup_steps": min(warmup, steps)}),
        }
    )  # fmt: skip
    return config.model_copy(
        update={
            "train": train, "run_dir": run_dir, "name": run_dir.name,
            "validation": config.validation.model_copy(update={"every": steps}),
            "samples": config.samples.model_copy(update={"every": None}),
        }
    )  # fmt: skip


def make_ladder(config: Config, costs: Costs, out: Path) -> list[Rung]:
    """The ladder's runs, the largest first. ConfigError: sizes that round to the same, fewer than 8 steps."""
    from stdit.models.cost import parameter_count

    base, _, heads = config.model.dimensions
    head = base // heads
    widths = [max(1, round(base * share / head)) * head for share in SIZES]
    if len(set(widths)) < len(widths):
        raise ConfigError(
            f"model: hidden_size {base} of heads {head} wide has no two smaller sizes ({', '.join(map(str, widths))}); a ladder "
            "needs three: take more heads, or a larger hidden_size"
        )
    total, rungs = costs.total(config), []
    for share in BUDGETS:
        for width in widths:
            sized = resized(config, width)
            steps = costs.steps_of(sized, share * total)
            if steps < 8:
                raise ConfigError(
                    f"train.steps {config.train.steps}: a run of {share:g} of its FLOPs has {steps} steps"
                )
            rung = with_steps(sized, steps, out / f"width{width:05d}-steps{steps:07d}")
            rungs.append(Rung(rung, parameter_count(sized.model), costs.total(rung)))
    return rungs


def config_file(rung: Rung) -> Path:
    """Where a run's config is written for `stdit train`."""
    return rung.config.run_dir.with_suffix(".yaml")


def train_run(rung: Rung, processes: int) -> int:
    """Trains a run, or goes on with it; the exit code of `stdit train`."""
    import yaml

    file = config_file(rung)
    atomic_write(file, yaml.safe_dump(rung.config.model_dump(mode="json"), sort_keys=False))
    command = [sys.executable, "-m", "stdit.cli", "train", "--config", str(file), "--nproc", str(processes)]
    return subprocess.run(command, check=False).returncode


def final_loss(rung: Rung) -> float:
    """Validation loss after the last step. ConfigError: the run has none."""
    from stdit import metrics_log

    log = rung.config.run_dir / metrics_log.FILE
    losses = [
        e["validation_loss"]
        for e in metrics_log.read(log)
        if e.get("step") == rung.config.train.steps and "validation_loss" in e
    ]
    if not losses or losses[-1] is None:
        raise ConfigError(f"{log}: no validation_loss at step {rung.config.train.steps}")
    return float(losses[-1])


# ---------------------------------------------------------------------------------------- proposal


@dataclass(frozen=True)
class Proposal:
    """The config of least loss at a budget, and intervals of 80 % for its loss and for the best size."""

    config: Config
    parameters: int
    loss: float
    losses: tuple[float, float]
    sizes: tuple[float, float]


def propose(config: Config, costs: Costs, points: Sequence[Point], law: ScalingLaw, budget: float) -> Proposal:
    """What to train. ValueError: the ladder's losses do not tell sizes apart; ConfigError: the best size is none that a
    model may have."""
    from stdit.models.cost import parameter_count
    from stdit.training.scaling_law import interval, resampled

    best = law.best_parameters(budget)
    if not 0 < best < math.inf:
        what = "the model's size" if best == 0 else "the training FLOPs"
        raise ValueError(
            f"the ladder's losses do not depend on {what}: larger runs, or more different ones, would tell"
        )
    base, _, heads = config.model.dimensions
    head = base // heads
    high = base // head  # heads of the model that is sought; parameters rise with them
    while parameter_count(resized(config, high * head).model) < best:
        high *= 2
    low = 1
    while low < high:
        middle = (low + high) // 2
        larger = parameter_count(resized(config, middle * head).model) >= best
        low, high = (low, middle) if larger else (middle + 1, high)
    around = [resized(config, count * head) for count in (low, max(1, low - 1))]
    sized = min(around, key=lambda c: abs(math.log(parameter_count(c.model) / best)))
    parameters = parameter_count(sized.model)
    steps = costs.steps_of(sized, budget)
    laws = list(resampled(points, law, RESAMPLED))
    sizes = [size for one in laws if 0 < (size := one.best_parameters(budget)) < math.inf]
    return Proposal(
        with_steps(sized, steps, config.run_dir).model_copy(update={"name": config.name}), parameters,
        law.loss(parameters, budget), interval([one.loss(parameters, budget) for one in laws]), interval(sizes or [best]),
    )  # fmt: skip


def proposal_yaml(source: Path, overrides: Sequence[str], proposal: Proposal, budget: float) -> str:
    """A config that extends `source` with the ladder's `--set` and the proposal."""
    import yaml

    model, train = proposal.config.model, proposal.config.train
    data: dict[str, Any] = {}
    for text in overrides:
        data = apply_override(data, text)
    size = {"size": None, "hidden_size": model.hidden_size, "depth": model.depth, "num_heads": model.num_heads}
    data["model"] = {**data.get("model", {}), **size}
    own = data.get("train", {})
    optimizer = {**own.get("optimizer", {}), "warmup_steps": train.optimizer.warmup_steps}
    data["train"] = {**own, "steps": train.steps, "optimizer": optimizer}
    low, high = proposal.sizes
    return (
        f"# For {budget:.3g} FLOPs: {proposal.parameters / 1e6:,.1f} M parameters (80 %: {low / 1e6:,.1f} to {high / 1e6:,.1f} M), "
        f"validation loss {proposal.loss:.4f} (80 %: {proposal.losses[0]:.4f} to {proposal.losses[1]:.4f}). By stdit plan-compute.\n"
        f"{yaml.safe_dump({'extends': [str(source.resolve())], **data}, sort_keys=False, allow_unicode=True)}"
    )


def plot(points: Sequence[Point], law: ScalingLaw, budget: float, file: Path) -> None:
    """Measured losses over FLOPs by size, the law through them, and the best loss up to the budget."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for size in sorted({p.parameters for p in points}):
        own = sorted((p.flops, p.loss) for p in points if p.parameters == size)
        flops = np.geomspace(own[0][0] / 1.5, own[-1][0] * 1.5)
        (line,) = axes.plot(flops, [law.loss(size, c) for c in flops], lw=1)
        axes.plot(*zip(*own, strict=True), "o", color=line.get_color(), label=f"{size / 1e6:.3g} M parameters")
    wide = np.geomspace(min(p.flops for p in points), budget)
    best = [law.best_parameters(c) for c in wide]
    axes.plot(
        wide, [law.loss(n, c) for n, c in zip(best, wide, strict=True)], "k--", lw=1, label="best size at each budget"
    )
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


# ----------------------------------------------------------------------------------------- command


def arguments(prog: str = "stdit plan-compute") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the ladder's largest run")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one setting")
    parser.add_argument("--budget", type=float, required=True, help="training FLOPs of the run to plan, such as 1e19")
    parser.add_argument("--out", type=Path, required=True, help="folder of the ladder's runs and results")
    parser.add_argument("--nproc", type=int, default=1, help="processes of each run (one a GPU)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 1: a file cannot be written; 2: what cannot be used; else that of the run that did not end (75: the
    same command goes on)."""
    args = arguments().parse_args(argv)
    try:
        return plan(args, train_run)
    except (ValueError, CheckpointError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)


def plan(args: argparse.Namespace, run: Callable[[Rung, int], int]) -> int:
    """As `main`. run: trains one run of the ladder."""
    from stdit.training.derive import complete
    from stdit.training.resume import is_finished
    from stdit.training.scaling_law import Point, fit

    if not 0 < args.budget < math.inf or args.nproc < 1:
        raise ConfigError(f"--budget {args.budget:g}, --nproc {args.nproc}: expected numbers above 0")
    config = complete(load_config(args.config, Config, args.set))
    if config.train.lora or config.train.control:
        raise ConfigError("train.lora, train.control: a ladder trains whole models from new weights")
    if config.init is not None:
        raise ConfigError(
            f"init.source {config.init.source}: a ladder begins with new weights of every size; leave init out"
        )
    # Validation is on in every run of the ladder: opened so, the data are checked for clips of that split.
    costs = Costs(with_steps(config, config.train.steps, config.run_dir), args.nproc)
    rungs = make_ladder(config, costs, args.out)
    echo(
        f"a ladder of {len(rungs)} runs, {sum(r.flops for r in rungs):.3g} FLOPs in all, in {args.out}",
        flush=True,
    )
    claim_outputs(args.out, "plan-compute", [LADDER, PLOT, PROPOSAL, *(config_file(rung).name for rung in rungs)])
    for number, rung in enumerate(rungs, 1):
        if is_finished(rung.config, costs.data, args.nproc):
            continue
        echo(f"run {number}/{len(rungs)}: {describe(rung)}", flush=True)
        if code := run(rung, args.nproc):
            echo(f"error: {rung.config.run_dir}: training ended with exit code {code}", file=sys.stderr)
            return code
    points = [Point(rung.parameters, rung.flops, final_loss(rung)) for rung in rungs]
    for rung, point in zip(rungs, points, strict=True):
        echo(f"  {describe(rung)}, validation loss {point.loss:.4f}")
    law, without = fit(points), fit(points[1:])
    predicted = without.loss(points[0].parameters, points[0].flops)
    echo(
        f"loss = {law.irreducible:.4f} + {law.model:.4f} (N / {law.scale[0]:.3g})^-{law.alpha:.3f} + "
        f"{law.data:.4f} (C / N / {law.scale[1]:.3g})^-{law.beta:.3f}\n"
        f"check, the largest run from the other {len(points) - 1}: predicted {predicted:.4f}, measured {points[0].loss:.4f}"
    )
    found: dict[str, Any] = {
        "runs": [{"run": rung.name, **point._asdict()} for rung, point in zip(rungs, points, strict=True)],
        "law": vars(law), "largest_run": {"predicted": predicted, "measured": points[0].loss}, "budget": args.budget,
    }  # fmt: skip
    atomic_write(args.out / LADDER, json.dumps(found, indent=1) + "\n")  # also where there is no proposal
    proposal = propose(config, costs, points, law, args.budget)
    text = proposal_yaml(Path(args.config), args.set, proposal, args.budget)
    atomic_write(args.out / PROPOSAL, text)
    plot(points, law, args.budget, args.out / PLOT)
    found |= {
        "parameters": proposal.parameters, "steps": proposal.config.train.steps, "loss": proposal.loss,
        "loss_interval": proposal.losses, "parameters_interval": proposal.sizes,
    }  # fmt: skip
    atomic_write(args.out / LADDER, json.dumps(found, indent=1) + "\n")
    echo(f"{text}{args.out / PROPOSAL}")
    return 0


def describe(rung: Rung) -> str:
    """One run in a line."""
    width, depth, _ = rung.config.model.dimensions
    return (
        f"hidden_size {width}, depth {depth}, {rung.parameters / 1e6:.3g} M parameters, {rung.config.train.steps} steps, "
        f"{rung.flops:.3g} FLOPs"
    )


if __name__ == "__main__":
    sys.exit(main())
