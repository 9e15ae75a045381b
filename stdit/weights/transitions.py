"""Which architecture changes a stage transition makes, and which config keys each of them may change.

Compares two model configs; no weights are touched here. stdit.weights.transfer applies the changes to the weights.
"""

from __future__ import annotations

import re

from stdit.config.model import ModelConfig

# Position settings that may change with resolution and duration.
POSITIONS = {
    "position_base",
    "position_interpolation",
    "position_reference",
    "position_grid",
    "position_frames",
    "temporal_interpolation",
}
# Keys without effect in a model that processes frames independently, or has no text.
TEMPORAL = {
    "temporal_positions",
    "temporal_norm",
    "temporal_position_injection",
    "position_frames",
    "temporal_interpolation",
}
TEXT = {"max_text_tokens", "text_projection", "null_text"}
# Keys that hold block indices, which double when temporal blocks are interleaved.
_BLOCK_INDICES = ("window_blocks", "kv_compress_blocks")


def is_image_model(config: ModelConfig) -> bool:
    """Whether the model has no temporal attention, or cannot tell frames apart (SD3: full attention, no time
    positions)."""
    return not config.has_time or (config.attention == "full" and config.time_positions == "none")


def interleaves_blocks(old: ModelConfig, new: ModelConfig) -> bool:
    """Whether a temporal block is inserted after each block of an image model, doubling the depth."""
    return is_image_model(old) and new.attention == "alternating"


def source_name(name: str, interleaved: bool) -> str | None:
    """The source's name of a parameter of the target; None in an inserted temporal block."""
    match = re.match(r"blocks\.(\d+)\.(.*)", name)
    if not interleaved or match is None:
        return name
    index, rest = int(match[1]), match[2]
    return None if index % 2 else f"blocks.{index // 2}.{rest}"


def interleaved_config(config: ModelConfig) -> ModelConfig:
    """`config` with the depth doubled and block indices renumbered for the inserted temporal blocks."""
    indices = {key: tuple(2 * i for i in v) for key in _BLOCK_INDICES if (v := getattr(config, key)) is not None}
    exits = tuple((time, 2 * blocks) for time, blocks in config.exit_depths)
    return config.model_copy(update={**indices, "depth": 2 * config.dimensions[1], "exit_depths": exits})


def required_changes(old: ModelConfig, new: ModelConfig, allow: tuple[str, ...]) -> set[str]:
    """The changes that lead from one config to the other.

    ValueError: differences that no change in `allow` covers; all are listed, with both values.
    """
    inactive = _inactive_keys(old) | _inactive_keys(new)
    base, note = old, ""
    if interleaves_blocks(old, new):
        base, note = interleaved_config(old), f" (twice {old.dimensions[1]}, for as many temporal blocks)"
    changes = _candidate_changes(base, new, inactive)
    permitted = inactive.union(*(keys for change, keys in changes.items() if change in allow))
    sizes = {"size", "hidden_size", "depth", "num_heads"}
    wrong = [key for key in ModelConfig.model_fields if key not in sizes | permitted and _differs(base, new, key)]
    lines = [f"model.{describe_differences(base, new, [key])}{_remedy(key, changes, allow)}" for key in wrong]
    if base.dimensions != new.dimensions:
        lines.append(f"(hidden_size, depth, num_heads) {base.dimensions}{note} -> {new.dimensions}")
    if "text_dim" in wrong and old.text_dim is None and "class_to_text" not in changes:
        lines.append(f"text cannot be added to conditioning {new.conditioning} without changing the outputs")
    if lines:
        raise ValueError(
            "the weights have another architecture, and no allowed change covers:\n  " + "\n  ".join(lines)
        )
    return set(changes)


def _candidate_changes(old: ModelConfig, new: ModelConfig, inactive: set[str]) -> dict[str, set[str]]:
    """The changes that would explain the differences, each with the keys that it may change."""
    changes: dict[str, set[str]] = {}
    if old.text_dim is None and new.text_dim is not None:
        if new.conditioning in ("adaln", "adaln_zero", "adaln_single"):
            classes = {"num_classes", "null_class"} if new.num_classes is None else set()
            pooled = {"pooled_dim"} if old.pooled_dim is None else set()
            changes["class_to_text"] = {"text_dim", "pooled_text", *pooled} | classes
    elif old.text_dim is not None and any(_differs(old, new, key) for key in ("text_dim", *TEXT)):
        changes["new_text_projection"] = {"text_dim", *TEXT} if new.text_dim is not None else set()
    temporal = {"temporal", "attention", *TEMPORAL}
    if is_image_model(old) and new.has_time and any(_differs(old, new, key) for key in temporal):
        convolution = {"mlp"} if (old.mlp, new.mlp) == ("conv2d", "conv3d") else set()
        changes["add_temporal"] = temporal | convolution
    unused = TEMPORAL if is_image_model(old) else set()
    if any(_differs(old, new, key) for key in POSITIONS - inactive - unused):
        changes["rescale_positions"] = POSITIONS
    if set(new.micro_conditions) > set(old.micro_conditions):
        changes["add_micro_conditions"] = {"micro_conditions"}
    routers = {key for key in ("dynamic_width", "dynamic_tokens") if getattr(new, key) and not getattr(old, key)}
    if routers or _differs(old, new, "exit_depths"):
        changes["add_dynamic"] = {"exit_depths", *routers}
    if old.sparse_dense is None and new.sparse_dense is not None:
        changes["add_sparse_dense"] = {"sparse_dense"}
    if old.conditioning in ("adaln", "adaln_zero") and new.conditioning == "adaln_single":
        changes["adaln_to_single"] = {"conditioning"}
    return changes


def _inactive_keys(config: ModelConfig) -> set[str]:
    """Keys without effect in this model, or on its inference outputs."""
    inactive = {"drop_path", "pad_latents"} | (set() if config.has_time else TEMPORAL)
    inactive |= TEXT if config.text_dim is None else set()
    inactive |= set() if any(config.block_text) else {"cross_qk_norm"}
    inactive |= set() if config.attention == "alternating" and config.text_dim is not None else {"temporal_text"}
    return inactive | (set() if config.num_classes is not None else {"null_class"})


def _differs(old: ModelConfig, new: ModelConfig, key: str) -> bool:
    a, b = getattr(old, key), getattr(new, key)
    return set(a) != set(b) if key == "micro_conditions" else a != b


def describe_differences(old: ModelConfig, new: ModelConfig, keys: list[str]) -> str:
    """`key old -> new` for the keys that differ."""
    return ", ".join(f"{key} {getattr(old, key)} -> {getattr(new, key)}" for key in keys if _differs(old, new, key))


def _remedy(key: str, changes: dict[str, set[str]], allow: tuple[str, ...]) -> str:
    names = [change for change, keys in changes.items() if key in keys and change not in allow]
    return f" (needs init.allow: [{', '.join(names)}])" if names else ""
