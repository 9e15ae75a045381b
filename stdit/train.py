"""Training: the one loop.

    deepspeed --num_gpus 2 stdit/train.py --config configs/debug.yaml --set run_dir=runs/debug
    torchrun --nproc_per_node 8 stdit/train.py --config …        python stdit/train.py --config …

Run the same command again to go on where it stopped, bit for bit. SIGTERM, SIGINT or the launcher's death: the step is
ended, a checkpoint is written, and the exit code is 75. Exit code 2: the config cannot be used, and nothing was begun.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # A script's own folder stands first, where stdit/data would be `data`; the repository stands there instead.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stdit.config import Config, ConfigError, load_config

if TYPE_CHECKING:
    from torch import Tensor

    from stdit.data.loader import Batch
    from stdit.training.distributed import Ranks, Stop
    from stdit.training.engine import Engine
    from stdit.training.inputs import Inputs
    from stdit.training.resume import Place


class Stopped(Exception):
    """The run was asked to stop and has written a checkpoint."""


class Diverged(RuntimeError):
    """Too many steps in a row had a gradient that is not a number."""


def train(config: Config, report: Callable[[dict[str, Any]], None] | None = None, stop: Stop | None = None) -> Path:
    """Trains `config` to its last step, from its newest checkpoint if there is one; returns the run directory.

    Every rank calls this. Where the ranks are joined already (in a Ray Train worker) they stay so.
    report: called on every rank after each logged or saved step with what was logged and "checkpoint" (a path or None).
    stop: when set, on any rank, all save and raise Stopped.

    Raises ConfigError before anything is begun, CheckpointError where a checkpoint cannot be read or written, Diverged.
    """
    # Late, so that `--help` and wrong configs are answered at once.
    from stdit.data.loader import Loader
    from stdit.diffusion.objectives import make_objective
    from stdit.ops import onednn
    from stdit.training import resume
    from stdit.training.checks import check
    from stdit.training.derive import complete
    from stdit.training.distributed import world_size
    from stdit.training.ema import EMA
    from stdit.training.engine import Engine, start_ranks
    from stdit.training.inputs import Inputs
    from stdit.training.optimizer import learning_rate
    from stdit.training.tracking import Tracker
    from stdit.training.validation import Preview

    config = complete(config)
    data = check(config)
    if resume.finished(config, data, world_size()):
        return config.run_dir
    ranks = start_ranks()
    place = ranks.agree(lambda: resume.place_of(config, data, ranks.size))
    resume.begin(config, ranks)

    with closing(Tracker(config, place.step, ranks.first)) as tracker:
        tracker.say(describe(config, place, ranks))
        model = prepare(resume.make_model(config, place, ranks, tracker.say), config)
        if ranks.device.type == "cpu":
            onednn.set_backend(model, config.train.cpu_matmul_backend)
        engine = Engine(model, config, ranks, resume.needs_conversion(place, config.train.zero_stage, ranks.size))
        ema = EMA(engine.masters, config.train.ema)
        if place.checkpoint:
            resume.load(engine, place, ranks)

        inputs = Inputs(
            config,
            data.video_encoder,
            make_objective(config.diffusion, config.model.learned_variance),
            ranks.device,
            data.empty_caption,
        )
        preview = Preview(config, data, inputs, ranks)
        accumulation, steps = config.train.gradient_accumulation, config.train.steps
        loader = Loader(
            data.source, config.data, config.seed, ranks.rank, ranks.size, accumulation, place.data_position
        )
        bad_steps = 0

        began = time.perf_counter()
        for number, step in zip(range(place.step + 1, steps + 1), loader, strict=False):
            losses, shares = zip(*(backward(engine, inputs, batch, number) for batch in step.batches), strict=True)
            rate = learning_rate(config.train.optimizer, number, steps)
            norm = engine.step(rate)
            # One exchange for all that the ranks must agree on; the gradient norm they share already.
            means = (float(sum(each)) / accumulation / ranks.size for each in (losses, shares))
            loss, compute, stops = ranks.total(*means, float(bool(stop)))
            if math.isfinite(norm):
                ema.update(number)
            bad_steps = 0 if math.isfinite(norm) else bad_steps + 1

            place.advance(step.samples, step.position)
            entry: dict[str, Any] = {
                "step": number, "loss": loss, "learning_rate": rate, "grad_norm": norm, "bucket": step.bucket.key,
                "samples_seen": place.samples_seen, "seconds": round(time.perf_counter() - began, 4),
            }  # fmt: skip
            if config.train.dynamic:
                entry["compute"] = compute
            if bad_steps:
                entry["bad_steps"] = bad_steps
                tracker.say(
                    f"step {number}: the gradient is not a number; no rank's weights were changed ({bad_steps} in a row)"
                )
            last = number == steps
            entry |= preview.look(engine, ema, tracker, number, last)
            logged = bool(bad_steps) or "validation_loss" in entry or due(config.train.log_every, number, last)
            if logged:
                tracker.log(entry)
            tracker.advance(loss=f"{loss:.4f}")
            if bad_steps > config.train.max_bad_steps:
                raise Diverged(
                    f"step {number}: {bad_steps} steps in a row had a gradient that is not a number; train.max_bad_steps is {config.train.max_bad_steps}"
                )

            saved = None
            if stops or last or due(config.train.checkpoint_every, number, last):
                saved = resume.save(engine, ema, config, data, place, ranks)
            if report and (logged or saved):
                report({**entry, "checkpoint": saved and str(saved)})
            if stops and not last:
                reason = stop.reason if stop else "asked on another rank"
                tracker.say(f"stopped after step {number} ({reason}); run the same command again to go on from {saved}")
                raise Stopped(str(saved))
            began = time.perf_counter()

        resume.finish(config, place, ranks)
        engine.close()
    return config.run_dir


def backward(engine: Engine, inputs: Inputs, batch: Batch, step: int) -> tuple[Tensor, Tensor | float]:
    """Adds one micro-batch's gradients; its mean loss, detached, and the share of the model's compute that it took."""
    from stdit.training.dynamic_loss import flops_loss
    from stdit.training.inputs import condition_of

    x0 = inputs.latents(batch, step)
    noise = inputs.noise(x0, "noise", step, batch.positions)
    t = inputs.times(x0, step, batch.positions)
    condition = inputs.dropped(condition_of(batch, inputs.config.model, inputs.device), step, batch.positions)
    condition |= inputs.control(batch, x0, step) | inputs.choices(step, batch.positions)
    inputs.seed_layers(step, batch.positions)
    given = inputs.given(x0, step, batch.positions)
    if given is not None:
        condition["conditioning_frames"] = given
    used = []

    def predict(x: Tensor, s: Tensor) -> Tensor:
        prediction, *rest = engine(x, s, **condition, return_dict=False)
        used.extend(rest)
        return prediction

    loss = inputs.objective.loss(predict, x0, noise, t, given).mean()
    wanted, cost, share = inputs.config.train.dynamic, 0.0, 1.0
    if wanted is not None:
        cost, share = flops_loss(wanted, used[0], condition["force_full"], step)
    engine.backward(loss + cost)
    return loss.detach(), share


def due(every: int | None, step: int, last: bool) -> bool:
    """Whether something that happens `every` so many steps, and at the last one, happens at `step`."""
    return every is not None and (last or step % every == 0)


def prepare(model: Any, config: Config) -> Any:
    """`model` with what a run asks of it: recomputed activations, an attention back end, compiled blocks."""
    import torch

    from stdit.training.adapters import parts

    # torch keeps this for the whole process, so it is set for every run.
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    model.train()
    for part in parts(model):
        if config.train.activation_checkpointing:
            part.enable_gradient_checkpointing()
        if config.train.attention_backend:
            part.set_attention_backend(config.train.attention_backend)
        if config.train.compile:
            # ZeRO-3 fetches a block's weights by hooks, which no graph takes in: it breaks there.
            part.compile_repeated_blocks(fullgraph=config.train.zero_stage < 3)
    return model


def describe(config: Config, place: Place, ranks: Ranks) -> str:
    """What a run says of itself when it begins."""
    how = f"{ranks.size} x {ranks.device.type}, {config.train.precision}, ZeRO-{config.train.zero_stage}"
    lines = [f"{config.name}: {config.train.steps} steps on {how}, into {config.run_dir}"]
    if place.checkpoint:
        lines.append(f"goes on after step {place.step}, from {place.checkpoint}")
    return "\n".join(lines + [f"changed since: {note}" for note in place.notes])


def arguments(prog: str = "stdit/train.py") -> argparse.ArgumentParser:
    """The command line of one rank."""
    parser = argparse.ArgumentParser(
        prog,
        description="Train a spatial-temporal diffusion transformer.",
        epilog="Run the same command again to resume.",
    )
    parser.add_argument("--config", required=True, help="YAML file (docs/config.md: train)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one setting; may be given several times"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it.
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    code = 1
    try:
        config = load_config(args.config, Config, args.set)
        from stdit.training.distributed import STOPPED, Stop, leave

        try:
            train(config, stop=Stop().listen())
            code = 0
        except Stopped:
            code = STOPPED
        leave()
    except ConfigError as error:
        complain(f"error: {error}")
        code = 2
    except (OSError, RuntimeError, ValueError) as error:
        # Also what a rank is told when another one has died; that one's own message says why.
        import traceback

        traceback.print_exc()
        complain(f"error: {error}")
    # Not sys.exit: a rank that fails must not wait, in libraries' exit handlers, for others that wait for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def complain(message: str) -> None:
    """Says on stderr what went wrong, with the rank if there are several: which one comes first is chance."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    print(f"[rank {os.environ.get('RANK', 0)}] {message}" if several else message, file=sys.stderr)


if __name__ == "__main__":
    main()
