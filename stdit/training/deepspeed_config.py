"""What DeepSpeed is told: the JSON that the config makes, and a user's own laid over it with every key checked.

DeepSpeed ignores unknown keys at the top of its JSON without a word, clips gradients at 1.0 unless told otherwise,
and has many settings that this trainer's own config decides; so all of that is looked at here, before a run starts.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

from stdit.config import ConfigError, TrainConfig, merge

# Keys of DeepSpeed's JSON that this trainer's config decides, and by which setting.
DECIDED = {
    "train_batch_size": "data.buckets[].batch_size",
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
ALLOWED = frozenset(
    """
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer communication_data_type
    prescale_gradients gradient_predivide_factor disable_allgather sparse_gradients aio activation_checkpointing
    steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level disable_python_gc timers
    flops_profiler comms_logger tensorboard wandb comet csv_monitor checkpoint compile
    """.split()  # noqa: SIM905
)
# DeepSpeed's parts that change what is trained or how it is split, which this trainer does not support.
REFUSED = frozenset(
    """
    pipeline tensor_parallel expert_parallel elasticity autotuning curriculum_learning data_efficiency
    dynamic_batching compression_training progressive_layer_drop sparse_attention eigenvalue quantize_training
    hybrid_engine weight_quantization datastates_ckpt vocabulary_size zenflow
    """.split()  # noqa: SIM905
)


def settings(train: TrainConfig, parameters: int, device: str) -> dict[str, Any]:
    """DeepSpeed's JSON for `train`. parameters: of the model. device: "cpu" or "cuda". ConfigError: see `read_raw`."""
    stage, bf16 = train.zero_stage, train.precision == "bf16"
    # DeepSpeed allocates its buckets at full size, 2 GB at the default; a model does not fill more than its size.
    bucket = max(1, min(parameters, 500_000_000))
    made: dict[str, Any] = {
        # Batches come from our own loader, and buckets differ in theirs: to DeepSpeed this is a unit of one.
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
        "steps_per_print": None,
    }
    if bf16 and stage > 0:
        made["data_types"] = {"grad_accum_dtype": "fp32"}
    return merge(made, read_raw(train, made))


def read_raw(train: TrainConfig, made: dict[str, Any]) -> dict[str, Any]:
    """The user's own DeepSpeed JSON (`train.deepspeed`), checked; values "auto" are left to `made`.

    ConfigError: not JSON; a key that DeepSpeed does not know (with the nearest that it does); a key that this
    trainer's own config decides otherwise; a part of DeepSpeed that is not supported here.
    """
    if train.deepspeed is None:
        return {}
    name, raw = "train.deepspeed", train.deepspeed
    if isinstance(raw, Path):
        name, raw = str(raw), _read_json(raw)
    raw = _without_auto(raw)
    for key, value in raw.items():
        if key in DECIDED:
            if made.get(key) != value:
                raise ConfigError(
                    f"{name}: {key}: set by this trainer ({DECIDED[key]}), which makes it {made.get(key, 'absent')}; found {value!r}"
                )
        elif key in REFUSED:
            raise ConfigError(f"{name}: {key}: this part of DeepSpeed is not supported by stdit/train.py")
        elif key not in ALLOWED:
            near = difflib.get_close_matches(key, [*ALLOWED, *DECIDED], n=1)
            raise ConfigError(f"{name}: {key}: unknown to DeepSpeed{f'; did you mean {near[0]}?' if near else ''}")
    zero = raw.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ConfigError(f"{name}: zero_optimization: expected an object, found {zero!r}")
    if zero.get("stage", train.zero_stage) != train.zero_stage:
        raise ConfigError(
            f"{name}: zero_optimization.stage: {zero['stage']}, but train.zero_stage is {train.zero_stage}"
        )
    _check_zero(zero, name)
    return {k: v for k, v in raw.items() if k not in DECIDED}


def say_accelerator() -> None:
    """Tells DeepSpeed, before it is imported, that there is none; else it warns that it has found none."""
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _check_zero(zero: dict[str, Any], name: str) -> None:
    """The keys below zero_optimization, against DeepSpeed's own list. ConfigError names the key that is not on it."""
    if not zero:
        return
    say_accelerator()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(f.alias for f in fields.values() if f.alias)}
    for key in zero:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ConfigError(
                f"{name}: zero_optimization.{key}: unknown to DeepSpeed{f'; did you mean {near[0]}?' if near else ''}"
            )
    if zero.get("compute_grad_norm") is False:
        raise ConfigError(f"{name}: zero_optimization.compute_grad_norm: false, but the norm is how a NaN is noticed")
    if (zero.get("offload_optimizer") or {}).get("device") == "nvme":
        raise ConfigError(
            f"{name}: zero_optimization.offload_optimizer.device: nvme keeps the weights where no moving average reaches them; use cpu"
        )


def _read_json(path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if twice := sorted({k for k in keys if keys.count(k) > 1}):
            raise ConfigError(f"{path}: key {twice[0]!r} is given twice")
        return dict(pairs)

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except OSError as error:
        raise ConfigError(f"train.deepspeed: {path}: cannot be read ({error})") from error
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected an object at the top, found {type(raw).__name__}")
    return raw


def _without_auto(raw: Any) -> Any:
    """`raw` without the values "auto", which in other trainers' files mean: as the trainer says."""
    if isinstance(raw, dict):
        kept = {k: _without_auto(v) for k, v in raw.items() if v != "auto"}
        # An object of nothing but "auto" says nothing.
        return {k: v for k, v in kept.items() if v != {} or raw[k] == {}}
    return raw
