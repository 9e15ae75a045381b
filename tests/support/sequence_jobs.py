"""What the ranks of a pool run under sequence parallelism: module-level, so that they find it by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stdit.config import ModelConfig, merge
from stdit.models import sequence_parallel
from stdit.models.stdit import STDiT
from tests.support.models import MEMBERS, TINY, conditions_for, shaken
from tests.support.rank_jobs import config_of, settings

# Six heads of width 8; clips of 3 frames of 15 patches: no count is divisible by 2 or 4 but that of the heads by 2.
MODEL: dict[str, Any] = {"hidden_size": 48, "depth": 2, "num_heads": 6, "patch_size": [1, 2, 2]}
BUCKET = {"frames": 3, "height": 6, "width": 10}
KINDS: dict[str, dict[str, Any]] = {
    "factorized": {"attention": "factorized", "positions": "rope"},
    "alternating": {"attention": "alternating"},
    "full": {"attention": "full", "positions": "rope"},
    "joint": {"attention": "full", "conditioning": "joint"},
    "joint-factorized": {"attention": "factorized", "conditioning": "joint"},
    "in-context": {"attention": "full", "conditioning": "in_context", "positions": "rope"},
    "dynamic": {"dynamic_width": True, "dynamic_tokens": True, "exit_depths": [[0.8, 1]], "drop_path": 0.2},
    "dynamic-full": {"attention": "full", "dynamic_width": True, "dynamic_tokens": True},
    "conv2d": {"mlp": "conv2d"},
}
# Parameters of tiny models lie below ZeRO-3's threshold for being kept whole: here all are partitioned.
PARTITION_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def run_settings(
    run_dir: Any, kind: str, stage: int, degree: int, data_ranks: int = 1, batch: int = 2, **changes: Any
) -> dict[str, Any]:
    """A run of `batch` samples a step on `data_ranks` x `degree` ranks. Adam's epsilon is well above the rounding
    errors of gradients that are 0 (of key biases), which it would else make into steps."""
    train: dict[str, Any] = {"zero_stage": stage, "sequence_parallel": degree, "optimizer": {"eps": 1e-5}}
    if stage == 3:
        train["deepspeed"] = PARTITION_ALL
    if kind.startswith("dynamic"):
        train["dynamic"] = {"target_flops_ratio": 0.6, "full_model_prob": 0.3, "min_token_ratio": 1.0}
    data = settings(run_dir, model={**MODEL, **KINDS[kind]}, train=train)
    data["diffusion"]["frame_conditioning"] = {"first": 0.4}
    data["data"]["buckets"] = [{**BUCKET, "batch_size": batch // data_ranks}]
    return merge(data, changes)


def train_steps(data: dict[str, Any], count: int, broken: str | None = None) -> dict[str, Any]:
    """`count` steps of an Engine on a model with no weight at zero: losses, norms, every parameter's gradient in the
    first step, weights and EMA after the last (on rank 0), and gradients' names. broken: see `break_exchange`."""
    from deepspeed.utils import safe_get_full_grad

    from stdit.data.loader import Loader
    from stdit.models.fine_tuning import add_trainable
    from stdit.train import prepare
    from stdit.training.data import open_data
    from stdit.training.distributed import sequence_group
    from stdit.training.ema import EMA
    from stdit.training.engine import Engine, init_distributed
    from stdit.training.inputs import Inputs
    from tests.support.engine_weights import gathered_weights

    config = config_of(data)
    checked = open_data(config)
    ranks = init_distributed(config.train.sequence_parallel)
    base = shaken(STDiT.from_settings(config.model, config.seed))
    model = add_trainable(base, config.train, config.seed)
    if model is not base:  # a branch or adapters that add something
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    engine = Engine(prepare(model, config, ranks.device, sequence_group(ranks)), config, ranks)
    ema = EMA(engine.masters, config.train.ema)
    inputs = Inputs(config, checked.video_encoder, ranks.device, None, ranks.sequence_rank)
    accumulation = config.train.gradient_accumulation
    loader = Loader(checked.source, config.data, config.seed, ranks.data_rank, ranks.data_size, accumulation)
    losses, norms, gradients = [], [], {}
    with break_exchange(broken, ranks.sequence_rank):
        for number, step in zip(range(1, count + 1), loader, strict=False):
            total = 0.0
            for i, batch in enumerate(step.batches):
                loss = inputs.loss(engine, batch, number)
                total += float(loss.total.detach()) / len(step.batches) / ranks.size
                if number == 1 and i == len(step.batches) - 1:
                    gradients = _gradients(engine, loss.total, len(step.batches), safe_get_full_grad)
                else:
                    engine.backward(loss.total, len(step.batches))
            losses.append(ranks.all_reduce(total)[0])
            norms.append(engine.step(1e-3))
    weights = gathered_weights(engine)
    with ema.swapped():
        average = gathered_weights(engine)
    engine.close()
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights, "ema": average}


def _gradients(engine: Any, loss: Tensor, micro_batches: int, full_gradient: Any) -> dict[str, Tensor]:
    """Backward, and the reduced gradient of every trained parameter."""
    engine.backward(loss, micro_batches)
    found = {}
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if engine.stage == 0 else full_gradient(parameter)
            found[name] = gradient.detach().float().clone()
    return found


@contextmanager
def break_exchange(how: str | None, rank: int) -> Iterator[None]:
    """Spoils gradients, not values. "factor": the gathered prediction's gradient is not summed over the ranks, so that
    it is too small by the degree. "left out": what rank 1 sends gets no gradient."""
    gather, exchange = sequence_parallel.gather_tokens, sequence_parallel.all_to_all
    if how == "factor":
        import stdit.models.stdit as model

        def own_only(x: Tensor, shards: Any) -> Tensor:
            return gather(x, shards) / shards.size + (1 - 1 / shards.size) * gather(x.detach(), shards)

        model.gather_tokens = own_only  # pyright: ignore
    elif how == "left out" and rank == 1:
        sequence_parallel.all_to_all = lambda x, *sizes: exchange(x.detach() + 0 * x, *sizes)
    try:
        yield
    finally:
        sequence_parallel.all_to_all = exchange
        if how == "factor":
            model.gather_tokens = gather  # pyright: ignore


class ExchangedBytes(TorchDispatchMode):
    """Counts the bytes that this rank sends to others in all-to-all exchanges, forward and backward."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.bytes = rank, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            x, _, sent, _ = args
            self.bytes += (sum(sent) - sent[self.rank]) * x.element_size()
        return func(*args, **(kwargs or {}))


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def model_errors(names: list[str], frames: int, rows: int, columns: int, batch: int) -> dict[str, tuple[float, float]]:
    """For members of tests.support.models.MEMBERS, the largest error of output and of gradients (relative to the
    largest of the model) of a model whose tokens all ranks share, against the same model alone."""
    from stdit.training.distributed import sequence_group
    from stdit.training.engine import init_distributed

    world = int(os.environ["WORLD_SIZE"])
    parallel = sequence_group(init_distributed(world))
    errors = {}
    for name in names:
        config = ModelConfig(**{**TINY, **MEMBERS[name]})
        model = shaken(STDiT.from_settings(config))
        x = _noise(batch, 3, frames if config.has_time else 1, rows, columns, seed=5)
        conditions = conditions_for(config, batch, _noise)
        results = []
        for share in (None, parallel):
            model.set_sequence_parallel(share)
            model.zero_grad()
            y = model(x, **conditions).sample
            y.square().mean().backward()
            gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            if share is not None:
                dist.all_reduce(gradients)
                gradients /= world
            results.append((y.detach(), gradients))
        (y, gradients), (shared_y, shared_gradients) = results
        errors[name] = (
            float((shared_y - y).abs().max() / y.abs().max()),
            float((shared_gradients - gradients).abs().max() / gradients.abs().max()),
        )
    return errors
