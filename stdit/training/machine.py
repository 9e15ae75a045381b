"""Whether this machine can run a config: memory of a rank, precision, attention back end. Checked before a run is
begun."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,  # pyright: ignore[reportPrivateUsage]  (what set_attention_backend checks)
)

from stdit.config import Bucket, Config, ConfigError, TrainConfig, token_grid
from stdit.cores import local_ranks
from stdit.memory import check_fits, device_memory, gib, host_memory
from stdit.models.attention import AttentionProcessor
from stdit.models.cost import ModelCost, model_cost, parameter_sizes
from stdit.training.deepspeed_config import check_nvme, offloads
from stdit.training.rank_memory import Memory, rank_memory

Grid = tuple[int, int, int]


def sample_cost(
    config: Config, bucket: Bucket, latent: Grid, text_length: int, samples: int, sequence_parallel: int = 1
) -> ModelCost:
    """Cost of a sample of `bucket`: of a rank, where several share it.

    latent: (T, H, W) of the bucket. text_length: mean tokens of a caption. samples: of a micro-batch. ConfigError:
    sizes that the model does not take.
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


def step_memory(
    config: Config, bucket: Bucket, latent: Grid, text_length: int, samples: int, ranks: int, device: str
) -> Memory:
    """Estimate for one rank in a step of a bucket, as the forecast's. latent: (T, H, W) of it; samples: of a
    micro-batch; device: "cpu" or "cuda"."""
    train = config.train
    cost = sample_cost(config, bucket, latent, text_length, samples, train.sequence_parallel)
    # A compiled block may recompute all but its inputs.
    activations = saved_bytes(cost, samples, train.activation_checkpointing or train.compile)
    accumulation = config.micro_batches(ranks)[bucket.key].accumulation
    return rank_memory(parameter_sizes(config.model, train), train, ranks, activations, accumulation, device)


def local_share(device: torch.device) -> tuple[int, str]:
    """Bytes of memory for one rank, and what has them: the GPU, or this machine, whose memory its ranks share."""
    if device.type == "cpu":
        return host_memory() // (local_ranks() or 1), "this machine"
    return torch.cuda.get_device_properties(device).total_memory, torch.cuda.get_device_name(device)


def multiplies_bfloat16(gpus: bool | None = None) -> bool:
    """Whether products in bfloat16 are faster here than in float32. gpus: whether GPUs train, if not those of this
    machine."""
    if torch.cuda.is_available() if gpus is None else gpus:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(False)
    # torch multiplies bfloat16 on other processors too, several times slower than float32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_machine(config: Config, ranks: int, latents: Mapping[str, Grid], text_length: int) -> None:
    """Checks what `config` needs of this machine. ConfigError: more memory than there is, a precision or an attention
    back end that the device lacks.

    ranks: of the run, over all machines. latents: latent (T, H, W) by bucket. text_length: mean tokens of a caption.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.train.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(f"train.precision: {torch.cuda.get_device_name()} does not compute in bfloat16; use fp32")
    _check_memory(config, ranks, device, latents, text_length)
    if config.train.attention_backend is not None:
        _check_attention_backend(config, device)
    check_nvme(config.train)


def _check_memory(
    config: Config, ranks: int, device: torch.device, latents: Mapping[str, Grid], text_length: int
) -> None:
    """Weights, gradients, optimizer, activations and a step's samples have to fit: what a step needs at least.

    Not counted: what `train.compile` recomputes.
    """
    on_host = device.type == "cpu" or offloads(config.train)
    local = (local_ranks() or 1) if on_host else 1
    available = host_memory() if on_host else device_memory(device)
    train = config.train
    try:
        parameters = parameter_sizes(config.model, train)
    except ValueError as error:
        raise ConfigError(f"train: {error}") from error
    count, trained = (sum(p.numel for p in parameters if all_ or p.trained) for all_ in (True, False))
    memory = rank_memory(parameters, train, ranks, device=device.type)
    _check_checkpoint_copy(memory, memory.total if on_host else 0, train)
    place = "this machine" if on_host else torch.cuda.get_device_name(device)
    place = f"{place} has {gib(available)}" + (f" for {local} ranks" if local > 1 else "")
    model = (
        f"model: {count / 1e6:,.0f} M parameters{f', of which {trained / 1e6:,.1f} M are trained,' if trained < count else ''} take "
        f"{gib(memory.total)} a rank for weights, gradients, optimizer, average and buffers "
        f"(ZeRO-{train.zero_stage}, {train.precision}, {ranks} ranks)"
    )
    if memory.total * local > available:
        raise ConfigError(f"{model}; {place}. A smaller model, a higher train.zero_stage or more ranks take less")
    _check_building(memory, count, train)
    sizes = {key: each.size for key, each in config.micro_batches(ranks).items()}
    bucket = max(config.data.buckets, key=lambda b: sizes[b.key] * math.prod(latents[b.key]))
    samples = sizes[bucket.key]
    step = step_memory(config, bucket, latents[bucket.key], text_length, samples, ranks, device.type)
    if step.total * local > available:
        hint = "" if train.activation_checkpointing else ", or set train.activation_checkpointing: true"
        budget = train.tokens_per_step is not None
        lower = "train.tokens_per_micro_batch" if budget else "batch_size (and raise train.gradient_accumulation)"
        raise ConfigError(
            f"data.buckets {bucket.key}: the activations of a micro-batch of {samples} take "
            f"{gib(step.activations)} a rank, and with them a step {gib(step.total)}; {model.removeprefix('model: ')}; {place}. "
            f"Lower {lower}{hint}"
        )
    _check_step(config, ranks, latents)


def _check_step(config: Config, ranks: int, latents: Mapping[str, Grid]) -> None:
    """ConfigError: the latents of a step's samples, which a rank reads into the host's memory together, do not fit."""
    local = local_ranks() or 1
    for key, each in config.micro_batches(ranks).items():
        samples = each.size * each.accumulation
        needed = samples * config.model.in_channels * math.prod(latents[key]) * 4
        what = f"data.buckets {key}: the latents of a rank's {samples:,} samples of a step take"
        check_fits(what, needed, "Lower global_batch or train.gradient_accumulation", local)


def _check_building(memory: Memory, parameters: int, train: TrainConfig) -> None:
    """ConfigError: the host's memory does not hold the models that its ranks build."""
    what = f"model: to build its {parameters / 1e6:,.0f} M parameters (ZeRO-{train.zero_stage}, {train.precision}) takes a rank"
    remedy = "" if train.zero_stage == 3 else "Under train.zero_stage: 3 no rank ever holds the whole model"
    check_fits(what, memory.building, remedy, local_ranks() or 1)


def _check_checkpoint_copy(memory: Memory, needed: int, train: TrainConfig) -> None:
    """needed: bytes of the host's memory that a rank takes without the copies of checkpoints. ConfigError: they don't
    fit beside it."""
    local, available = local_ranks() or 1, host_memory()
    # Without ZeRO rank 0 alone copies; with it, what is partitioned is copied by all.
    others = memory.resident["optimizer"] + memory.resident["average"] if train.zero_stage else 0
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
