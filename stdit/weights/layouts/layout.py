"""A weight layout: the mapping between a published state dict and ours, and which configs the layout can express.

Each rule maps one of our parameters to one or more tensors of the file, losslessly in both directions, so that one
table serves import and export.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.config.model import ModelConfig
from stdit.models.stdit import STDiT

State = dict[str, Tensor]
# Buffers of a file that are not parameters (positions); None where the config does not determine the grid.
Tables = dict[str, Tensor | None]
# Longest list of names in an error message.
MAX_NAMES = 20


@dataclass(frozen=True)
class SourceWeights:
    """A state dict as read, the config.json beside it, the user's `--set` overrides, and the file's name for messages.

    notes: what was assumed because the file does not determine it; a conversion prints them.
    """

    state: State
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    where: str
    notes: list[str] = field(default_factory=list)

    def assume(self, key: str, value: Any) -> Any:
        """The value, with a note on how to change it, unless `--set` has the key."""
        if key not in self.overrides:
            self.notes.append(
                f"{key} {value} is assumed, as the file does not determine it; change it with --set {key}=…"
            )
        return value


class Rule(NamedTuple):
    """Maps one of our parameters to tensors of the file: `pack` on import, `unpack` on export."""

    ours: str
    theirs: tuple[str, ...]
    pack: Callable[[list[Tensor]], Tensor]
    unpack: Callable[[Tensor], list[Tensor]]
    # The file stores the same tensor several times; checked on import.
    copies: bool = False


@dataclass(frozen=True)
class Layout:
    """A published layout.

    fixed: ModelConfig values that all its models share. free: keys that may vary; all other keys are at their defaults.
    infer: values of the free keys, from tensors and config.json. rules: for a config. tables: position tables that the
    file stores, computed from the config. limits: what else the layout cannot express, a line each. diffusers_class:
    the diffusers class, and diffusers_config its config.json. wrapper_key: the key that holds the state dict in
    published files. differences: how the layout's own code would compute this model otherwise; notes of imports and
    exports.
    """

    name: str
    title: str
    fixed: Mapping[str, Any]
    free: frozenset[str]
    infer: Callable[[SourceWeights], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]
    tables: Callable[[ModelConfig], Tables] = lambda _: {}
    limits: Callable[[ModelConfig], list[str]] = lambda _: []
    diffusers_class: str | None = None
    diffusers_config: Callable[[ModelConfig], dict[str, Any]] | None = None
    wrapper_key: str | None = None
    differences: Callable[[ModelConfig], list[str]] = lambda _: []


# ------------------------------------------------------------------------------------------ rules


def same(ours: str, theirs: str | None = None) -> Rule:
    """The same tensor, possibly renamed."""
    return Rule(ours, (theirs or ours,), lambda tensors: tensors[0], lambda tensor: [tensor])


def linear(ours: str, theirs: str | None = None) -> list[Rule]:
    """Weight and bias of a linear layer, possibly renamed."""
    return [same(f"{ours}.{part}", f"{theirs or ours}.{part}") for part in ("weight", "bias")]


def concatenated(ours: str, theirs: Iterable[str]) -> list[Rule]:
    """One layer of ours that the file splits by rows into several (qkv from q, k and v)."""
    names = tuple(theirs)

    def unpack(tensor: Tensor) -> list[Tensor]:
        return list(tensor.chunk(len(names)))

    return [
        Rule(f"{ours}.{part}", tuple(f"{name}.{part}" for name in names), torch.cat, unpack)
        for part in ("weight", "bias")
    ]


def replicated(ours: str, theirs: Iterable[str]) -> list[Rule]:
    """One layer of ours that the file stores several times."""
    names = tuple(theirs)
    return [
        Rule(
            f"{ours}.{part}",
            tuple(f"{name}.{part}" for name in names),
            lambda tensors: tensors[0],
            lambda tensor: [tensor] * len(names),
            copies=True,
        )
        for part in ("weight", "bias")
    ]


def halves_swapped(ours: str, theirs: str, axis: int = 0) -> Rule:
    """A tensor whose two halves along `axis` are in the other order in the file."""

    def swap(tensor: Tensor) -> Tensor:
        return tensor.roll(tensor.shape[axis] // 2, axis)

    return Rule(ours, (theirs,), lambda tensors: swap(tensors[0]), lambda tensor: [swap(tensor)])


def image_patches(ours: str, theirs: str) -> list[Rule]:
    """The patch embedding: Conv2d in the file, Conv3d with one frame here."""
    return [
        Rule(
            f"{ours}.weight",
            (f"{theirs}.weight",),
            lambda tensors: tensors[0].unsqueeze(2),
            lambda tensor: [tensor.squeeze(2)],  # with several frames a patch it stays 5D, and fails the shape check
        ),
        same(f"{ours}.bias", f"{theirs}.bias"),
    ]


# ----------------------------------------------------------------------------------------- import


def build_model(state: State, settings: ModelConfig, rules: list[Rule], tables: Tables, where: str) -> STDiT:
    """The model of `settings` with the weights of `state`; each tensor keeps its dtype.

    ValueError: missing or unknown keys, wrong shapes or dtypes, copies that differ; all are listed.
    """
    with torch.device("meta"):
        model = STDiT.from_settings(settings)
    expected = {name: tensor for rule in rules for name, tensor in _expected_tensors(model, rule)}
    errors = {
        "missing": [name for name in expected if name not in state],
        "unknown": [name for name in state if name not in expected and name not in tables],
        "wrong shape": _wrong_shapes(state, expected),
        "not dense floating-point": [
            f"{name} {state[name].dtype} {state[name].layout}"
            for name in expected
            if name in state and not (state[name].is_floating_point() and state[name].layout == torch.strided)
        ],
    }
    raise_if_any(where, "the state dict does not match its layout", errors)
    raise_if_any(
        where,
        "tensors that must agree differ",
        {
            "differs from its copies": [
                name
                for rule in rules
                if rule.copies
                for name in rule.theirs[1:]
                if not torch.equal(state[name], state[rule.theirs[0]])
            ],
            "differ in dtype": [
                ", ".join(f"{n} {state[n].dtype}" for n in rule.theirs)
                for rule in rules
                if len({state[n].dtype for n in rule.theirs}) > 1
            ],
        },
    )
    packed = {rule.ours: rule.pack([state[name] for name in rule.theirs]) for rule in rules}
    # A contiguous copy each: aligned memory, and no shared storage.
    model.load_state_dict(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in packed.items()}, assign=True
    )
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()


def _expected_tensors(model: STDiT, rule: Rule) -> list[tuple[str, Tensor]]:
    """Names and meta tensors that a file must have for a rule."""
    parameter = model.state_dict()[rule.ours]
    return list(zip(rule.theirs, rule.unpack(parameter), strict=True))


def _wrong_shapes(state: State, expected: State) -> list[str]:
    return [
        f"{name} {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]


def export_state_dict(model: STDiT, rules: list[Rule], tables: Tables) -> State:
    """The state dict in the file's layout, with tables in the dtype of the weights; no tensors share memory."""
    state = model.state_dict()
    assert {rule.ours for rule in rules} == set(state)
    exported = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.unpack(state[rule.ours]), strict=True)
    }
    dtype = state["x_embedder.proj.weight"].dtype
    return exported | {name: table.to(dtype) for name, table in tables.items() if table is not None}


# ----------------------------------------------------------------------------------------- export


def unsupported(config: ModelConfig, layout: Layout, grid: tuple[int, int] | None = None) -> list[str]:
    """What the layout cannot express, a line each: key and both values. grid: of the source's position table, if
    known."""
    inactive, lines = _inactive_keys(config), []
    for key, info in ModelConfig.model_fields.items():
        if key in layout.free or key in inactive:
            continue
        value = _effective_value(config, key, getattr(config, key))
        expected = _effective_value(config, key, layout.fixed.get(key, info.get_default()))
        if value != expected:
            lines.append(f"{key} is {value!r}; {layout.title} has {expected!r}")
    if layout.diffusers_class is None and grid is None and any(t is None for t in layout.tables(config).values()):
        lines.append(
            f"position_base is None; {layout.title} stores a position table for one grid: give --set position_base=N, the "
            "grid's side in patches"
        )
    return lines + layout.limits(config)


def _effective_value(c: ModelConfig, key: str, value: Any) -> Any:
    """The value, with None replaced by what it defaults to."""
    defaults = {"mlp_norm_eps": c.norm_eps, "temporal_positions": c.positions, "timestep_width": c.dimensions[0]}
    return defaults.get(key) if value is None else value


def _inactive_keys(c: ModelConfig) -> set[str]:
    """Keys without effect in this config, or on how the weights are used."""
    inactive = {"size", "drop_path", "pad_latents"}
    if c.text_dim is None:
        inactive |= {"max_text_tokens", "text_projection", "null_text", "cross_qk_norm"}
    elif c.null_text == "empty":
        inactive |= {"max_text_tokens"}
    if c.num_classes is None:
        inactive |= {"null_class"}
    if not c.has_time:
        inactive |= {"temporal_positions", "temporal_position_injection", "temporal_interpolation", "position_frames"}
    if c.attention != "factorized" or not c.temporal:
        inactive |= {"temporal_norm"}
    if c.attention != "alternating" or c.text_dim is None:
        inactive |= {"temporal_text"}
    if c.window_size is None:
        inactive |= {"window_blocks", "relative_positions"}
    if c.kv_compress is None:
        inactive |= {"kv_compress_blocks", "kv_compress_sampling"}
    return inactive


# ----------------------------------------------------------------------------- sizes, from tensors


def require_tensors(source: SourceWeights, *names: str) -> None:
    """ValueError listing which of these tensors are missing."""
    missing = [name for name in names if name not in source.state]
    raise_if_any(source.where, "tensors that determine the model's size are missing", {"missing": missing})


def tensor_shape(source: SourceWeights, name: str, *axes: int) -> tuple[int, ...]:
    """The shape of a tensor with `axes` dimensions. ValueError: missing, or another number of dimensions."""
    require_tensors(source, name)
    shape = tuple(source.state[name].shape)
    if len(shape) not in axes or 0 in shape:
        expected = " or ".join(map(str, axes))
        raise ValueError(
            f"{source.where}: {name} has the wrong shape {shape}; expected {expected} non-empty dimensions"
        )
    return shape


def count_blocks(source: SourceWeights, prefix: str) -> int:
    """Number of blocks, from the indices after `prefix`. ValueError: an index is missing."""
    names = (name.removeprefix(prefix).split(".")[0] for name in source.state if name.startswith(prefix))
    numbers = {int(n) for n in names if n.isdecimal()}
    require_tensors(source, *([f"{prefix}0"] if not numbers else []))
    missing = (n for n in range(max(numbers)) if n not in numbers)
    what = f"blocks are numbered up to {max(numbers)}, but some are missing"
    raise_if_any(source.where, what, {"missing": [f"{prefix}{n}" for n in islice(missing, MAX_NAMES)]})
    return len(numbers)


# --------------------------------------------------------------------------------------- messages


def raise_if_any(where: str, what: str, errors: Mapping[str, list[str]]) -> None:
    """ValueError with a line for each non-empty kind of error; names are grouped over blocks."""
    lines = [f"  {kind}: {format_names(names)}" for kind, names in errors.items() if names]
    if lines:
        raise ValueError(f"{where}: {what}\n" + "\n".join(lines))


def format_names(names: Iterable[str]) -> str:
    """Names, grouped over blocks with a count: `blocks.*.attn.proj.bias (28)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(blocks)\.\d+\.", r"\1.*.", name), []).append(name)
    lines = [f"{pattern} ({len(group)})" if len(group) > 1 else group[0] for pattern, group in groups.items()]
    more = len(lines) - MAX_NAMES
    return ", ".join(lines[:MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
