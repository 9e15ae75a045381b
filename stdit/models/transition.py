"""From one stage's model to the next one's: what is carried, dropped, newly made, and why outputs stay what they were.

    model, carried = carry(source, target, allow=("class_to_text",))
    print(carried)

* class_to_text: classes give way to (or are joined by) captions. The null class's code moves into the bias of the time
  network (the re-parametrisation of PixArt-α, section 2.2) and attention to text starts at zero: the output, whatever the
  caption, equals the old model's unconditional output. Where classes stay, so does the output for every class.
* add_temporal: an image model gets temporal attention, joining at zero: every frame comes out as the image model has it.
  To `attention: full` instead: equal for one frame; of more frames, tokens see each other at once.
* rescale_positions: position_base, position_interpolation, temporal_interpolation change; no weight does. Outputs change.
* new_text_projection: features of another width or caption length; y_proj and the null caption are new. Outputs change.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stdit.config import ModelConfig
from stdit.models.stdit import STDiT

POSITIONS = {"position_base", "position_interpolation", "temporal_interpolation"}


@dataclass(frozen=True)
class Carried:
    """Parameter names: carried over as they were or as `notes` say, dropped from the source, made anew in the target."""

    carried: tuple[str, ...]
    dropped: tuple[str, ...]
    new: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"carried: {len(self.carried)} parameters"]
        lines += [
            f"{kind}: {_folded(names)}" for kind, names in (("dropped", self.dropped), ("new", self.new)) if names
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@torch.no_grad()
def carry(source: STDiT, target: ModelConfig, allow: tuple[str, ...] = (), seed: int = 0) -> tuple[STDiT, Carried]:
    """A model of config `target` with the weights of `source`, on its device and in its dtype; new weights from `seed`.

    ValueError: the configs differ in something that no change in `allow` covers; all such are listed, with both values.
    """
    changes = _changes(source.settings, target, allow)
    model = STDiT.from_settings(target, seed).to(source.device)
    if model.dtype != source.dtype:  # diffusers warns of every cast, even one to the same dtype.
        model = model.to(source.dtype)
    old, new = source.state_dict(), model.state_dict()
    kept = [name for name in new if name in old and old[name].shape == new[name].shape]
    notes = []
    if "new_text_projection" in changes:
        kept = [name for name in kept if not name.startswith(("y_embedder.y_", "y_embedder.pooled_proj."))]
        notes.append("new_text_projection: text reads anew; outputs for captions change")
    merged: dict[str, Tensor] = {**new, **{name: old[name] for name in kept}}
    if "class_to_text" in changes:
        notes.append(_class_to_text(source, target, merged, kept))
    if "add_temporal" in changes:
        notes.append(_add_temporal(target, merged))
    if "rescale_positions" in changes:
        notes.append("rescale_positions: " + _difference(source.settings, target, sorted(POSITIONS)))
    model.load_state_dict(merged)
    model.train(source.training)
    carried = Carried(
        tuple(kept),
        tuple(name for name in old if name not in kept),
        tuple(name for name in new if name not in kept),
        tuple(notes),
    )
    return model, carried


def _changes(old: ModelConfig, new: ModelConfig, allow: tuple[str, ...]) -> set[str]:
    """Which changes lie between two configs. ValueError for a difference that is not allowed."""
    covered: dict[str, set[str]] = {}
    if old.text_dim is None and new.text_dim is not None:
        dropped = {"num_classes"} if new.num_classes is None else set()
        covered["class_to_text"] = {"text_dim", "text_tokens", *dropped} | (
            {"pooled_text"} if new.pooled_text else set()
        )
    elif old.text_dim is not None and (old.text_dim, old.text_tokens) != (new.text_dim, new.text_tokens):
        covered["new_text_projection"] = {"text_dim", "text_tokens"} if new.text_dim is not None else set()
    if not old.temporal and new.temporal:
        covered["add_temporal"] = {"temporal", "attention"}
    if any(getattr(old, key) != getattr(new, key) for key in POSITIONS):
        covered["rescale_positions"] = POSITIONS
    # Without text, its settings say nothing.
    mute = {"text_tokens"} if old.text_dim is None and new.text_dim is None else set()
    free = mute.union(*(keys for change, keys in covered.items() if change in allow))
    sizes = {"size", "hidden_size", "depth", "num_heads"}
    wrong = [
        key for key in ModelConfig.model_fields if key not in sizes | free and getattr(old, key) != getattr(new, key)
    ]
    lines = [f"model.{_difference(old, new, [key])}{_remedy(key, covered, allow)}" for key in wrong]
    if old.dimensions != new.dimensions:
        lines.append(f"(hidden_size, depth, num_heads) {old.dimensions} -> {new.dimensions}")
    if lines:
        raise ValueError(
            "these weights are of another architecture, and no allowed change covers:\n  " + "\n  ".join(lines)
        )
    return set(covered)


def _difference(old: ModelConfig, new: ModelConfig, keys: list[str]) -> str:
    changed = [key for key in keys if getattr(old, key) != getattr(new, key)]
    return ", ".join(f"{key} {getattr(old, key)} -> {getattr(new, key)}" for key in changed)


def _remedy(key: str, covered: dict[str, set[str]], allow: tuple[str, ...]) -> str:
    named = [change for change, keys in covered.items() if key in keys and change not in allow]
    return f" (init.allow: [{', '.join(named)}] would)" if named else ""


def _class_to_text(source: STDiT, target: ModelConfig, weights: dict[str, Tensor], kept: list[str]) -> str:
    """Folds the null class into the time network's bias. Zero attention to text and pooled text are how a model starts."""
    table = source.state_dict().get("y_embedder.embedding_table.weight")
    if target.num_classes is not None or table is None:
        return "class_to_text: attention to text joins at zero; outputs are unchanged"
    name = "t_embedder.mlp.2.bias"
    weights[name] = weights[name] + table[-1]
    return f"class_to_text: the null class is now in {name}; outputs are the old model's unconditional ones"


def _add_temporal(target: ModelConfig, weights: dict[str, Tensor]) -> str:
    if target.attention == "full":
        return "add_temporal: attention now spans frames; outputs for one frame are unchanged"
    for name, weight in weights.items():
        if ".attn_temp.proj." in name:
            weight.zero_()
    return "add_temporal: temporal attention joins at zero; outputs are the image model's, frame by frame"


def _folded(names: tuple[str, ...]) -> str:
    """Names with those of all blocks counted once: `blocks.*.attn_temp.qkv.weight`."""
    parts = (name.split(".") for name in names)
    return ", ".join(
        dict.fromkeys(
            ".".join("*" if p.isdigit() and f[0] == "blocks" and i == 1 else p for i, p in enumerate(f)) for f in parts
        )
    )
