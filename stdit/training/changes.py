"""What may change in a config between a run's checkpoint and the same command run again, and what may not."""

from __future__ import annotations

from typing import Any

from stdit.config import Config, ConfigError, validate
from stdit.config.diff import TRAINING_RUNTIME_KEYS, changes, global_batch_sizes, matches

# Changes that a resume allows: all that leave the weights alone, and the length of the run.
RESUME_KEYS = (*TRAINING_RUNTIME_KEYS, "train.steps")


def check_resumable(identity: dict[str, Any], config: Config, world_size: int, features_fingerprint: str) -> list[str]:
    """Lines that say what is different, all of it harmless, since the checkpoint of `identity` was written.

    ConfigError names every setting whose change would make this another run, with both values: another
    architecture, other data, another optimizer. init.source may change where the base that it names is recorded (adapters,
    control branches): its fingerprint is looked at when it is opened. Batch sizes and accumulation may change with the number of ranks as
    long as the global batch stays what it was; other ranks alone change the global batch, which is said.
    """
    old = validate(identity["config"], Config, "the checkpoint's config")
    before, now = global_batch_sizes(old, identity["world_size"]), global_batch_sizes(config, world_size)
    wrong, notes = [], []
    for change in changes(old.model_dump(mode="json"), config.model_dump(mode="json")):
        allowed = matches(change.key, RESUME_KEYS)
        if before == now and (change.key.endswith(".batch_size") or change.key == "train.gradient_accumulation"):
            allowed = True
        if change.key == "init.source" and identity.get("base"):
            allowed = True
        (notes if allowed else wrong).append(str(change))
    if identity["features"] != features_fingerprint:
        wrong.append(
            f"data.features: not the features of the checkpoint (fingerprint {identity['features'][:12]}… -> {features_fingerprint[:12]}…)"
        )
    if wrong:
        lines = "\n  ".join(wrong)
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings (step {identity['step']}, checkpoint -> now):\n  {lines}\n"
            "Resume with the old ones, take another run_dir, or begin from its weights with init.source"
        )
    if before != now:
        notes.append(f"global batch: {before} on {identity['world_size']} ranks -> {now} on {world_size} ranks")
    elif identity["world_size"] != world_size:
        notes.append(f"ranks: {identity['world_size']} -> {world_size}; the global batch is the same")
    return notes
