"""DeepSpeed's JSON config: generated from ours, with the user's own (`train.deepspeed`) checked and merged over it.

DeepSpeed silently ignores unknown top-level keys, clips gradients at 1.0 by default, and has settings that our config
already determines; all of that is checked here, before a run starts.
"""

from __future__ import annotations

import difflib
import math
import os
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from stdit.config import ConfigError, TrainConfig, merge
from stdit.files import read_json

# DeepSpeed's keys that our config sets, and the key that sets them.
SET_BY_CONFIG = {
    "train_batch_size": "data.buckets[].global_batch or batch_size",
    "train_micro_batch_size_per_gpu": "data.buckets[].batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "managed_gradient_accumulation": "train.gradient_accumulation",
    "gradient_allreduce_op": "the mean over the global batch",
    "gradient_clipping": "train.optimizer.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.optimizer",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
}
# Elements of a bucket of gradients (`bucket_size`).
LEAST_BUCKET, MOST_BUCKET = 25_000_000, 500_000_000
ALLOWED = frozenset(
    """
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type
    prescale_gradients gradient_predivide_factor disable_allgather sparse_gradients aio activation_checkpointing
    steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level disable_python_gc timers
    flops_profiler comms_logger tensorboard wandb comet csv_monitor checkpoint compile
    """.split()  # noqa: SIM905
)
# DeepSpeed's features that this trainer does not support.
UNSUPPORTED = frozenset(
    """
    pipeline tensor_parallel expert_parallel elasticity autotuning curriculum_learning data_efficiency
    dynamic_batching compression_training progressive_layer_drop sparse_attention eigenvalue quantize_training
    hybrid_engine weight_quantization datastates_ckpt vocabulary_size zenflow
    """.split()  # noqa: SIM905
)


def make_deepspeed_config(train: TrainConfig, parameters: int, device: str) -> dict[str, Any]:
    """DeepSpeed's config for `train`. parameters: how many are trained. device: "cpu" or "cuda". ConfigError: see
    `read_override`."""
    stage, bf16 = train.zero_stage, train.precision == "bf16"
    bucket = bucket_size(parameters)
    generated: dict[str, Any] = {
        # Batches come from our own loader and differ in size by bucket; stdit.training.engine says which is a step's
        # last.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.gradient_accumulation,
        # float32 without ZeRO is clipped by stdit.training.engine, which needs the norm before the update.
        "gradient_clipping": 0.0 if stage == 0 and not bf16 else train.optimizer.max_grad_norm,
        "bf16": {"enabled": bf16, "check_grad_overflow": True},
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": device == "cuda",
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
        # torch's fused AdamW also steps what is offloaded; DeepSpeed's own needs a compiler and 80 s at first use.
        "zero_force_ds_cpu_optimizer": False,
        # DeepSpeed knows torch's classes only; tests/training/test_muon.py knows ours.
        "zero_allow_untested_optimizer": train.optimizer.name == "muon",
        "steps_per_print": None,
    }
    if bf16 and stage > 0:
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge(generated, read_override(train, generated))


def bucket_size(parameters: int) -> int:
    """Gradients that are reduced together, of a model that trains `parameters`: an eighth of them, 25 to 500 million.

    DeepSpeed allocates a bucket, and a copy of what is sent, at full size (500 million by its own default): as large as
    the model, they would take what ZeRO-2 and 3 save. Smaller ones can be sent while backward goes on; below the least
    a call costs more by its latency.
    """
    bucket = min(parameters, max(LEAST_BUCKET, parameters // 8), MOST_BUCKET)
    return max(2, bucket + bucket % 2)  # DeepSpeed refuses odd ones


def offloads(train: TrainConfig) -> bool:
    """Whether DeepSpeed keeps weights or optimizer state in the host's memory or on its disk. ConfigError: see
    `read_override`."""
    if train.deepspeed is None:
        return False
    zero = make_deepspeed_config(train, 1, "cuda")["zero_optimization"]
    set_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    parsed = DeepSpeedZeroConfig(**zero)  # also reads the older cpu_offload
    return any(part is not None and part.device != "none" for part in (parsed.offload_param, parsed.offload_optimizer))


def check_nvme(train: TrainConfig) -> None:
    """ConfigError: `train.deepspeed` keeps weights on NVMe, for which DeepSpeed needs a library that this machine does
    not have."""
    if train.deepspeed is None:
        return
    offload = make_deepspeed_config(train, 1, "cuda")["zero_optimization"].get("offload_param") or {}
    if offload.get("device") != "nvme":
        return
    set_accelerator()
    from deepspeed.accelerator import get_accelerator

    builder = cast(Any, get_accelerator()).get_op_builder("AsyncIOBuilder")()
    if not builder.is_compatible():
        raise ConfigError(
            "train.deepspeed: zero_optimization.offload_param.device: nvme needs DeepSpeed's async_io, which cannot be built here "
            "without libaio and its headers (package libaio-dev); cpu needs neither"
        )


def read_override(train: TrainConfig, generated: dict[str, Any]) -> dict[str, Any]:
    """The user's DeepSpeed JSON (`train.deepspeed`), checked; "auto" values are dropped, so that `generated` sets them.

    ConfigError: not JSON; a key unknown to DeepSpeed (with the closest match); a key that our config sets to another
    value; an unsupported feature of DeepSpeed.
    """
    if train.deepspeed is None:
        return {}
    name, raw = "train.deepspeed", train.deepspeed
    if isinstance(raw, Path):
        name = str(raw)
        try:
            raw = read_json(raw)
        except ValueError as error:
            raise ConfigError(f"train.deepspeed: {error}") from error
    raw = _without_auto(raw)
    for key, value in raw.items():
        if key in SET_BY_CONFIG:
            if generated.get(key) != value:
                raise ConfigError(
                    f"{name}: {key}: set by this trainer ({SET_BY_CONFIG[key]}), which makes it {generated.get(key, 'absent')}; found {value!r}"
                )
        elif key in UNSUPPORTED:
            raise ConfigError(f"{name}: {key}: this part of DeepSpeed is not supported by stdit/train.py")
        elif key not in ALLOWED:
            near = difflib.get_close_matches(key, [*ALLOWED, *SET_BY_CONFIG], n=1)
            raise ConfigError(f"{name}: {key}: unknown to DeepSpeed{f'; did you mean {near[0]}?' if near else ''}")
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{name}: zero_optimization: expected an object, found {zero!r}")
    if zero.get("stage", train.zero_stage) != train.zero_stage:
        raise ConfigError(
            f"{name}: zero_optimization.stage: {zero['stage']}, but train.zero_stage is {train.zero_stage}"
        )
    writer = raw.get("checkpoint", {}).get("writer") if isinstance(raw.get("checkpoint"), dict) else None
    if writer is not None:
        raise ConfigError(
            f"{name}: checkpoint.writer: {writer!r}, but this trainer writes checkpoints itself (train.checkpoint_in_background)"
        )
    _check_numbers(raw, name)
    _check_zero(zero, name)
    for section in sorted(set(raw) & {"activation_checkpointing", "aio", "flops_profiler", "comms_logger"}):
        _check_keys(raw[section], _section_keys(section), f"{name}: {section}")
    return {k: v for k, v in raw.items() if k not in SET_BY_CONFIG}


def set_accelerator() -> None:
    """Selects DeepSpeed's CPU accelerator where there is no CUDA; before its import, which else warns, or takes Apple's
    MPS, whose tensors gloo does not send."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_zero(zero: dict[str, Any], name: str) -> None:
    """Checks the keys of zero_optimization against DeepSpeed's schema. ConfigError names an unknown one."""
    if not zero:
        return
    set_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(f.alias for f in fields.values() if f.alias)}
    _check_keys(zero, known, f"{name}: zero_optimization")
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{name}: zero_optimization.compute_grad_norm: false, but the norm is how a NaN is noticed")
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ConfigError(
            f"{name}: zero_optimization.offload_optimizer.device: nvme keeps master weights out of the EMA's reach; use cpu"
        )
    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{name}: zero_optimization.{key}: {first['msg']}; found {first['input']!r}") from error


def _section_keys(section: str) -> set[str]:
    """The keys of a section of DeepSpeed's config, which it reads one by one and else ignores."""
    set_accelerator()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.activation_checkpointing.config import ACT_CHKPT_DEFAULT
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

    if section == "flops_profiler":
        return set(vars(DeepSpeedFlopsProfilerConfig({})))
    if section == "comms_logger":
        return set(CommsLoggerConfig.model_fields)
    return set(ACT_CHKPT_DEFAULT if section == "activation_checkpointing" else AIO_DEFAULT_DICT)


def _check_keys(found: Any, known: set[str], where: str) -> None:
    """ConfigError: no object, or a key that is not `known`."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: expected an object, found {found!r}")
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(f"{where}.{key}: unknown to DeepSpeed{f'; did you mean {near[0]}?' if near else ''}")


# Sizes and intervals, by how their names end: DeepSpeed takes 0 and hangs, divides by it or ignores the rest.
SIZES = (
    "_size",
    "_numel",
    "_step",
    "_steps",
    "_per_print",
    "_count",
    "_depth",
    "_parallelism",
    "number_checkpoints",
    "_factor",
)
MAY_BE_ZERO = ("stage3_prefetch_bucket_size", "prefetch_bucket_size", "recompute_fwd_factor")


def _check_numbers(value: Any, where: str) -> None:
    """ConfigError: NaN, infinity, or a size below 1, anywhere below `value`."""
    if isinstance(value, dict):
        for key, child in value.items():
            below = f"{where}.{key}" if ": " in where else f"{where}: {key}"
            number = isinstance(child, int | float) and not isinstance(child, bool)
            if number and (
                not math.isfinite(child)
                or (key.endswith(SIZES) and key not in MAY_BE_ZERO and child <= 0 and child != -1)
            ):
                raise ConfigError(f"{below}: expected a finite number, of sizes above 0; found {child!r}")
            _check_numbers(child, below)
    elif isinstance(value, list):
        for i, child in enumerate(value):
            _check_numbers({str(i): child}, where)


def _without_auto(raw: Any) -> Any:
    """`raw` without "auto" values, which other trainers fill in."""
    if isinstance(raw, dict):
        kept = {k: _without_auto(v) for k, v in raw.items() if v != "auto"}
        # An object of nothing but "auto" says nothing.
        return {k: v for k, v in kept.items() if v != {} or raw[k] == {}}
    return raw
