"""What may change in a config between a run's checkpoint and the same command run again, and what may not."""

from __future__ import annotations

from typing import Any

from stdit.config import Config, ConfigError, validate

# Settings, or whole sections, that decide how long a run is, what is recorded, or how the same numbers are computed.
HARMLESS = (
    "name",
    "run_dir",
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.tensorboard",
    "train.wandb_project",
    "train.max_bad_steps",
    "train.activation_checkpointing",
    "train.attention_backend",
    "train.matmul_precision",
    "train.compile",
    "train.deepspeed",
    "data.workers",
    "validation",
    "samples",
)


def flatten(data: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.steps": 20, "data.buckets.0.frames": 4, …} of nested mappings and lists."""
    if isinstance(data, dict):
        items = data.items()
    elif isinstance(data, list) and data:
        items = enumerate(data)
    else:
        return {prefix: data}
    return {k: v for key, value in items for k, v in flatten(value, f"{prefix}.{key}" if prefix else str(key)).items()}


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} of two dumped configs; a value that is not there is "absent"."""
    a, b = flatten(old), flatten(new)
    keys = [*a, *(k for k in b if k not in a)]
    return {k: (a.get(k, "absent"), b.get(k, "absent")) for k in keys if a.get(k, "absent") != b.get(k, "absent")}


def check_resumable(identity: dict[str, Any], config: Config, world_size: int, features_fingerprint: str) -> list[str]:
    """Lines that say what is different, all of it harmless, since the checkpoint of `identity` was written.

    ConfigError names every setting whose change would make this another run, with both values: another
    architecture, other data, another optimizer. init.source may change where the base that it names is recorded (adapters,
    control branches): its fingerprint is looked at when it is opened. Batch sizes and accumulation may change with the number of ranks as
    long as the global batch stays what it was; other ranks alone change the global batch, which is said.
    """
    old = validate(identity["config"], Config, "the checkpoint's config")
    found = differences(old.model_dump(mode="json"), config.model_dump(mode="json"))
    before, now = _global_batches(old, identity["world_size"]), _global_batches(config, world_size)
    wrong, notes = [], []
    for key, (was, is_now) in found.items():
        harmless = any(key == h or key.startswith(f"{h}.") for h in HARMLESS)
        if before == now and (key.endswith(".batch_size") or key == "train.gradient_accumulation"):
            harmless = True
        if key == "init.source" and identity.get("base"):
            harmless = True
        (notes if harmless else wrong).append(f"{key}: {was!r} at the checkpoint, {is_now!r} now")
    if identity["features"] != features_fingerprint:
        wrong.append(
            f"data.features: extracted anew since (fingerprint {identity['features'][:12]}…, now {features_fingerprint[:12]}…)"
        )
    if wrong:
        lines = "\n  ".join(wrong)
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings (step {identity['step']}):\n  {lines}\n"
            "Resume with the old ones, take another run_dir, or begin from its weights with init.source"
        )
    if before != now:
        notes.append(f"global batch: {before} on {identity['world_size']} ranks, {now} on {world_size} ranks now")
    elif identity["world_size"] != world_size:
        notes.append(
            f"ranks: {identity['world_size']} at the checkpoint, {world_size} now; the global batch is the same"
        )
    return notes


def _global_batches(config: Config, world_size: int) -> dict[str, int]:
    """Samples of a step of each bucket."""
    return {b.key: b.batch_size * config.train.gradient_accumulation * world_size for b in config.data.buckets}
