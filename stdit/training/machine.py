"""Whether this machine can run a config: memory of a rank, precision, attention back end. Checked before a run is begun."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,  # pyright: ignore[reportPrivateUsage]  (what set_attention_backend checks)
)

from stdit.config import Bucket, Config, ConfigError, TrainConfig, token_grid
from stdit.memory import check_fits, device_memory, gib, host_memory
from stdit.models.attention import AttentionProcessor
from stdit.models.cost import ModelCost, model_cost, trained_parameters
from stdit.training.deepspeed_config import offloads

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. Activations: of its largest bucket's micro-batch. In the host's memory, not in `total`: building, while the
    model is built or loaded, beside what the device has of it; of rank 0 checkpoint_copy, and full_weights, which it joins from
    all ranks' parts (and rounds for snapshots) while a checkpoint is written."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    checkpoint_copy: int = 0
    full_weights: int = 0
    building: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def rank_memory(trained: int, train: TrainConfig, ranks: int, activations: int = 0, frozen: int = 0) -> Memory:
    """Bytes of one rank under DeepSpeed: weights, gradients and optimizer state are replicated, or partitioned over `ranks`
    from ZeRO stage 3, 2 and 1 on (Rajbhandari et al. 2020). What `train.deepspeed` offloads is not taken off.

    trained, frozen: parameters; frozen ones are weights alone, and in no checkpoint.
    """
    stage, bf16 = train.zero_stage, train.precision == "bf16"

    def share(bytes_each: int, cut_from: int, parameters: int = trained) -> int:
        return -(-parameters * bytes_each // (ranks if stage >= cut_from else 1))

    # AdamW's two moments (Muon has one, but for a few per cent of the weights), and the float32 weights that it steps, which
    # without ZeRO in float32 are the weights.
    moments = 4 if train.optimizer.name == "muon" else 8
    master = 4 if bf16 or stage > 0 else 0
    # bfloat16 gradients are summed up in float32 under ZeRO (stdit.training.deepspeed_config).
    gradient = 2 if bf16 and stage == 0 else 4
    averages = 1 + len(train.ema.widths)
    weights, optimizer, average = share(2 if bf16 else 4, 3), share(moments + master, 1), share(4 * averages, 1)
    # ZeRO-3's shards have the masters alone (stdit.training.saving).
    copied = optimizer + average + (weights if stage < 3 else 0) if copies_checkpoints(train) else 0
    # The weights, then each average; of a profile also its snapshot, in float16.
    joined = (4 * trained if stage and ranks > 1 else 0) + (2 * trained if train.ema.widths else 0)
    weights += share(2 if bf16 else 4, 3, frozen)
    # Whole, in float32, and once more those that bfloat16 rounds; ZeRO-3 has one weight at a time, and this rank's parts of
    # those rounded (stdit.training.deferred).
    unrounded = share(4 if bf16 else 0, 3)
    building = unrounded if stage == 3 else 4 * (trained + frozen) + unrounded
    return Memory(weights, share(gradient, 2), optimizer, average, activations, copied, joined, building)


def copies_checkpoints(train: TrainConfig) -> bool:
    """Whether checkpoints are written while training goes on: all but the last one."""
    return train.checkpoint_in_background and (
        train.checkpoint_every is not None or train.optimizer.lr_schedule == "wsd"
    )


def sample_cost(
    config: Config, bucket: Bucket, latent: Grid, text_length: int, samples: int, sequence_parallel: int = 1
) -> ModelCost:
    """Cost of a sample of `bucket`: of a rank, where several share it.

    latent: (T, H, W) of the bucket. text_length: mean tokens of a caption. samples: of a micro-batch. ConfigError: sizes that the model does not take.
    """
    model, name = config.model, f"data.buckets {bucket.key}"
    grid = token_grid(latent, model.patch_size, name, model.pad_latents)
    text = text_length if model.text_dim is not None else 0
    batch = samples if sequence_parallel > 1 else min(2, samples)
    size = 2 if config.train.precision == "bf16" else 4
    try:
        return model_cost(model, grid, text, size, batch, sequence_parallel, config.train)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def saved_bytes(cost: ModelCost, samples: int, checkpointing: bool) -> int:
    """Bytes of activations that a micro-batch of `samples` keeps for backward."""
    return samples * (cost.activation_bytes_checkpointed if checkpointing else cost.activation_bytes)


def step_memory(config: Config, bucket: Bucket, latent: Grid, text_length: int, samples: int, ranks: int) -> Memory:
    """Estimate for one rank in a step of a bucket, as the forecast's. latent: (T, H, W) of it; samples: of a micro-batch."""
    train = config.train
    cost = sample_cost(config, bucket, latent, text_length, samples, train.sequence_parallel)
    activations = saved_bytes(cost, samples, train.activation_checkpointing)
    return rank_memory(cost.trained, train, ranks, activations, cost.parameters - cost.trained)


def local_share(device: torch.device) -> tuple[int, str]:
    """Bytes of memory for one rank, and what has them: the GPU, or this machine, whose memory its ranks share."""
    if device.type == "cpu":
        return host_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), "this machine"
    return torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)


def multiplies_bfloat16(gpus: bool | None = None) -> bool:
    """Whether products in bfloat16 are faster here than in float32. gpus: whether GPUs train, if not those of this machine."""
    if torch.cuda.is_available() if gpus is None else gpus:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False)
    # torch multiplies bfloat16 on other processors too, several times slower than float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_machine(config: Config, ranks: int, latents: Mapping[str, Grid], text_length: int) -> None:
    """Checks what `config` needs of this machine. ConfigError: more memory than there is, a precision or an attention back
    end that the device lacks.

    ranks: of the run, over all machines. latents: latent (T, H, W) by bucket. text_length: mean tokens of a caption.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(f"train.precision: {torch.cuda.get_device_name()} does not compute in bfloat16; use fp32")
    _check_memory(config, ranks, device, latents, text_length)
    if config.train.attention_backend is not None:
        _check_attention_backend(config, device)


def _check_memory(
    config: Config, ranks: int, device: torch.device, latents: Mapping[str, Grid], text_length: int
) -> None:
    """Weights, gradients, optimizer, activations and a step's samples have to fit: what a step needs at least.

    Not counted: what `train.compile` recomputes.
    """
    on_host = device.type == "cpu" or offloads(config.train)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_host else 1
    available = host_memory() if on_host else device_memory(device)
    try:
        trained, frozen = trained_parameters(config.model, config.train)
    except ValueError as error:
        raise ConfigError(f"train: {error}") from error
    memory = rank_memory(trained, config.train, ranks, frozen=frozen)
    needed = memory.total
    _check_checkpoint_copy(memory, needed if on_host else 0, config.train)
    place = "this machine" if on_host else torch.cuda.get_device_name(device)
    place = f"{place} has {gib(available)}" + (f" for {local} ranks" if local > 1 else "")
    model = (
        f"model: {(trained + frozen) / 1e6:,.0f} M parameters{f', of which {trained / 1e6:,.1f} M are trained,' if frozen else ''} take "
        f"{gib(needed)} a rank for weights, gradients, optimizer "
        f"and average (ZeRO-{config.train.zero_stage}, {config.train.precision}, {ranks} ranks)"
    )
    if needed * local > available:
        raise ConfigError(f"{model}; {place}. A smaller model, a higher train.zero_stage or more ranks take less")
    _check_building(memory, trained + frozen, config.train)
    sizes = {key: each.size for key, each in config.micro_batches(ranks).items()}
    bucket = max(config.data.buckets, key=lambda b: sizes[b.key] * math.prod(latents[b.key]))
    samples = sizes[bucket.key]
    cost = sample_cost(config, bucket, latents[bucket.key], text_length, samples, config.train.sequence_parallel)
    # A compiled block may recompute all but its inputs.
    activations = saved_bytes(cost, samples, config.train.activation_checkpointing or config.train.compile)
    if (needed + activations) * local > available:
        hint = "" if config.train.activation_checkpointing else ", or set train.activation_checkpointing: true"
        budget = config.train.tokens_per_step is not None
        lower = "train.tokens_per_micro_batch" if budget else "batch_size (and raise train.gradient_accumulation)"
        raise ConfigError(
            f"data.buckets {bucket.key}: the activations of a micro-batch of {samples} take "
            f"{gib(activations)} a rank, {model.removeprefix('model: ')}; {place}. Lower {lower}{hint}"
        )
    _check_step(config, ranks, latents)


def _check_step(config: Config, ranks: int, latents: Mapping[str, Grid]) -> None:
    """ConfigError: the latents of a step's samples, which a rank reads into the host's memory together, do not fit."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    for key, each in config.micro_batches(ranks).items():
        samples = each.size * each.accumulation
        needed = samples * config.model.in_channels * math.prod(latents[key]) * 4
        what = f"data.buckets {key}: the latents of a rank's {samples:,} samples of a step take"
        check_fits(what, needed, "Lower global_batch or train.gradient_accumulation", local)


def _check_building(memory: Memory, parameters: int, train: TrainConfig) -> None:
    """ConfigError: the host's memory does not hold the models that its ranks build."""
    what = f"model: to build its {parameters / 1e6:,.0f} M parameters (ZeRO-{train.zero_stage}, {train.precision}) takes a rank"
    remedy = "" if train.zero_stage == 3 else "Under train.zero_stage: 3 no rank ever holds the whole model"
    check_fits(what, memory.building, remedy, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _check_checkpoint_copy(memory: Memory, needed: int, train: TrainConfig) -> None:
    """needed: bytes of the host's memory that a rank takes without the copies of checkpoints. ConfigError: they don't fit beside it."""
    local, available = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), host_memory()
    # Without ZeRO rank 0 alone copies; with it, what is partitioned is copied by all.
    others = memory.optimizer + memory.average if train.zero_stage else 0
    copies = memory.checkpoint_copy + memory.full_weights + (local - 1) * others
    if memory.checkpoint_copy and needed * local <= available < needed * local + copies:
        raise ConfigError(
            f"train.checkpoint_in_background: true copies {gib(memory.checkpoint_copy)} of a rank to the host's memory"
            f"{f' and joins {gib(memory.full_weights)} of full weights there' if memory.full_weights else ''}, "
            f"beside {gib(needed)}; this machine has {gib(available)} for {local} ranks. "
            "false writes without a copy"
        )


def _check_attention_backend(config: Config, device: torch.device) -> None:
    """Tries the back end on two tokens, as the model will call it."""
    assert config.train.attention_backend is not None
    width, _, heads = config.model.dimensions
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    processor = AttentionProcessor()
    try:
        processor._attention_backend = AttentionBackendName(config.train.attention_backend)
        _check_attention_backend_requirements(processor._attention_backend)
        x = torch.zeros(1, 2, heads, width // heads, device=device, dtype=dtype)
        processor(x, x, x)
    except Exception as error:  # whatever a back end's package raises: it cannot be used here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"train.attention_backend: {config.train.attention_backend} cannot be used here, on {device.type} in "
            f"{config.train.precision} ({reason})"
        ) from error
