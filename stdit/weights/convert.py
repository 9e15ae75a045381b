"""Published weights to ours, and ours to published layouts, without a bit changed.

    python -m stdit.weights.convert DiT-XL-2-256x256.pt --to weights/dit-xl
    python -m stdit.weights.convert PixArt-XL-2-1024-MS/ --to weights/pixart
    python -m stdit.weights.convert weights/dit-xl --to DiT.safetensors --layout dit
    python -m stdit.weights.convert run/checkpoints/step-00010000 --to out --layout diffusers --set null_text=empty

SOURCE's layout is told by its tensors' names. Every name and shape has to be what that layout has: nothing is skipped and
nothing filled in. docs/weights.md has the layouts, and what each of them can't say of itself.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor

from stdit.config import ConfigError, ModelConfig
from stdit.config.load import apply_override, validate
from stdit.files import atomic_folder, atomic_path
from stdit.models.checks import check_config
from stdit.models.stdit import STDiT
from stdit.weights.layouts import LAYOUTS, recognised
from stdit.weights.layouts.layout import Foreign, Layout, Rule, Tables, build, inexpressible, listed, same, unpacked
from stdit.weights.layouts.positions import check_tables, of_grid, table_grid
from stdit.weights.layouts.reading import HUB_FILES, PICKLED, SUFFIXES, read_config, read_source

# What --layout takes beside the names of layouts: whichever of diffusers' classes fits the model.
ANY_HUB = "diffusers"
OWN = "stdit"
NULL = "y_embedder.y_embedding"
# In our config.json: what the source said that changes no output, but is written again on the way back.
SAID = "_published"


class Conversion(NamedTuple):
    """What was read and written: titles of the layouts, the model's settings, its parameters, and remarks."""

    source: str
    target: str
    settings: ModelConfig
    parameters: int
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        c = self.settings
        width, depth, heads = c.dimensions
        lines = [
            f"{self.source} -> {self.target}: {self.parameters:,} parameters, hidden size {width}, {depth} blocks, {heads} heads",
            f"positions: {c.positions}, base {c.position_base}, interpolation {c.position_interpolation}",
        ]
        return "\n".join(lines + [f"note: {remark}" for remark in self.remarks])


# ----------------------------------------------------------------------------------------- reading


def load_foreign(source: Path | str, overrides: Mapping[str, Any] | None = None, averaged: bool | None = None) -> STDiT:
    """The model in a file or folder of any known layout (ours too), in eval mode, on the CPU, each tensor in its own dtype.

    Args:
        source: a .safetensors, .pt, .pth, .bin or .ckpt file, a diffusers folder, a pipeline's folder with `transformer/`
            in it, or a folder with one file of weights.
        overrides: values of ModelConfig that the file does not say (`num_heads`, positions) or that are to be read otherwise.
        averaged: of a checkpoint with both, True for the averaged (EMA) weights, False for the trained ones, None for
            the averaged ones where there are any.

    Raises:
        ValueError: the source can't be read, its layout isn't known, or names, shapes or values are not the layout's; all listed.
    """
    return _load(Path(source), overrides or {}, averaged)[0]


def _load(source: Path, overrides: Mapping[str, Any], averaged: bool | None) -> tuple[STDiT, str, tuple[str, ...]]:
    """The model, the title of the layout that it was found in, and remarks."""
    state, config, where = read_source(source, averaged)
    remarks = []
    if config.get("_class_name") == STDiT.__name__:
        check_config(config, STDiT.__name__)
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        settings = validate({**values, **overrides}, ModelConfig, f"{where}: model")
        with torch.device("meta"):
            rules = [same(name) for name in STDiT.from_settings(settings).state_dict()]
        layout, tables, said = None, {}, config.get(SAID, {})
    else:
        layout = recognised(state, where)
        foreign = Foreign(state, config, overrides, where)
        found = {**layout.fixed, **layout.settings(foreign), **overrides}
        settings = validate(found, ModelConfig, f"{where}: model")
        rules, tables = layout.rules(settings), layout.tables(settings)
        _check_structure(settings, layout, rules, where)
        check_tables(foreign, tables, settings)
        said = _said(foreign, settings, tables)
        remarks += [
            f"{key} {getattr(settings, key)} is assumed, which the file doesn't say; --set {key}=… if it is another"
            for key in layout.guessed
            if key not in overrides and not (key == "null_class" and settings.num_classes is None)
        ]
        if settings.positions == "learned" and layout.fixed.get("positions") != "learned":
            remarks.append("the table of positions is no sine-cosine table, and is kept as learned positions")
    if overrides.get("null_text") == "empty" and NULL in state:
        del state[NULL]
        remarks.append(f"{NULL} was left out: guidance needs the text encoder's features of an empty caption")
    model = build(state, settings, rules, tables, where)
    if said:
        model.register_to_config(**{SAID: said})
    return model, layout.title if layout else "stdit", tuple(remarks)


def _check_structure(settings: ModelConfig, layout: Layout, rules: list[Rule], where: str) -> None:
    """ValueError: the file's values, or what was set, make a model that the layout has no names or no shapes for."""
    wrong = [f"{key} is {value}; expected a finite number" for key, value in settings if value in (math.inf, -math.inf)]
    if wrong:
        raise ValueError(f"{where}: " + "\n  ".join(wrong))
    with torch.device("meta"):
        own = set(STDiT.from_settings(settings).state_dict())
    odd = own ^ {rule.ours for rule in rules}
    lines = inexpressible(settings, layout, (1, 1))
    lines = [line for line in lines if odd or line.startswith("patch_size is")]
    if odd or lines:
        lines = lines or [f"no place for {listed(sorted(odd))}"]
        raise ValueError(
            f"{where}: the weights are those of {layout.title}, which has other values:\n  " + "\n  ".join(lines)
        )


def _said(foreign: Foreign, settings: ModelConfig, tables: Tables) -> dict[str, Any]:
    """What a file says that our settings do not: the grid of an oblong table; a latent size that patches do not fill."""
    said: dict[str, Any] = {}
    if grid := table_grid(foreign, tables):
        said["table"] = list(grid)
    sample, patch = foreign.config.get("sample_size"), settings.patch_size[1]
    if isinstance(sample, int) and settings.position_base == sample // patch and sample % patch:
        said["sample_size"] = sample
    return said


# ----------------------------------------------------------------------------------------- writing


def export(model: STDiT, layout: str) -> dict[str, Tensor]:
    """The tensors of a layout (a name of LAYOUTS, or "diffusers"), tables of positions included, that this model's weights are.

    ValueError: the layout has no place for something of the model's; every such config key is named with both values.
    """
    chosen, c = _chosen(layout, model.settings), model.settings
    grid = _grid(model)
    if lines := inexpressible(c, chosen, grid):
        raise ValueError(f"{chosen.title} has no place for what this model has:\n  " + "\n  ".join(lines))
    return unpacked(model, chosen.rules(c), of_grid(chosen.tables(c), c, grid))


def _grid(model: STDiT) -> tuple[int, int] | None:
    """The grid (H, W) of the table that the model's source had, where there is no base."""
    match dict(model.config).get(SAID):
        case {"table": [int(height), int(width)]} if height > 0 and width > 0:
            return height, width
        case _:
            return None


def _sample_size(model: STDiT, config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' `sample_size` as the model's source had it, where it is of as many patches as ours."""
    match dict(model.config).get(SAID):
        case {"sample_size": int(sample)} if sample // config["patch_size"] == model.settings.position_base:
            return {"sample_size": sample}
        case _:
            return {}


def _chosen(name: str, settings: ModelConfig) -> Layout:
    """The layout of a name; of "diffusers", the class that fits, or comes nearest."""
    if name == ANY_HUB:
        hub = [layout for layout in LAYOUTS if layout.hub]
        return min(hub, key=lambda layout: len(inexpressible(settings, layout)))
    for layout in LAYOUTS:
        if layout.name == name:
            return layout
    raise ValueError(f"layout {name!r} is not known; there are {', '.join(names())}")


def names() -> list[str]:
    """What `layout` may be."""
    return [OWN, ANY_HUB, *(layout.name for layout in LAYOUTS)]


def convert(
    source: Path | str,
    out: Path | str,
    layout: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    averaged: bool | None = None,
) -> Conversion:
    """Reads weights of any known layout and writes them in another; `load_foreign` has the arguments.

    out: a folder for our own layout (None or "stdit") and for diffusers' ("diffusers", "diffusers-dit", …); a .pt, .pth or
    .safetensors file for the original ones. It is whole or not there; an older one, recognisably so, is replaced, anything else is not.
    """
    source, out = Path(source), Path(out)
    target = layout or OWN
    if target not in names():
        raise ValueError(f"layout {target!r} is not known; there are {', '.join(names())}")
    folder = target in (OWN, ANY_HUB) or any(known.hub for known in LAYOUTS if known.name == target)
    _check_out(source, out, folder, target)
    model, found, remarks = _load(source, overrides or {}, averaged)
    if found == target and not overrides:
        raise ValueError(f"{source}: these weights are in stdit's own layout already; name another one with --layout")
    title = "stdit"
    out.parent.mkdir(parents=True, exist_ok=True)
    if target == OWN:
        with atomic_folder(out) as made:
            model.save_pretrained(made)
    else:
        chosen = _chosen(target, model.settings)
        title = chosen.title
        _write(model, export(model, chosen.name), chosen, out)
    return Conversion(found, title, model.settings, sum(p.numel() for p in model.parameters()), remarks)


def _check_out(source: Path, out: Path, folder: bool, target: str) -> None:
    """ValueError: OUT is of the wrong kind, or there is something that is not to be lost."""
    inside = out.resolve() in (source.resolve(), *source.resolve().parents)
    if inside:
        raise ValueError(f"{out}: would replace the source {source}; name another place")
    if out.is_symlink():
        raise ValueError(f"{out}: is a symbolic link to {out.readlink()}; name the place itself")
    above = next(parent for parent in out.parents if parent.exists() or parent.is_symlink())
    if not above.is_dir():
        raise ValueError(f"{out}: {above} is no folder")
    if not folder:
        if out.suffix not in (".safetensors", *PICKLED):
            raise ValueError(f"{out}: layout {target} is one file; give it one of {', '.join(SUFFIXES)}")
        if out.is_dir():
            raise ValueError(f"{out}: is a folder; layout {target} is one file")
        if out.exists():
            _check_older(out)
        return
    if out.suffix in SUFFIXES:
        raise ValueError(f"{out}: layout {target} is a folder with config.json and weights, not a file")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; layout {target} is a folder")
    others = sorted({p.name for p in out.iterdir()} - _converted(out)) if out.is_dir() else []
    if others:
        raise ValueError(f"{out}: holds other things than weights ({', '.join(others[:5])}); name a new folder")


def _check_older(out: Path) -> None:
    """ValueError: the file there is not one that a conversion could have written."""
    try:
        recognised(read_source(out)[0], str(out))
    except ValueError as error:
        raise ValueError(f"{out}: is there already, and no older conversion; name another file ({error})") from error


def _converted(folder: Path) -> set[str]:
    """Names of the files of an older conversion that is in `folder`, whole; none if there is no such one."""
    file, index = HUB_FILES[:2]
    held = {p.name for p in folder.iterdir() if p.is_file() and not p.is_symlink()}
    classes = {STDiT.__name__, *(layout.hub for layout in LAYOUTS if layout.hub)}
    try:
        if "config.json" not in held or read_config(folder / "config.json").get("_class_name") not in classes:
            return set()
        if index not in held:
            return {"config.json", file} if file in held else set()
        shards = set((read_config(folder / index).get("weight_map") or {}).values())
    except (ValueError, AttributeError, TypeError):
        return set()
    stem = file.removesuffix(".safetensors")
    whole = shards and shards <= held and all(re.fullmatch(stem + r"-\d{5}-of-\d{5}\.safetensors", s) for s in shards)
    return {"config.json", index, *shards} if whole else set()


def _write(model: STDiT, state: dict[str, Tensor], layout: Layout, out: Path) -> None:
    if layout.hub and layout.config:
        config = layout.config(model.settings)
        with torch.device("meta"):
            theirs = getattr(diffusers, layout.hub)(**config | _sample_size(model, config))
        theirs.load_state_dict(state, assign=True)
        with atomic_folder(out) as made:
            theirs.save_pretrained(made)
    else:
        with atomic_path(out) as made:
            if out.suffix == ".safetensors":
                save_file(state, made)
            else:
                torch.save({layout.wrap: state} if layout.wrap else state, made)


# ----------------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Weights of one layout to another, without a bit changed. SOURCE's layout is told by its tensors.",
        epilog="layouts: "
        + "; ".join(f"{layout.name} ({layout.title})" for layout in LAYOUTS)
        + ". docs/weights.md has more.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="a .safetensors, .pt, .pth, .bin or .ckpt file; a diffusers folder; a pipeline's folder; a checkpoint of ours, or a folder of it",
    )
    parser.add_argument(
        "--to", dest="out", metavar="OUT", type=Path, required=True, help="the folder, or file, to write"
    )
    parser.add_argument(
        "--layout",
        choices=names(),
        default=OWN,
        help="the layout of OUT: a folder for stdit (the default) and diffusers', one file for the others",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="a value of the model's config that SOURCE doesn't say, or that is to be another, such as num_heads=16",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "trained"),
        help="which of a checkpoint's weights, where it has both; the averaged (EMA) ones unless told",
    )
    args = parser.parse_args()
    averaged = None if args.weights is None else args.weights == "ema"
    try:
        overrides: dict[str, Any] = {}
        for text in args.overrides:
            overrides = apply_override(overrides, text)
        print(convert(args.source, args.out, args.layout, overrides, averaged))
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
