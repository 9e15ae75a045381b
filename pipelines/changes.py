"""Settings of the parts of a plan, and the results that a changed plan invalidates. Pure.

# {"prepare": …, "extraction": …, "stages.NAME": …}; of several sets "sets.NAME.extraction"
parts = describe(plan, stages)
changes = differences(recorded, parts)        # by key, with old and new values
invalid = invalidated(changes, parts)         # the changed parts, and all that depend on them
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pipelines.plan import Plan, ResolvedStage, Resources
from stdit.config import Config
from stdit.config.diff import (
    EXTRACTION_RUNTIME_KEYS,
    TRAINING_RUNTIME_KEYS,
    Change,
    changes,
    flatten,
    global_batch_sizes,
    matches,
)

Settings = dict[str, Any]


def describe(
    plan: Plan, stages: Sequence[ResolvedStage], manifests: Mapping[str, str | None] | None = None
) -> dict[str, Settings]:
    """Settings of each part (`prepare`, `extraction`, `stages.NAME`) as flat mappings of dotted keys.

    Settings that do not affect the result are left out. `manifests`: SHA-256 of each set's manifest of clips, if it
    exists.
    """
    parts: dict[str, Settings] = {}
    for name, source in plan.feature_sets.items():
        if source.prepare is not None:
            parts[source.key("prepare")] = _flat(source.prepare.model_dump(mode="json"), ("out", "manifest"))
        settings = _flat(source.extract.model_dump(mode="json"), EXTRACTION_RUNTIME_KEYS)
        if (digest := (manifests or {}).get(name)) is not None:
            settings["manifest_sha256"] = digest
        parts[source.key("extraction")] = settings
    for stage in stages:
        parts[f"stages.{stage.name}"] = describe_stage(stage.config, plan.resources, stage.after, stage.sets)
    return parts


def describe_stage(config: Config, resources: Resources, after: str | None, sets: Sequence[str] = ("",)) -> Settings:
    """One stage. Micro-batches, workers and accumulation stand in it as the samples of a step, which is what is learned
    from: half the batch on twice the workers is no change."""
    data = config.model_dump(mode="json")
    sizes = global_batch_sizes(config, resources.ranks[0])
    for name in ("gradient_accumulation", "tokens_per_step", "tokens_per_micro_batch", "samples_multiple_of"):
        del data["train"][name]
    for bucket in data["data"]["buckets"]:
        del bucket["batch_size"], bucket["global_batch"], bucket["tokens"]
    if after is not None and data["init"]:
        del data["init"]["source"]  # `after` says it, wherever run_dir is.
    return {
        **_flat(data, TRAINING_RUNTIME_KEYS),
        **{f"samples_per_step.{key}": size for key, size in sizes.items()},
        "after": after,
        # A plan's only set has no name.
        **({"sets": list(sets)} if any(sets) else {}),
    }


def parents(parts: Mapping[str, Settings], part: str) -> list[str]:
    """The parts that `part` depends on."""
    before, _, kind = part.rpartition(".")
    if kind == "prepare":
        return []
    if kind == "extraction":
        prepare = f"{before}.prepare" if before else "prepare"
        return [prepare] if prepare in parts else []
    after, sets = parts[part].get("after"), parts[part].get("sets")
    features = [f"sets.{name}.extraction" for name in sets] if sets else ["extraction"]
    return [*features, *([f"stages.{after}"] if after else [])]


def fingerprint(parts: Mapping[str, Settings], part: str) -> str:
    """Hex digest of a part and of everything that it depends on."""
    data = [parts[part], [fingerprint(parts, parent) for parent in parents(parts, part)]]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def differences(recorded: Mapping[str, Settings], current: Mapping[str, Settings]) -> dict[str, list[Change]]:
    """Changed settings by part, of parts that are in both: a new part has nothing to invalidate, a removed one is left
    alone. A manifest that does not exist yet (sha256 unknown) is no change."""
    found: dict[str, list[Change]] = {}
    for part in [p for p in current if p in recorded]:
        old, new = recorded[part], current[part]
        part_changes = [c for c in changes(old, new) if c.key != "manifest_sha256" or (c.key in old and c.key in new)]
        if part_changes:
            found[part] = part_changes
    return found


def invalidated(changed: Collection[str], current: Mapping[str, Settings]) -> dict[str, str]:
    """Parts whose results no longer hold, with the reason: `changed` themselves, or a dependency."""
    reasons: dict[str, str] = {}
    for part in current:  # Parents come before their children: describe() keeps the order of training.
        if part in changed:
            reasons[part] = "changed"
            continue
        stale = [p for p in parents(current, part) if p in reasons]
        if stale:
            reasons[part] = f"depends on {stale[0]}"
    return reasons


def _flat(data: Mapping[str, Any], exclude: Sequence[str]) -> Settings:
    """Dotted keys and values, without those of `exclude`."""
    return {key: value for key, value in flatten(data).items() if not matches(key, exclude)}
