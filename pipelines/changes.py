"""What a plan's parts are made of, and which results a changed plan makes void. Pure.

parts = describe(plan, stages)                # {"prepare": …, "extraction": …, "stages.NAME": …}
changes = differences(recorded, parts)        # by key, with old and new values
void = invalidated(changes, parts)            # the parts changed, and all that is made from them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.plan import Plan, ResolvedStage, Resources
from stdit.config import Config

# Settings that say where, how fast and how visibly a part is made, not what comes out of it.
_NOT_IDENTITY = (
    "name", "run_dir", "data.features", "data.workers", "validation", "samples",
    "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.tensorboard", "train.wandb_project",
    "train.max_bad_steps", "train.activation_checkpointing", "train.attention_backend", "train.compile",
    "manifest", "out", "workers", "decode_timeout_s", "max_bad_share", "batch_size",
)  # fmt: skip

Piece = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One setting of one part that is not what it was. `key` is dotted; None stands for absent."""

    part: str
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.part}.{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"


def describe(plan: Plan, stages: Sequence[ResolvedStage], manifest_sha256: str | None = None) -> dict[str, Piece]:
    """What each part is made of: `prepare`, `extraction`, `stages.NAME`, as flat mappings of dotted keys.

    Settings that change nothing in the result are left out. `manifest_sha256`: of the clips' manifest, where it exists.
    """
    pieces: dict[str, Piece] = {}
    if plan.prepare is not None:
        pieces["prepare"] = _flat(plan.prepare.model_dump(mode="json"))
    pieces["extraction"] = _flat(plan.extract.model_dump(mode="json"))
    if manifest_sha256 is not None:
        pieces["extraction"]["manifest_sha256"] = manifest_sha256
    for stage in stages:
        pieces[f"stages.{stage.name}"] = describe_stage(stage.config, plan.resources, stage.after)
    return pieces


def describe_stage(config: Config, resources: Resources, after: str | None) -> Piece:
    """One stage. Micro-batches, workers and accumulation stand in it as the samples of a step, which is what is learned
    from: half the batch on twice the workers is no change."""
    data = config.model_dump(mode="json")
    each = resources.workers * data["train"].pop("gradient_accumulation")
    sizes = {b.key: each * b.batch_size for b in config.data.buckets}
    for bucket in data["data"]["buckets"]:
        del bucket["batch_size"]
    if after is not None and data["init"]:
        del data["init"]["source"]  # `after` says it, wherever run_dir is.
    return {**_flat(data), **{f"samples_per_step.{key}": size for key, size in sizes.items()}, "after": after}


def parents(pieces: Mapping[str, Piece], part: str) -> list[str]:
    """The parts that `part` is made from."""
    if part == "prepare":
        return []
    if part == "extraction":
        return ["prepare"] if "prepare" in pieces else []
    after = pieces[part].get("after")
    return ["extraction", *([f"stages.{after}"] if after else [])]


def fingerprint(pieces: Mapping[str, Piece], part: str) -> str:
    """Hex digest of a part and of everything it is made from."""
    whole = [pieces[part], [fingerprint(pieces, parent) for parent in parents(pieces, part)]]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def differences(recorded: Mapping[str, Piece], current: Mapping[str, Piece]) -> list[Change]:
    """Every setting that differs, of parts that stand in both: a part that is new has nothing to invalidate, one
    that has gone is left where it lies. A manifest not there yet (sha256 unknown) is no change."""
    found: list[Change] = []
    for part in [p for p in current if p in recorded]:
        old, new = recorded[part], current[part]
        for key in [*old, *(k for k in new if k not in old)]:
            if old.get(key) == new.get(key) or (key == "manifest_sha256" and (key not in old or key not in new)):
                continue
            found.append(Change(part, key, old.get(key), new.get(key)))
    return found


def invalidated(changes: Sequence[Change], current: Mapping[str, Piece]) -> dict[str, str]:
    """Parts whose results no longer hold, with why: changed themselves, or made from one that is."""
    reasons: dict[str, str] = {}
    changed = {change.part for change in changes}
    for part in current:  # Parents stand before their children: describe() keeps the order of training.
        if part in changed:
            reasons[part] = "changed"
            continue
        stale = [p for p in parents(current, part) if p in reasons]
        if stale:
            reasons[part] = f"made from {stale[0]}"
    return reasons


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, without those that are no part of what comes out. Lists are values."""
    return dict(_leaves(data, prefix))


def _leaves(data: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        if dotted in _NOT_IDENTITY:
            continue
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{dotted}.")
        else:
            yield dotted, value
