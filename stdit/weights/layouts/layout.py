"""What a layout of weights is: which parameter of ours lies where in it, and what of our config it can express.

A layout is a set of values, its rules among them. Each rule pairs one parameter of ours with one or more tensors of the
file and says how to get from either to the other without touching a bit; so one table serves reading and writing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stdit.config.model import ModelConfig
from stdit.models.stdit import STDiT

State = dict[str, Tensor]
# What a file holds beside parameters; None where it may hold it, but the config does not say of which grid.
Tables = dict[str, Tensor | None]
# At most so many names of one kind in a message.
SHOWN = 20


class Foreign(NamedTuple):
    """Weights as they were found: tensors by name, the config.json beside them, what the user set, and the source's name."""

    state: State
    config: Mapping[str, Any]
    overrides: Mapping[str, Any]
    where: str


class Rule(NamedTuple):
    """One parameter of ours and the tensors of a file that it is made of."""

    ours: str
    theirs: tuple[str, ...]
    pack: Callable[[list[Tensor]], Tensor]
    unpack: Callable[[Tensor], list[Tensor]]
    # The tensors are all one and the same, which has to be true of the file.
    copies: bool = False


@dataclass(frozen=True)
class Layout:
    """`fixed` and `free`: what the layout has of ModelConfig's values; every other one stands at its default in it.

    settings: the free ones, read from a file. rules: of a config. tables: what the file holds beside parameters, made
    from the config (positions). limits: what else of a config the layout cannot express, a line each. hub: the name of
    diffusers' class, whose config.json `config` makes. wrap: the key under which a published file has its weights. guessed: settings that the
    file leaves open, and that are said when they are taken.
    """

    name: str
    title: str
    fixed: Mapping[str, Any]
    free: frozenset[str]
    settings: Callable[[Foreign], dict[str, Any]]
    rules: Callable[[ModelConfig], list[Rule]]
    tables: Callable[[ModelConfig], Tables] = lambda _: {}
    limits: Callable[[ModelConfig], list[str]] = lambda _: []
    hub: str | None = None
    config: Callable[[ModelConfig], dict[str, Any]] | None = None
    wrap: str | None = None
    guessed: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------ rules


def same(ours: str, theirs: str | None = None) -> Rule:
    """One tensor under another name (or its own)."""
    return Rule(ours, (theirs or ours,), lambda found: found[0], lambda made: [made])


def linear(ours: str, theirs: str | None = None) -> list[Rule]:
    """Weight and bias of a layer."""
    return [same(f"{ours}.{part}", f"{theirs or ours}.{part}") for part in ("weight", "bias")]


def stacked(ours: str, theirs: Iterable[str]) -> list[Rule]:
    """Weight and bias of one layer that the file has as several, whose rows come one after the other."""
    names = tuple(theirs)

    def unpack(made: Tensor) -> list[Tensor]:
        return list(made.chunk(len(names)))

    return [
        Rule(f"{ours}.{part}", tuple(f"{name}.{part}" for name in names), torch.cat, unpack)
        for part in ("weight", "bias")
    ]


def copied(ours: str, theirs: Iterable[str]) -> list[Rule]:
    """Weight and bias of one layer that the file has several times over."""
    names = tuple(theirs)
    return [
        Rule(
            f"{ours}.{part}",
            tuple(f"{name}.{part}" for name in names),
            lambda found: found[0],
            lambda made: [made] * len(names),
            copies=True,
        )
        for part in ("weight", "bias")
    ]


def swapped(ours: str, theirs: str, axis: int = 0) -> Rule:
    """A tensor whose two halves along `axis` the file has the other way round."""

    def turn(found: Tensor) -> Tensor:
        return found.roll(found.shape[axis] // 2, axis)

    return Rule(ours, (theirs,), lambda found: turn(found[0]), lambda made: [turn(made)])


def image_patches(ours: str, theirs: str) -> list[Rule]:
    """The embedding of patches, a Conv2d in the file and a Conv3d of one frame here."""
    return [
        Rule(
            f"{ours}.weight",
            (f"{theirs}.weight",),
            lambda found: found[0].unsqueeze(2),
            lambda made: [made.squeeze(2)],  # patches of several frames stay five axes, and do not fit
        ),
        same(f"{ours}.bias", f"{theirs}.bias"),
    ]


# ------------------------------------------------------------------------------- from file to model


def build(state: State, settings: ModelConfig, rules: list[Rule], tables: Tables, where: str) -> STDiT:
    """The model of `settings` with the weights in `state`, each in its own dtype.

    ValueError: keys missing or unknown, wrong shapes or dtypes, copies that differ, tables that are not these; all listed.
    """
    with torch.device("meta"):
        model = STDiT.from_settings(settings)
    wanted = {name: tensor for rule in rules for name, tensor in _expected(model, rule)}
    wrong = {
        "missing": [name for name in wanted if name not in state],
        "unknown": [name for name in state if name not in wanted and name not in tables],
        "of the wrong shape": _misshapen(state, wanted),
        "not plain floating-point numbers": [
            f"{name} {state[name].dtype} {state[name].layout}"
            for name in wanted
            if name in state and not (state[name].is_floating_point() and state[name].layout == torch.strided)
        ],
    }
    refuse(where, "the weights are not of this layout", wrong)
    refuse(
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
    # Memory of its own, at addresses where products are fast.
    model.load_state_dict(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in packed.items()}, assign=True
    )
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model.eval()


def _expected(model: STDiT, rule: Rule) -> list[tuple[str, Tensor]]:
    """Names and (meta) tensors that a file must have for a rule."""
    parameter = model.state_dict()[rule.ours]
    return list(zip(rule.theirs, rule.unpack(parameter), strict=True))


def _misshapen(state: State, wanted: State) -> list[str]:
    return [
        f"{name} {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]


def unpacked(model: STDiT, rules: list[Rule], tables: Tables) -> State:
    """The tensors of a file: the model's, and the tables in the dtype of its weights; each with memory of its own."""
    own = model.state_dict()
    assert {rule.ours for rule in rules} == set(own)
    made = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for rule in rules
        for name, tensor in zip(rule.theirs, rule.unpack(own[rule.ours]), strict=True)
    }
    dtype = own["x_embedder.proj.weight"].dtype
    return made | {name: table.to(dtype) for name, table in tables.items() if table is not None}


# ---------------------------------------------------------------------------- from config to layout


def inexpressible(config: ModelConfig, layout: Layout, grid: tuple[int, int] | None = None) -> list[str]:
    """What of a config the layout cannot express, a line each: the key, with both values. grid: of the file's table of
    positions, where it is known and the config does not say it."""
    mute, lines = _mute(config), []
    for key, field in ModelConfig.model_fields.items():
        if key in layout.free or key in mute:
            continue
        value = _spelt_out(config, key, getattr(config, key))
        expected = _spelt_out(config, key, layout.fixed.get(key, field.get_default()))
        if value != expected:
            lines.append(f"{key} is {value!r}; {layout.title} has {expected!r}")
    if layout.hub is None and grid is None and any(t is None for t in layout.tables(config).values()):
        lines.append(
            f"position_base is None; {layout.title} has a table of one grid: give --set position_base=N, its patches a side"
        )
    return lines + layout.limits(config)


def _spelt_out(c: ModelConfig, key: str, value: Any) -> Any:
    """A value with what None stands for."""
    stand_for = {"mlp_norm_eps": c.norm_eps, "temporal_positions": c.positions, "timestep_width": c.dimensions[0]}
    return stand_for.get(key) if value is None else value


def _mute(c: ModelConfig) -> set[str]:
    """Keys that say nothing in this config, or nothing of how the weights are used."""
    mute = {"size", "drop_path"}
    if c.text_dim is None:
        mute |= {"max_text_tokens", "text_projection", "null_text", "cross_qk_norm"}
    elif c.null_text == "empty":
        mute |= {"max_text_tokens"}
    if c.num_classes is None:
        mute |= {"null_class"}
    if not c.has_time:
        mute |= {"temporal_positions", "temporal_position_injection", "temporal_interpolation", "position_frames"}
    if c.attention != "factorized" or not c.temporal:
        mute |= {"temporal_norm"}
    if c.attention != "alternating" or c.text_dim is None:
        mute |= {"temporal_text"}
    if c.window_size is None:
        mute |= {"window_blocks", "relative_positions"}
    if c.kv_compress is None:
        mute |= {"kv_compress_blocks"}
    return mute


# --------------------------------------------------------------------- sizes, told by tensors' shapes


def need(foreign: Foreign, *names: str) -> None:
    """ValueError listing which of the tensors that tell a model's size are not there."""
    missing = [name for name in names if name not in foreign.state]
    refuse(foreign.where, "tensors are missing that tell the model's size", {"missing": missing})


def shape(foreign: Foreign, name: str, *axes: int) -> tuple[int, ...]:
    """The shape of a tensor, which has so many axes. ValueError: it is not there, or has another number of them."""
    need(foreign, name)
    found = tuple(foreign.state[name].shape)
    if len(found) not in axes or 0 in found:
        expected = " or ".join(map(str, axes))
        raise ValueError(
            f"{foreign.where}: {name} has the wrong shape {found}; expected {expected} axes, none of them empty"
        )
    return found


def count_blocks(foreign: Foreign, prefix: str) -> int:
    """Blocks, by the numbers after `prefix`. ValueError: a number is left out."""
    names = (name.removeprefix(prefix).split(".")[0] for name in foreign.state if name.startswith(prefix))
    numbers = {int(n) for n in names if n.isdecimal()}
    need(foreign, *([f"{prefix}0"] if not numbers else []))
    lacking = (n for n in range(max(numbers)) if n not in numbers)
    what = f"blocks are numbered up to {max(numbers)}, and some are not there"
    refuse(foreign.where, what, {"missing": [f"{prefix}{n}" for n in islice(lacking, SHOWN)]})
    return len(numbers)


# --------------------------------------------------------------------------------------- messages


def refuse(where: str, what: str, wrong: Mapping[str, list[str]]) -> None:
    """ValueError with a line for each kind of wrong name that there is; names of all blocks are counted once."""
    lines = [f"  {kind}: {listed(names)}" for kind, names in wrong.items() if names]
    if lines:
        raise ValueError(f"{where}: {what}\n" + "\n".join(lines))


def listed(names: Iterable[str]) -> str:
    """Names with those that differ in a block's number alone as one, and how many they are: `blocks.*.attn.proj.bias (28)`."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(re.sub(r"(blocks)\.\d+\.", r"\1.*.", name), []).append(name)
    shown = [f"{star} ({len(group)})" if len(group) > 1 else group[0] for star, group in groups.items()]
    more = len(shown) - SHOWN
    return ", ".join(shown[:SHOWN]) + (f" and {more} more" if more > 0 else "")
