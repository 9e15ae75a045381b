"""What the ranks of a pool run: module-level, so that they find it by name."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any, cast

import torch

from stdit import metrics_log
from stdit.config import Config, merge, validate


def settings(run_dir: Path | str, **changes: Any) -> dict[str, Any]:
    """A tiny run: two layers, class labels and text, 8 samples a step; `changes` are merged over its sections."""
    base: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 1, "num_classes": 4, "text_dim": 8, "max_text_tokens": 12},
        "diffusion": {"label_dropout": 0.3, "caption_dropout": 0.3},
        "data": {"features": "synthetic", "buckets": [{"frames": 2, "height": 8, "width": 8, "batch_size": 4}, {"frames": 1, "height": 8, "width": 8, "batch_size": 8}]},
        "train": {"steps": 6, "tensorboard": False, "ema": {"decay": 0.9}, "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3, "weight_decay": 0.01}},
    }  # fmt: skip
    return merge(base, changes)


def for_ranks(size: int) -> list[dict[str, Any]]:
    """Buckets of the same global batches on `size` ranks: 8 clips, 16 images."""
    return [
        {"frames": 2, "height": 8, "width": 8, "batch_size": 8 // size},
        {"frames": 1, "height": 8, "width": 8, "batch_size": 16 // size},
    ]


def config_of(data: dict[str, Any]) -> Config:
    return validate(data, Config, "test")


def run(data: dict[str, Any], stop_after: int | None = None, save_after: int | None = None) -> dict[str, Any]:
    """Trains; what rank 0 wrote to metrics.jsonl, what was reported, and what was said on stderr.

    stop_after: asks this rank alone to stop after that step (2 or more). save_after: likewise for a checkpoint.
    """
    from stdit.train import Stopped, train
    from stdit.training.stopping import Stop

    stop, reports, said = Stop(), [], io.StringIO()

    def report(entry: dict[str, Any]) -> None:
        reports.append(entry)
        # Looked at when the next step ends.
        if stop_after is not None and entry["step"] == stop_after - 1:
            stop.request("a test asked")
        if save_after is not None and entry["step"] == save_after - 1:
            stop.request_checkpoint()

    stopped = False
    with contextlib.redirect_stderr(said):
        try:
            train(config_of(data), report, stop)
        except Stopped:
            stopped = True
    return {"metrics": metrics(data["run_dir"]), "reports": reports, "stopped": stopped, "said": said.getvalue()}


def run_with_another_sampler(data: dict[str, Any]) -> dict[str, Any]:
    """As `run`, with a sampler whose predictions are half as large."""
    from unittest.mock import patch

    from stdit.models.sampling import CachedConditions

    bind = CachedConditions.bind

    def halved(self: CachedConditions, *args: Any) -> Any:
        step_model = bind(self, *args)
        return lambda x, i: 0.5 * step_model(x, i)

    with patch.object(CachedConditions, "bind", halved):
        return run(data)


def run_recorded(data: dict[str, Any], stop_after: int | None = None) -> dict[str, Any]:
    """As `run`, with "samples": (step, bucket, position, id, timestep, sum of its noise) of every sample of this
    rank."""
    from unittest.mock import patch

    from stdit.training.inputs import Inputs

    loss, samples = Inputs.loss, []

    def recorded(self: Inputs, model: Any, batch: Any, step: int) -> Any:
        for part in batch.parts:
            x0 = self.latents(part, step)
            times, noise = self.timesteps(x0, step, part.positions), self.noise(x0, "noise", step, part.positions)
            sums = noise.flatten(1).sum(1).tolist()
            for entry in zip(part.positions, part.ids, times.tolist(), sums, strict=True):
                samples.append((step, part.bucket.key, *entry))
        return loss(self, model, batch, step)

    with patch.object(Inputs, "loss", recorded):
        return {**run(data, stop_after), "samples": samples}


def run_with_spike(data: dict[str, Any], at: int, times: int = 1) -> dict[str, Any]:
    """Trains; the first `times` times that step `at` is taken, its loss is 50 times as large. "spikes": its losses;
    "changed": whether weights changed, by step; "positions": (step, first position) of every step taken."""
    from unittest.mock import patch

    from stdit.training.engine import Engine
    from stdit.training.inputs import Inputs

    loss, step_of_engine = Inputs.loss, Engine.step
    spikes, changed, positions, now = [], {}, [], {"step": 0, "left": times, "micro": 0}

    def spiking(self: Inputs, model: Any, batch: Any, step: int) -> Any:
        if step != now["step"]:
            now["step"], now["spiking"] = step, step == at and now["left"] > 0
            now["left"] -= now["spiking"]
            positions.append((step, min(batch.positions)))
        found = loss(self, model, batch, step)
        if now["spiking"]:
            found = found._replace(total=found.total * 50, logged=found.logged * 50, each=found.each * 50)
            spikes.append(float(found.logged[0]))
        return found

    def watched(self: Engine, learning_rate: float) -> float:
        before = [tensor.detach().clone() for tensor in self.masters()]
        norm = step_of_engine(self, learning_rate)
        changed[now["step"]] = any(not torch.equal(a, b) for a, b in zip(before, self.masters(), strict=True))
        return norm

    with patch.object(Inputs, "loss", spiking), patch.object(Engine, "step", watched):
        found = run(data)
    return {**found, "spikes": spikes, "changed": changed, "positions": positions}


def run_out_of_memory(data: dict[str, Any], at: int) -> dict[str, Any]:
    """Trains; at step `at` the forward pass wants 2**60 bytes."""
    from unittest.mock import patch

    from stdit.training.inputs import Inputs

    loss = Inputs.loss

    def greedy(self: Inputs, model: Any, batch: Any, step: int) -> Any:
        if step == at:
            torch.empty(2**60, dtype=torch.uint8)
        return loss(self, model, batch, step)

    with patch.object(Inputs, "loss", greedy):
        return run(data)


def run_with_full_disk(data: dict[str, Any], steps: list[int], rank: int = 0) -> dict[str, Any]:
    """Trains; on one rank, saves of these steps fail in torch's writer, as on a full disk."""
    import os
    from unittest.mock import patch

    save = torch.save

    def failing(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        full = any(f"step-{step:08d}" in str(path) for step in steps) and int(os.environ["RANK"]) == rank
        if full:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        save(content, path, *args, **kwargs)

    with patch.object(torch, "save", failing):
        return run(data)


def run_with_slow_writes(data: dict[str, Any], steps: int, fail_at: int | None = None) -> dict[str, Any]:
    """Trains; a checkpoint in the background is not written before `steps` more steps have changed the weights.
    "writes": what this rank's writers did, with the steps taken by then. fail_at: that step's forward pass raises, once
    a write has been going on for a second."""
    import threading
    import time
    from unittest.mock import patch

    from deepspeed.runtime.zero.partition_parameters import Init

    from stdit.training.checkpoint import step_of
    from stdit.training.engine import Engine
    from stdit.training.inputs import Inputs
    from stdit.training.saving import Write

    Init.param_id = 0  # ZeRO-3 writes the numbers of parameters, which count on within a process
    run_write, step_of_engine, loss = Write.run, Engine.step, Inputs.loss
    taken, writes, changed = 0, [], threading.Condition()

    def stepping(self: Engine, learning_rate: float) -> float:
        nonlocal taken
        norm = step_of_engine(self, learning_rate)
        with changed:
            taken += 1
            changed.notify_all()
        return norm

    def slow(self: Write) -> None:
        begun = step_of(self.folder)
        writes.append((self.folder.name, "begins", begun))
        with changed:
            if self.background and fail_at is None:
                assert changed.wait_for(lambda: taken >= begun + steps, 60), "training does not go on"
        if fail_at is not None:
            time.sleep(1)
        run_write(self)
        writes.append((self.folder.name, "ends", taken))

    def failing(self: Inputs, model: Any, batch: Any, step: int) -> Any:
        if step == fail_at:
            raise ValueError("a test asked")
        return loss(self, model, batch, step)

    with (
        patch.object(Write, "run", slow),
        patch.object(Engine, "step", stepping),
        patch.object(Inputs, "loss", failing),
    ):
        return {**run(data), "writes": writes}


def run_with_hanging_writes(data: dict[str, Any], after: int) -> dict[str, Any]:
    """Trains; checkpoints of steps beyond `after` are written but for their mark, and then their writer waits for
    ever."""
    import time
    from unittest.mock import patch

    from stdit.training import checkpoint

    mark = checkpoint.write_rank_mark

    def hanging(partial: Path, rank: int, files: Any) -> None:
        if int(partial.name.split("-")[1].split(".")[0]) > after:
            time.sleep(3600)
        mark(partial, rank, files)

    with patch.object(checkpoint, "write_rank_mark", hanging):
        return run(data)


def run_failing_on_a_dead_disk(data: dict[str, Any], at: int) -> dict[str, Any]:
    """Trains; checkpoints are written but for their mark, and then their writer waits for ever. The forward pass of
    step `at` raises, and from then on the watchdog waits a second."""
    from unittest.mock import patch

    from stdit.training.inputs import Inputs
    from stdit.training.watchdog import Watchdog

    loss, make, dogs = Inputs.loss, Watchdog.__init__, []

    def made(self: Watchdog, *args: Any) -> None:
        dogs.append(self)
        make(self, *args)

    def failing(self: Inputs, model: Any, batch: Any, step: int) -> Any:
        if step == at:
            dogs[-1].limit_s = 1.0
            raise ValueError("a test asked")
        return loss(self, model, batch, step)

    with patch.object(Inputs, "loss", failing), patch.object(Watchdog, "__init__", made):
        return run_with_hanging_writes(data, 0)


def run_hanging_at_start(data: dict[str, Any]) -> list[str]:
    """Trains; building the model takes until the watchdog ends the process, had it not been for the test: (reason,
    phase)."""
    import threading
    from types import SimpleNamespace
    from unittest.mock import patch

    from stdit.training import resume
    from stdit.training.watchdog import Watchdog

    make, dogs, found, ended = Watchdog.__init__, [], [], threading.Event()

    def made(self: Watchdog, *args: Any) -> None:
        dogs.append(self)
        make(self, *args)

    def end(self: Watchdog, reason: str) -> None:
        found[:] = [reason, self._phase()]
        ended.set()

    def from_settings(*_: Any) -> None:
        dogs[-1].start_s = 0.1
        assert ended.wait(60)
        raise ValueError("a test asked")

    with (
        patch.object(resume, "STDiT", SimpleNamespace(from_settings=from_settings)),
        patch.object(Watchdog, "__init__", made),
        patch.object(Watchdog, "_end", end),
        contextlib.suppress(ValueError),
    ):
        run(data)
    return found


def run_with_spike_before_a_checkpoint_is_written(data: dict[str, Any], at: int, saved: int) -> dict[str, Any]:
    """As `run_with_spike`; the checkpoint of step `saved` is still on its way then, and rank 1 takes a second for its
    part, while no file changes. Where a run ends by an error, rank 0 would wait for a quarter of it."""
    import threading
    import time
    from unittest.mock import patch

    from stdit.training import bad_steps, checkpoint, saving

    mark, rewind, goes_back = checkpoint.write_rank_mark, bad_steps.rewind, threading.Event()

    def late(partial: Path, rank: int, files: Any) -> None:
        if partial.name.startswith(checkpoint.folder_of_step(saved)) and not goes_back.is_set():
            assert goes_back.wait(60)
            time.sleep(rank)
        mark(partial, rank, files)

    def going_back(*args: Any) -> None:
        rewind(*args)
        goes_back.set()

    with (
        patch.object(checkpoint, "write_rank_mark", late),
        patch.object(bad_steps, "rewind", going_back),
        patch.object(saving, "ORPHAN_S", 0.25),
    ):
        return run_with_spike(data, at)


def run_watching_full_weights(data: dict[str, Any]) -> dict[str, Any]:
    """Trains. "mapped": files of other ranks that rank 0 still maps as they are removed; "held": how many full weights
    are in memory as others are about to be joined."""
    import weakref
    from unittest.mock import patch

    from stdit.training import checkpoint, saving

    remove, full_weights = checkpoint.remove_rank_marks, saving.full_weights
    mapped, held, joined = [], [], []

    def removing(partial: Path) -> None:
        mapped.extend(line for line in Path("/proc/self/maps").read_text().splitlines() if "/.rank-" in line)
        remove(partial)

    def joining(*args: Any) -> Any:
        held.append(sum(each() is not None for each in joined))
        found = full_weights(*args)
        joined[:] = [weakref.ref(tensor) for tensor in found.values()]
        return found

    with patch.object(checkpoint, "remove_rank_marks", removing), patch.object(saving, "full_weights", joining):
        return {**run(data), "mapped": mapped, "held": held}


def run_measuring_copies(data: dict[str, Any]) -> dict[str, Any]:
    """Trains; "copied": bytes of each snapshot of this rank."""
    from unittest.mock import patch

    from stdit.training.snapshot import HostCopies

    end, copied = HostCopies.end, []

    def measured(self: HostCopies) -> None:
        copied.append(self.nbytes)
        end(self)

    with patch.object(HostCopies, "end", measured):
        return {**run(data), "copied": copied}


def restored(data: dict[str, Any]) -> dict[str, Any]:
    """Restores a run, or begins one, without training it: on rank 0 full weights, their average and its profiles
    (sigma_rel-…), both moments and steps of the optimizer."""
    from stdit.training.data import open_data
    from stdit.training.engine import init_distributed
    from stdit.training.resume import restore
    from stdit.training.snapshot import full_weights

    config, ranks = config_of(data), init_distributed()
    state, engine, ema = restore(config, open_data(config), ranks, lambda model: model)
    states = [engine.base_optimizer.state[key] for key in engine.optimized()]
    layout = engine.master_layout()
    found: dict[str, Any] = {
        "step": state.step,
        "notes": state.notes,
        "steps": {float(each["step"]) for each in states if state.step},
    }
    moments = {name: [each[name] for each in states] for name in ("exp_avg", "exp_avg_sq") if state.step}
    averages = {"ema": ema.average, **{f"sigma_rel-{width}": average for width, average in ema.profiles.items()}}
    for name, tensors in {"weights": engine.masters(), **averages, **moments}.items():
        parts = ranks.gather([tensor.detach().clone() for tensor in tensors])
        found[name] = {key: full.clone() for key, full in full_weights(layout, parts).items()}
    engine.close()
    return found


def peak_of_restoring(data: dict[str, Any], whole: bool = False, build_alone: bool = False) -> tuple[int, int]:
    """Restores a run. (anonymous memory that this rank had at most, beyond that at the start; bytes of the model's
    weights in float32).

    build_alone: the engine is not begun. whole: every rank builds the model whole, as below ZeRO-3.
    """
    from contextlib import nullcontext
    from unittest.mock import patch

    import deepspeed

    from stdit.models.cost import parameter_count
    from stdit.training import resume
    from stdit.training.data import open_data
    from stdit.training.engine import init_distributed
    from tests.support.memory import PeakMemory

    class Built(BaseException):  # which `restore` does not take for a damaged checkpoint
        """The model is built."""

    config, ranks, begin = config_of(data), init_distributed(), deepspeed.initialize

    class Whole(nullcontext[None]):
        resident = staticmethod(nullcontext)

        def restore(self, tensor: Any) -> None:
            """Nothing to do."""

    def initialize(*args: Any, **kwargs: Any) -> Any:
        if build_alone:
            raise Built
        return begin(*args, **kwargs)

    with (
        patch.object(deepspeed, "initialize", initialize),
        patch.object(resume, "DeferredTensors", Whole if whole else resume.DeferredTensors),
        PeakMemory() as peak,
        contextlib.suppress(Built),
    ):
        _, engine, _ = resume.restore(config, open_data(config), ranks, lambda model: model)
        engine.close()
    return peak.nbytes, 4 * parameter_count(config.model)


def run_stopping_on_rank_1(data: dict[str, Any], step: int) -> dict[str, Any]:
    import torch.distributed as dist

    first = dist.get_rank() == 0 if dist.is_initialized() else True
    return run(data, None if first else step)


def run_saving_on_rank_1(data: dict[str, Any], step: int) -> dict[str, Any]:
    return run(data, save_after=step if os.environ["RANK"] == "1" else None)


def run_with_slow_rank(data: dict[str, Any], rank: int, seconds: float) -> dict[str, Any]:
    """Trains; rank `rank` sleeps before each of its forward passes."""
    import time

    from stdit.training.inputs import Inputs

    loss = Inputs.loss

    def late(self: Inputs, *args: Any) -> Any:
        time.sleep(seconds if os.environ["RANK"] == str(rank) else 0)
        return loss(self, *args)

    Inputs.loss = cast(Any, late)
    try:
        return run(data)
    finally:
        Inputs.loss = loss


def run_spoiled(data: dict[str, Any], at: int, what: str) -> dict[str, Any]:
    """Trains; at the end of step `at`, one value on the last rank becomes infinite: of its weights, EMA or moments."""
    import torch.distributed as dist

    from stdit.training.ema import EMA

    update = EMA.update

    def spoil(self: EMA, step: int) -> None:
        update(self, step)
        if step == at and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
            tensors = {
                "weights": self.masters,
                "ema": lambda: self.average,
                "moments": cast(Any, self.masters).__self__.state_tensors,
            }
            tensors[what]()[-1].detach().view(-1)[0] = torch.inf

    EMA.update = spoil
    try:
        return run(data)
    finally:
        EMA.update = update


def run_with_nan(data: dict[str, Any], ids: list[int]) -> dict[str, Any]:
    """Trains on synthetic clips, of which those of `ids` hold NaN."""
    from dataclasses import replace

    from stdit.data.loader import Synthetic

    sample = Synthetic.sample

    def spoiled(self: Synthetic, id: int, *caption: str) -> Any:
        found = sample(self, id, *caption)
        return replace(found, mean=found.mean * torch.nan, path=f"clips/{id}.mp4") if int(id) in ids else found

    Synthetic.sample = cast(Any, spoiled)
    try:
        return run(data)
    finally:
        Synthetic.sample = sample


def metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    return metrics_log.read(Path(run_dir) / metrics_log.FILE)


def numbers(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries of metrics.jsonl without what a clock or the machine decides."""
    return [{k: v for k, v in line.items() if not _measured(k)} for line in lines]


def _measured(key: str) -> bool:
    return (
        key.startswith(("seconds", "slow_rank"))
        or key.endswith("_per_second")
        or key in ("mfu", "memory_gib", "hours_left")
    )


def engine_steps(data: dict[str, Any], bad_rank: int) -> dict[str, Any]:
    """Five steps of an Engine by hand; on rank `bad_rank` the gradients of step 4 are NaN behind a finite loss, and the
    loss of step 5 is. Losses, norms, weights, their average (also by the formula, from the weights after each step),
    and what the live model makes of both."""
    from datetime import timedelta

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from stdit.data.loader import Loader
    from stdit.models.stdit import STDiT
    from stdit.training.data import open_data
    from stdit.training.ema import EMA, decay_at
    from stdit.training.engine import Engine, init_distributed
    from stdit.training.inputs import Inputs
    from tests.support.engine_weights import assembled_weights, gathered_weights

    config = config_of(data)
    checked = open_data(config)
    ranks = init_distributed()
    model = STDiT.from_settings(config.model, config.seed)
    initial = {k: v.clone() for k, v in model.named_parameters()}
    dist.new_group(timeout=timedelta(minutes=30))  # as DeepSpeed's
    engine = Engine(model, config, ranks)
    groups = [group for group in distributed_c10d._world.pg_map if dist.get_rank(group) >= 0]
    time_outs = {cast(Any, group)._get_backend(torch.device("cpu")).options._timeout for group in groups}
    ema = EMA(engine.masters, config.train.ema)
    inputs = Inputs(config, checked.video_encoder, ranks.device)
    loader = Loader(
        checked.source, config.data, config.seed, ranks.rank, ranks.size, config.train.gradient_accumulation
    )
    weights = gathered_weights(engine)
    start_error = max(((weights[k] - initial[k]).abs().max().item() for k in weights if k in initial), default=0.0)
    average = {k: v.clone() for k, v in weights.items()}
    losses, norms, unchanged = [], [], []
    for number, step in zip(range(1, 6), loader, strict=False):
        spoiled = ranks.rank == bad_rank and number in (4, 5)
        hook = engine.module.register_forward_hook(SPOIL[number]) if spoiled else None
        micro = []
        for batch in step.batches:
            loss = inputs.loss(engine, batch, number)
            engine.backward(loss.total, len(step.batches))
            micro.append(float(loss.logged[0]))
        if hook:
            hook.remove()
        norms.append(engine.step(1e-3))
        losses.append(ranks.all_reduce(sum(micro) / len(micro) / ranks.size)[0])
        now = gathered_weights(engine)
        unchanged.append(all(torch.equal(now[k], weights[k]) for k in now))
        weights = now
        ema.update(number)
        decay = decay_at(config.train.ema, number)
        average = {k: decay * average[k] + (1 - decay) * weights[k] for k in average}
    with ema.swapped(engine.sync_from_masters):
        averaged, made_by_average = gathered_weights(engine), _made(engine)
    after, made = gathered_weights(engine), _made(engine)
    assembled = assembled_weights(engine)
    engine.close()
    return {
        "losses": losses, "norms": norms, "unchanged": unchanged, "start_error": start_error, "weights": weights,
        "after": after, "assembled": assembled, "average": average, "averaged": averaged, "made": made, "made_by_average": made_by_average,
        "live": str(next(iter(engine.module.parameters())).dtype), "time_outs": time_outs,
    }  # fmt: skip


def _nan_gradient(module: Any, inputs: Any, output: Any) -> None:
    if torch.is_grad_enabled():
        output[0].register_hook(lambda gradient: gradient * torch.nan)


def _nan_output(module: Any, inputs: Any, output: Any) -> Any:
    return (output[0] * torch.nan,)


SPOIL = {4: _nan_gradient, 5: _nan_output}


def _made(engine: Any) -> torch.Tensor:
    """What the live weights make of fixed latents."""
    x = torch.linspace(-1, 1, 128).reshape(1, 1, 2, 8, 8)
    with torch.no_grad():
        return engine.module(x, torch.tensor([500.0]), class_labels=torch.tensor([1]), return_dict=False)[0].float()
