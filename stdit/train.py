"""Trains one config: `stdit train`, or under a launcher

    deepspeed --num_gpus 2 stdit/train.py --config configs/debug.yaml --set run_dir=runs/debug
    torchrun --nproc_per_node 8 stdit/train.py --config …        python stdit/train.py --config …

The same command again resumes the run, bit for bit. On SIGTERM, SIGINT, SIGHUP or the launcher's death the current step
is finished, a checkpoint saved, and the exit code is 75: the same command goes on. So is that of a rank that hangs.
Exit code 2: the config is invalid or no checkpoint there is intact, nothing was started.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    # A script's own folder is first on sys.path, where stdit/data would shadow a module `data`; use the repository.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from stdit.training.stopping import STOPPED, Stop  # isort: skip  # First: it looks at the parent process.
from stdit.config import Config, ConfigError, load_config
from stdit.console import echo

if TYPE_CHECKING:
    import torch

    from stdit.data.loader import Step
    from stdit.models.sequence_parallel import SequenceParallel
    from stdit.training.data import TrainData
    from stdit.training.distributed import Ranks
    from stdit.training.resume import TrainState
    from stdit.training.watchdog import Watchdog


class Stopped(Exception):
    """The run was asked to stop and has saved a checkpoint."""


def train(config: Config, report: Callable[[dict[str, Any]], None] | None = None, stop: Stop | None = None) -> Path:
    """Trains `config` to its last step, from its newest checkpoint if there is one; returns the run directory.

    Every rank calls this. An existing process group (of a Ray Train worker) is used and left alone.
    report: called on every rank after each logged step, and each at which a checkpoint was completed, with the step's
    metrics and "checkpoint" (its path or None; written in the background, it is of an earlier step).
    stop: when it is set on any rank, all save a checkpoint and raise Stopped.

    Raises ConfigError and CheckpointError (no checkpoint there is intact) before anything is started, SaveError if a
    checkpoint cannot be written, Diverged if gradients or weights are not finite, OutOfMemory. A rank that hangs ends
    its process (stdit.training.watchdog).
    """
    from stdit.training.watchdog import Watchdog

    stop, rank = Stop() if stop is None else stop, int(os.environ.get("RANK", 0))
    while True:
        with closing(Watchdog(rank, config.run_dir, config.train, stop)) as watchdog:
            from stdit.training.lost_rank import LostRank, lost_connection  # imports may hang, too
            from stdit.training.spikes import Rewound

            try:
                return train_from_checkpoint(config, report, stop, watchdog)
            except Rewound as rewound:  # once more from the newest checkpoint, without the samples of the spike
                if rank == 0:
                    print_error(str(rewound))
            except RuntimeError as error:
                if watchdog.trains and (said := lost_connection(error)):
                    raise LostRank(f"{watchdog.where(error)}: the connection to another rank ended ({said})") from error
                raise
        gc.collect()  # the engine that was left


def train_from_checkpoint(
    config: Config, report: Callable[[dict[str, Any]], None] | None, stop: Stop, watchdog: Watchdog
) -> Path:
    """As `train`, which says what is what. Rewound: a loss spike with `train.on_spike: rewind`."""
    # Imported late, here and below, so that `--help` and invalid configs are answered at once.
    from stdit.training import mirror, resume, run_dir
    from stdit.training.data import open_data
    from stdit.training.derive import complete
    from stdit.training.distributed import world_size
    from stdit.training.machine import check_machine

    config = complete(config)
    config.micro_batches(world_size())  # checked before any work
    data = open_data(config, world_size())
    if resume.is_finished(config, data, world_size()):
        mirror.upload_finished(config)
        return config.run_dir
    check_machine(config, world_size(), data.latents, data.text_tokens)
    run_dir.check(config.run_dir)

    with ExitStack() as stack:
        trainer = Trainer(config, data, stop, watchdog, stack)
        for step, data_step in trainer.steps():
            metrics = trainer.train_step(step, data_step)
            metrics |= trainer.validate(step)
            logged = trainer.log(step, data_step, metrics)
            saved = trainer.save(step)
            if report and (logged or saved):
                report({**metrics, "checkpoint": saved and str(saved)})
            trainer.stop_if_asked(step, saved)
        trainer.finish()
    return config.run_dir


class Trainer:
    """A run from its newest checkpoint: its parts, and a method for each thing that a step does. All of them are
    collective."""

    def __init__(self, config: Config, data: TrainData, stop: Stop, watchdog: Watchdog, stack: ExitStack) -> None:
        """stack: closes what is opened here, in reverse order."""
        from stdit.data.loader import Loader
        from stdit.training import agreement, mirror, resume, run_dir
        from stdit.training.bad_steps import BadSteps
        from stdit.training.data import describe_data
        from stdit.training.distributed import sequence_group
        from stdit.training.engine import init_distributed
        from stdit.training.exchange import timed_collectives
        from stdit.training.inputs import Inputs
        from stdit.training.loss_groups import LossGroups
        from stdit.training.optimizer import last_stable_step
        from stdit.training.out_of_memory import MemoryErrors
        from stdit.training.performance import Performance, profiler
        from stdit.training.saving import Saver
        from stdit.training.spikes import positions_left_out
        from stdit.training.tracking import Tracker
        from stdit.training.validation import Validator

        self.config, self.stop, self.watchdog = config, stop, watchdog
        optimizer, last = config.train.optimizer, config.train.steps
        self.last_stable = last_stable_step(optimizer, last) if optimizer.lr_schedule == "wsd" else None
        self.ranks = ranks = init_distributed(config.train.sequence_parallel)
        stack.enter_context(run_dir.lock(config, ranks))
        agreement.check_ranks(config, ranks)
        with watchdog.saving():
            ranks.broadcast(lambda: mirror.fetch(config, data.fingerprint, ranks.size))
        self.memory = stack.enter_context(MemoryErrors(config, data, ranks))
        parallel = sequence_group(ranks)
        self.state, self.engine, self.ema = resume.restore(
            config, data, ranks, lambda model: prepare(model, config, ranks.device, parallel)
        )
        ranks.broadcast(lambda: run_dir.start(config))
        self.tracker = stack.enter_context(closing(Tracker(config, self.state.step, ranks.is_main)))
        self.tracker.print(describe(config, self.state, ranks))
        self.tracker.print(describe_data(config, data))
        self.inputs = Inputs(config, data.video_encoder, ranks.device, data.empty_caption, ranks.sequence_rank)
        self.validator = Validator(config, data, self.inputs, ranks)
        self.bad_steps, self.loss_groups = BadSteps(config, ranks, self.state), LossGroups(config.data)
        self.loader = Loader(
            data.source, config.data, config.seed, ranks.data_rank, ranks.data_size, config.train.gradient_accumulation,
            self.state.data_position, positions_left_out(self.bad_steps.rewinds), config.train.packing_budget,
        )  # fmt: skip
        self.performance = Performance(config, ranks, data, sum(self.loader.counts.values()))
        if ranks.size > 1:
            stack.enter_context(timed_collectives(lambda: self.performance.section("exchange")))
        self.profile = stack.enter_context(profiler(config, ranks, self.state.step + 1))
        self.uploads = mirror.RunMirror(config, ranks.is_main, self.tracker.print, watchdog.close)
        stack.enter_context(closing(self.uploads))
        ranks.broadcast(self.uploads.begin)
        self._start = time.perf_counter()
        self.saver = Saver(self.engine, self.ema, config, data, self.state, ranks, self.tracker.print, watchdog.saving)
        stack.enter_context(closing(self.saver))
        stop.start_training()

    def steps(self) -> Iterator[tuple[int, Step]]:
        """The steps that are left, each with its data; waiting for them is part of a step's seconds."""
        numbers = range(self.state.step + 1, self.config.train.steps + 1)
        for step, data_step in zip(numbers, self.performance.waiting(self.loader), strict=False):
            self.watchdog.start_step(step)
            self.memory.start_step(step, data_step.key)
            yield step, data_step
            self.profile()
            self._start = time.perf_counter()

    def train_step(self, step: int, data_step: Step) -> dict[str, Any]:
        """Forward and backward of each micro-batch, and the optimizer's step; returns what is logged of them."""
        import torch

        from stdit.training.optimizer import learning_rate

        timed, n = self.performance.section, len(data_step.batches)
        sums, sample_losses, times = torch.zeros(3, device=self.ranks.device), [], []
        for i, batch in enumerate(data_step.batches):
            with timed("forward"):
                loss = self.inputs.loss(self.engine, batch, step)
            sums += loss.logged * batch.weight
            sample_losses.append(loss.each)
            times.append(loss.times)
            with timed("backward"):
                total = self.bad_steps.spikes.veto(loss.total * batch.weight, sums, data_step, i)
                self.engine.backward(total, n)
        lr = learning_rate(self.config.train.optimizer, step, self.config.train.steps)
        with timed("optimizer"):
            grad_norm = self.engine.step(lr)
            finite = math.isfinite(grad_norm)  # else no weights were updated, on any rank
            if finite:
                self.ema.update(step)
        self.state.advance(data_step.samples, data_step.position)
        self.performance.count(data_step)

        # One exchange for all that the ranks have to know of each other.
        means = (value / n / self.ranks.size for value in sums.tolist())
        asked = (float(bool(self.stop)), float(self.stop.takes_checkpoint()), *self.saver.status)
        groups = self.loss_groups.sums(data_step, times, sample_losses)
        with timed("exchange"):
            mean_loss, flops_ratio, alignment, *others = self.ranks.all_reduce(*means, *asked, *groups)
        self._asked = others[: len(asked)]
        metrics: dict[str, Any] = {
            "step": step, "loss": mean_loss, "learning_rate": lr, "grad_norm": grad_norm, "bucket": data_step.key,
            "samples_seen": self.state.samples_seen, "seconds": round(time.perf_counter() - self._start, 4),
        }  # fmt: skip
        if self.config.train.dynamic:
            metrics["flops_ratio"] = flops_ratio
        if self.config.train.alignment:
            metrics["alignment_loss"] = alignment
        metrics |= {f"samples_seen/{name}": n for name, n in self.loader.samples_by_set(data_step.position).items()}
        metrics |= self.loss_groups.metrics(others[len(asked) :])
        return metrics | self.bad_steps.metrics(step, data_step, sample_losses, mean_loss, finite)

    def validate(self, step: int) -> dict[str, Any]:
        """Validation and sample videos, where they are due."""
        with self.performance.section("validation"):
            metrics = self.validator.run(self.engine, self.ema, self.tracker, step)
        self.state.validation_loss = metrics.get("validation_loss")
        return metrics

    def log(self, step: int, data_step: Step, metrics: dict[str, Any]) -> bool:
        """Whether the step was logged. Rewound, Diverged: what `train.on_spike` and `train.max_bad_steps` say of it."""
        self.bad_steps.keep(self.state)
        logged = self.tracker.step(metrics, self.performance)
        self.bad_steps.check(step, data_step, metrics["loss"], self.saver)
        return logged

    def save(self, step: int) -> Path | None:
        """Saves a checkpoint, or begins to, if one is due or a rank is asked for it; returns the one completed
        meanwhile."""
        from stdit.training.tracking import is_due

        last, every = self.config.train.steps, self.config.train.checkpoint_every
        stops, requested, *writing = self._asked
        ends = bool(stops) or step == last
        due = ends or bool(requested) or step == self.last_stable or is_due(every, step, last)
        if not due and not self.saver.is_over(*writing):
            return None
        with self.performance.section("checkpoint"):
            saved = self.saver.save(last=ends) if due else self.saver.finish()
        self.performance.count_save(self.saver.background_seconds)
        if saved:
            self.uploads.update()
        return saved

    def stop_if_asked(self, step: int, saved: Path | None) -> None:
        """Stopped: a rank was asked to stop, and the checkpoint is written."""
        from stdit.training import run_dir

        stops = self._asked[0]
        if saved and stops and step < self.config.train.steps:
            reason = self.stop.reason or "requested on another rank"
            self.tracker.print(
                f"stopped after step {step} ({reason}); run the same command again to resume from {saved}"
            )
            run_dir.write_stopped(self.config, saved, reason, self.ranks)
            raise Stopped(str(saved))

    def finish(self) -> None:
        """After the last step."""
        from stdit.training import run_dir
        from stdit.training.data import describe_sets

        samples_by_set = self.loader.samples_by_set(self.state.data_position)
        for line in (self.bad_steps.skipped.summary(), describe_sets(samples_by_set)):
            if line:
                self.tracker.print(line)
        run_dir.write_done(self.config, self.state.step, self.state.samples_seen, self.ranks)
        self.tracker.print(self.performance.summary())
        self.engine.close()
        self.uploads.finish()


def prepare(model: Any, config: Config, device: torch.device, parallel: SequenceParallel | None = None) -> Any:
    """Applies the run's settings to `model`: sequence parallelism, token routing, activation checkpointing, attention
    and matmul backends, compilation."""
    import torch

    from stdit.models.fine_tuning import submodels
    from stdit.ops import onednn

    # Global in torch, so it is set for every run.
    torch.set_float32_matmul_precision(config.train.matmul_precision)
    model.train()
    for part in submodels(model):
        part.set_sequence_parallel(parallel)
        part.set_token_routing(config.train.token_routing)
        if config.train.activation_checkpointing:
            part.enable_gradient_checkpointing()
        if config.train.attention_backend:
            part.set_attention_backend(config.train.attention_backend)
        if config.train.compile:
            # ZeRO-3 gathers a block's weights in hooks, where the graph breaks.
            part.compile_repeated_blocks(fullgraph=config.train.zero_stage < 3)
    if device.type == "cpu":
        onednn.set_backend(model, config.train.cpu_matmul_backend)
    return model


def describe(config: Config, state: TrainState, ranks: Ranks) -> str:
    """First lines of the log."""
    setup = f"{ranks.size} x {ranks.device.type}, {config.train.precision}, ZeRO-{config.train.zero_stage}"
    if ranks.sequence_parallel > 1:
        setup += f", {ranks.data_size} data parallel x {ranks.sequence_parallel} sequence parallel"
    lines = [f"{config.name}: {config.train.steps} steps on {setup}, into {config.run_dir}"]
    if state.checkpoint:
        lines.append(f"resumes after step {state.step}, from {state.checkpoint}")
    return "\n".join([*lines, *state.report, *(f"changed since: {note}" for note in state.notes)])


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
    stop, code, config = Stop().listen(), 1, None
    from stdit.errors import CheckpointError, SaveError

    try:
        config = load_config(args.config, Config, args.set)
        try:
            train(config, stop=stop)
            code = 0
        except Stopped:
            code = STOPPED
        from stdit.training.distributed import destroy_process_group

        destroy_process_group()
    except (ConfigError, CheckpointError) as error:
        code = 1 if isinstance(error, SaveError) else 2
        if code == 1:
            record_for_others(error, config)
        if prints_error(error, stop):
            print_error(f"error: {error}")
    except Exception as error:  # a fault of the program too: the others have to hear of it
        import traceback

        from stdit.training.lost_rank import LostRank, find_failure

        if config is not None and isinstance(error, LostRank):
            failure = find_failure(config.run_dir, int(os.environ.get("RANK", 0)))
            code = 1 if failure else STOPPED
            print_error(f"{error}. {failure or PEER_GONE}")
        else:
            record_for_others(error, config)
            if not getattr(error, "shared", False):
                print_error(traceback.format_exc().rstrip())
            if prints_error(error, stop):
                said = str(error) if isinstance(error, OSError | RuntimeError | ValueError) else repr(error)
                print_error(f"error: {said}")
    with contextlib.suppress(OSError):  # a terminal or pipe that is gone
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: a rank that fails must not wait, in libraries' exit handlers, for others that wait for it.
    os._exit(code)


# A rank that finds its config invalid waits so long for its host's first one to say so and for the launcher to end all.
PEER_WAIT_S = 3.0


# Of a rank whose connection ended, where no other one says that it failed.
PEER_GONE = f"That process, or its host, is gone. This rank ends with code {STOPPED}, and the same command goes on from the newest checkpoint"


def record_for_others(error: Exception, config: Config | None) -> None:
    """Leaves `error` to the ranks whose connections to this one end now, if it is this one's own."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if config is not None and several and has_process_group() and not getattr(error, "shared", False):
        from stdit.training.lost_rank import record_failure

        record_failure(config.run_dir, int(os.environ.get("RANK", 0)), error)


def has_process_group() -> bool:
    """Whether there is a process group."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()


def prints_error(error: Exception, stop: Stop) -> bool:
    """Whether this rank has to say `error`. Rank 0 says what all raise (`shared`); what is found before the ranks have
    met, a host's first, unless it finds nothing wrong."""
    if getattr(error, "shared", False):
        return os.environ.get("RANK", "0") == "0"
    if has_process_group() or not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    stop.start_training()  # a signal ends waiting, not the process
    return not stop.wait(PEER_WAIT_S)


def print_error(message: str) -> None:
    """Prints an error to stderr, with the rank if there are several."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    with contextlib.suppress(OSError):
        echo(f"[rank {os.environ.get('RANK', 0)}] {message}" if several else message, file=sys.stderr)


if __name__ == "__main__":
    main()
