"""Compares two configs: dotted keys, old and new values, and the keys that do not affect a result.

for change in changes(old.model_dump(mode="json"), new.model_dump(mode="json")):
    print(change)  # train.steps: 20 -> 40
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from stdit.config.train import Config

# Keys (or sections) of a training config that leave the trained weights unchanged: paths and names, logging,
# checkpointing, and how the same numbers are computed. Features are compared by their fingerprint, not by their path.
TRAINING_RUNTIME_KEYS = (
    "name",
    "run_dir",
    "data.features",  # but for the weights of several sets: `matches`
    "data.workers",
    "data.cache.folder",
    "data.cache.size_gb",
    "train.log_every",
    "train.profile",
    "train.peak_tflops",
    "train.checkpoint_every",
    "train.ema.profiles.every",
    "train.checkpoint_in_background",
    "train.keep_checkpoints",
    "train.keep_every",
    "train.keep_best",
    "train.max_failed_saves",
    "train.upload_to",
    "train.tensorboard",
    "train.wandb_project",
    "train.max_bad_steps",
    "train.max_bad_share",
    "train.start_timeout_s",
    "train.step_timeout_s",
    "train.activation_checkpointing",
    "train.sequence_parallel",
    "train.zero_stage",
    "train.attention_backend",
    "train.matmul_precision",
    "train.cpu_matmul_backend",
    "train.compile",
    "train.deepspeed",
    "validation",
    "samples",
)
# The same of an extraction. The manifest is compared by its content.
EXTRACTION_RUNTIME_KEYS = (
    "manifest", "out", "workers", "decoder_workers", "batch_size", "decode_timeout_s", "max_bad_share", "cache",
)  # fmt: skip


class Change(NamedTuple):
    """A key whose value differs; None also stands for a key that is absent."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = (v if isinstance(v, str) and v else json.dumps(v) for v in (self.old, self.new))
        return f"{self.key}: {old} -> {new}"


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 20, "data.buckets.0.frames": 4, "model.patch_size": [1, 2, 2], …}: nested mappings, and lists of
    mappings by index; other lists are values."""
    if isinstance(data, dict) and data:
        items = data.items()
    elif isinstance(data, list) and data and all(isinstance(item, dict) for item in data):
        items = enumerate(data)
    else:
        return {prefix: data}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Keys whose values differ between two configs in JSON form, nested or flattened, in the order of `old`."""
    a, b = flatten(old), flatten(new)
    keys = [*a, *(key for key in b if key not in a)]
    return [Change(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


# In a section that affects no result, what does.
_WEIGHT = re.compile(r"data\.features\.\d+\.weight")


def matches(key: str, keys: Sequence[str]) -> bool:
    """Whether `key` is one of `keys`, or lies in a section that is."""
    return not _WEIGHT.fullmatch(key) and any(key == one or key.startswith(f"{one}.") for one in keys)


def global_batch_sizes(config: Config, world_size: int) -> dict[str, int]:
    """Samples per optimizer step of each bucket, over all ranks and accumulated micro-batches; of packed steps their
    tokens."""
    if config.train.packing_budget is not None:
        return {"packed": config.train.packing_budget.tokens_per_step}
    return {key: each.samples for key, each in config.micro_batches(world_size).items()}
