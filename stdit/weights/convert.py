"""Converts published weights to our layout and back, bit-exactly.

    python -m stdit.weights.convert DiT-XL-2-256x256.pt --to weights/dit-xl
    python -m stdit.weights.convert PixArt-XL-2-1024-MS/ --to weights/pixart
    python -m stdit.weights.convert weights/dit-xl --to DiT.safetensors --layout dit
    python -m stdit.weights.convert run/checkpoints/step-00010000 --to out --layout diffusers --set null_text=empty
    stdit convert runs/depth --to weights/depth                 # the branch of a control run

SOURCE's layout is detected from its keys. Every key and shape must match: nothing is skipped, nothing is initialised.
docs/weights.md lists the layouts, and what their files do not determine.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor

from stdit import arguments
from stdit.config import ModelConfig
from stdit.config.load import apply_override, validate
from stdit.console import echo
from stdit.errors import exit_code
from stdit.files import atomic_folder, atomic_path, check_writable, describe_failed_write, read_json
from stdit.integrity import IDENTITY, MANIFEST, read_manifest, seal_model
from stdit.models.checks import check_config
from stdit.models.control import OWN as CONTROL_KEYS
from stdit.models.control import STDiTControl
from stdit.models.stdit import STDiT
from stdit.outputs import check_outputs, claim_outputs
from stdit.weights.layouts import LAYOUTS, detect_layout
from stdit.weights.layouts.diffusers import DIFFUSERS_NULL_CAPTION
from stdit.weights.layouts.layout import (
    Layout,
    Rule,
    SourceWeights,
    Tables,
    build_model,
    export_state_dict,
    format_names,
    same,
    unsupported,
)
from stdit.weights.layouts.original import NULL_CAPTION
from stdit.weights.layouts.position_tables import check_tables, table_grid, tables_for_grid
from stdit.weights.state_dict import (
    DIFFUSERS_FILES,
    PICKLED,
    SUFFIXES,
    check_finite,
    read_config,
    read_state_dict,
    write_safetensors,
)

COMMAND = "convert"
# Values of --layout beside the names of LAYOUTS.
OURS = "stdit"
ANY_DIFFUSERS = "diffusers"  # whichever diffusers class fits the model
# Key of our config.json for values of the source that do not affect outputs but are exported again.
PUBLISHED = "_published"


class Conversion(NamedTuple):
    """The result of a conversion; source and target are titles of layouts."""

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


# ----------------------------------------------------------------------------------------- import


def load_published(source: Path | str, overrides: Mapping[str, Any] | None = None, ema: bool | None = None) -> STDiT:
    """Loads a model from a file or folder of any known layout, ours included: eval mode, CPU, each tensor in its own
    dtype.

    Args:
        source: a .safetensors, .pt, .pth, .bin or .ckpt file, a diffusers folder, a pipeline, a folder with one weight
            file, a checkpoint of ours, or a run directory (its newest complete checkpoint).
        overrides: ModelConfig values that the file does not determine (`num_heads`, positions) or that replace its own.
        ema: of a checkpoint with both, the EMA weights (True), the model's (False), or EMA where present (None).

    Raises:
        ValueError: unreadable source, unknown layout, or keys, shapes or values that do not match it; all are listed.
            A control branch, which is no model.
    """
    model = _load(Path(source), overrides or {}, ema)[0]
    if isinstance(model, STDiTControl):
        raise ValueError(f"{source}: a control branch, not a model; take {_base_of_branch(source)}")
    return model


def _load(path: Path, overrides: Mapping[str, Any], ema: bool | None) -> tuple[STDiT, str, tuple[str, ...]]:
    """The model, the title of its source's layout, and remarks."""
    state, config, where, notes = read_state_dict(path, ema)
    remarks = list(notes)
    if config.get("_class_name") == STDiTControl.__name__:
        branch = _build_branch(state, config, overrides, where)
        return branch, f"control branch of {len(branch.blocks)} blocks", notes
    if config.get("_class_name") == STDiT.__name__:
        check_config(config, STDiT.__name__)
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        settings = validate({**values, **overrides}, ModelConfig, f"{where}: model")
        with torch.device("meta"):
            rules = [same(name) for name in STDiT.from_settings(settings).state_dict()]
        layout, tables, published = None, {}, config.get(PUBLISHED, {})
    else:
        layout = detect_layout(state, where)
        source = SourceWeights(state, config, overrides, where)
        values = {**layout.fixed, **layout.infer(source), **overrides}
        settings = validate(values, ModelConfig, f"{where}: model")
        rules, tables = layout.rules(settings), layout.tables(settings)
        _check_expressible(settings, layout, rules, where)
        check_tables(source, tables, settings)
        published = _published_values(source, settings, tables)
        remarks += [*source.notes, *layout.differences(settings)]
        if settings.positions == "learned" and layout.fixed.get("positions") != "learned":
            remarks.append("the position table is not a sine-cosine one, and is kept as learned positions")
    if settings.text_dim is not None and settings.null_text == "empty":
        for name in {NULL_CAPTION, DIFFUSERS_NULL_CAPTION} & state.keys():
            del state[name]
            remarks.append(f"{name} is dropped: guidance needs the text encoder's features of an empty caption")
    model = build_model(state, settings, rules, tables, where)
    check_finite(model.named_parameters(), where)
    if published:
        model.register_to_config(**{PUBLISHED: published})
    return model, layout.title if layout else OURS, tuple(remarks)


def _build_branch(
    state: dict[str, Tensor], config: Mapping[str, Any], overrides: Mapping[str, Any], where: str
) -> STDiTControl:
    """The control branch with the weights `state`. ValueError: keys or values that do not fit one; `overrides`."""
    if overrides:
        raise ValueError(
            f"{where}: a control branch has its base's settings; --set {', '.join(overrides)} cannot be used"
        )
    check_config(config, STDiTControl.__name__, CONTROL_KEYS)
    validate({key: config[key] for key in ModelConfig.model_fields if key in config}, ModelConfig, f"{where}: model")
    with torch.device("meta"):
        branch: STDiTControl = STDiTControl.from_config({k: v for k, v in config.items() if k != "_name_or_path"})
    check_finite(state.items(), where)
    try:
        branch.load_state_dict(state, assign=True)
    except RuntimeError as error:  # torch lists what is missing, unexpected or of another shape
        raise ValueError(f"{where}: {error}") from error
    return branch.eval()


def _base_of_branch(source: Path | str) -> str:
    """Where the model of a control branch is, for messages."""
    identity = Path(source).parent / IDENTITY
    base = (read_json(identity).get("base") or {}) if identity.is_file() else {}
    return f"its base, {base['folder']}" if isinstance(base, dict) and "folder" in base else "its base"


def _check_expressible(settings: ModelConfig, layout: Layout, rules: list[Rule], where: str) -> None:
    """ValueError: the file's values, or `--set`, give a model that the layout has no keys or shapes for."""
    infinite = [
        f"{key} is {value}; expected a finite number" for key, value in settings if value in (math.inf, -math.inf)
    ]
    if infinite:
        raise ValueError(f"{where}: " + "\n  ".join(infinite))
    with torch.device("meta"):
        parameters = set(STDiT.from_settings(settings).state_dict())
    unmapped = parameters ^ {rule.ours for rule in rules}
    lines = unsupported(settings, layout, (1, 1))
    lines = [line for line in lines if unmapped or line.startswith("patch_size is")]
    if unmapped or lines:
        lines = lines or [f"no keys for {format_names(sorted(unmapped))}"]
        raise ValueError(
            f"{where}: the weights are in the layout of {layout.title}, which differs:\n  " + "\n  ".join(lines)
        )


def _published_values(source: SourceWeights, settings: ModelConfig, tables: Tables) -> dict[str, Any]:
    """Values without a config key: the grid of a non-square table; a sample_size that is not a multiple of the
    patch."""
    values: dict[str, Any] = {}
    if grid := table_grid(source, tables):
        values["table"] = list(grid)
    sample, patch = source.config.get("sample_size"), settings.patch_size[1]
    if isinstance(sample, int) and settings.position_base == sample // patch and sample % patch:
        values["sample_size"] = sample
    return values


# ----------------------------------------------------------------------------------------- export


def export(model: STDiT, layout: str) -> dict[str, Tensor]:
    """The model's state dict in a layout (a name of LAYOUTS, or "diffusers"), position tables included.

    ValueError: the layout cannot represent the model; every such config key is named with both values.
    """
    target, c = _layout(layout, model.settings), model.settings
    grid = _published_grid(model)
    if lines := unsupported(c, target, grid):
        raise ValueError(f"the layout of {target.title} cannot represent this model:\n  " + "\n  ".join(lines))
    return export_state_dict(model, target.rules(c), tables_for_grid(target.tables(c), c, grid))


def _published_grid(model: STDiT) -> tuple[int, int] | None:
    """The grid (H, W) of the source's position table, where it is not square."""
    match dict(model.config).get(PUBLISHED):
        case {"table": [int(height), int(width)]} if height > 0 and width > 0:
            return height, width
        case _:
            return None


def _published_sample_size(model: STDiT, config: dict[str, Any]) -> dict[str, Any]:
    """The source's `sample_size`, where it has as many patches as ours."""
    match dict(model.config).get(PUBLISHED):
        case {"sample_size": int(sample)} if sample // config["patch_size"] == model.settings.position_base:
            return {"sample_size": sample}
        case _:
            return {}


def _layout(name: str, settings: ModelConfig) -> Layout:
    """A layout by name; for "diffusers", the class that fits best."""
    if name == ANY_DIFFUSERS:
        candidates = [layout for layout in LAYOUTS if layout.diffusers_class]
        return min(candidates, key=lambda layout: len(unsupported(settings, layout)))
    return next(layout for layout in LAYOUTS if layout.name == name)


def layout_names() -> list[str]:
    """The values of `layout`."""
    return [OURS, ANY_DIFFUSERS, *(layout.name for layout in LAYOUTS)]


def convert(
    source: Path | str,
    out: Path | str,
    layout: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    ema: bool | None = None,
) -> Conversion:
    """Reads weights of any known layout and writes them in another; see `load_published` for the arguments.

    out: a folder for our layout (None or "stdit") and diffusers' ("diffusers", "diffusers-dit", …); a .pt, .pth or
    .safetensors file for the others. Written atomically. Replaces an earlier conversion, and nothing else.
    """
    source, out = Path(source), Path(out)
    target = layout or OURS
    if target not in layout_names():
        raise ValueError(f"unknown layout {target!r}; available: {', '.join(layout_names())}")
    is_folder = target in (OURS, ANY_DIFFUSERS) or any(
        known.diffusers_class for known in LAYOUTS if known.name == target
    )
    _check_out(source, out, is_folder, target)
    check_writable(out.parent)
    model, source_title, remarks = _load(source, overrides or {}, ema)
    if isinstance(model, STDiTControl) and target != OURS:
        raise ValueError(
            f"{source}: a control branch, which has no published layout: leave --layout out to write it as a folder that "
            f"STDiTControl.from_pretrained reads; for the model, convert {_base_of_branch(source)}"
        )
    if source_title == target and not overrides and ema is None and (source / "config.json").is_file():
        raise ValueError(f"{source}: already in our own layout; choose another one with --layout")
    title = OURS
    with failed_writes_named(out):
        if target == OURS:
            with atomic_folder(out) as folder:
                model.save_pretrained(folder)
                seal_model(folder)
        else:
            chosen = _layout(target, model.settings)
            title = chosen.title
            _write(model, export(model, chosen.name), chosen, out)
            remarks = tuple(dict.fromkeys((*remarks, *chosen.differences(model.settings))))
    return Conversion(source_title, title, model.settings, sum(p.numel() for p in model.parameters()), remarks)


@contextmanager
def failed_writes_named(out: Path) -> Iterator[None]:
    """Errors while writing `out` become an OSError that says why: safetensors and torch do not. ValueErrors are passed
    on."""
    try:
        yield
    except ValueError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        raise OSError(f"{out}: cannot be written ({describe_failed_write(error, out.parent)})") from error


def _check_out(source: Path, out: Path, is_folder: bool, target: str) -> None:
    """ValueError: OUT is of the wrong kind, or would replace something other than an earlier conversion."""
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{out}: would replace the source {source}; choose another path")
    if out.is_symlink():
        raise ValueError(f"{out}: is a symbolic link to {out.readlink()}; give its target instead")
    parent = next(p for p in out.parents if p.exists() or p.is_symlink())
    if not parent.is_dir():
        raise ValueError(f"{out}: {parent} is not a folder")
    if not is_folder:
        if out.suffix not in (".safetensors", *PICKLED):
            raise ValueError(f"{out}: layout {target} is one file; use a suffix of {', '.join(SUFFIXES)}")
        if out.is_dir():
            raise ValueError(f"{out}: is a folder; layout {target} is one file")
        if out.exists():
            _check_replaceable(out)
        return
    if out.suffix in SUFFIXES:
        raise ValueError(f"{out}: layout {target} is a folder with config.json and weights, not a file")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; layout {target} is a folder")
    others = sorted({p.name for p in out.iterdir()} - _converted_files(out)) if out.is_dir() else []
    if others:
        raise ValueError(f"{out}: has files other than weights ({', '.join(others[:5])}); choose a new folder")


def _check_replaceable(out: Path) -> None:
    """ValueError: no conversion has written the existing file; published weights are not overwritten."""
    try:
        check_outputs(out.parent, COMMAND, [out.name])
    except ValueError as error:
        raise ValueError(f"{out}: exists and is not an earlier conversion; choose another file ({error})") from error


def _converted_files(folder: Path) -> set[str]:
    """Files of a complete earlier conversion in `folder`; empty if there is none."""
    file, index = DIFFUSERS_FILES[:2]
    files = {p.name for p in folder.iterdir() if p.is_file() and not p.is_symlink()}
    classes = {STDiT.__name__, STDiTControl.__name__, *(layout.diffusers_class for layout in LAYOUTS)} - {None}
    try:
        kind = read_config(folder / "config.json").get("_class_name") if "config.json" in files else None
        if kind not in classes:
            return set()
        read_manifest(folder, identity=False)  # others save such folders too, without our manifest
        if index not in files:
            return {"config.json", file, MANIFEST} if file in files else set()
        shards = set((read_config(folder / index).get("weight_map") or {}).values())
    except (ValueError, AttributeError, TypeError):
        return set()
    stem = file.removesuffix(".safetensors")
    pattern = stem + r"-\d{5}-of-\d{5}\.safetensors"
    complete = shards and shards <= files and all(re.fullmatch(pattern, shard) for shard in shards)
    return {"config.json", index, MANIFEST, *shards} if complete else set()


def _write(model: STDiT, state: dict[str, Tensor], layout: Layout, out: Path) -> None:
    if layout.diffusers_class and layout.diffusers_config:
        config = layout.diffusers_config(model.settings)
        with torch.device("meta"):
            theirs = getattr(diffusers, layout.diffusers_class)(**config | _published_sample_size(model, config))
        theirs.load_state_dict(state, assign=True)
        with atomic_folder(out) as path:
            theirs.save_pretrained(path)
            seal_model(path)
    else:
        claim_outputs(out.parent, COMMAND, [out.name])
        with atomic_path(out) as path:
            if out.suffix == ".safetensors":
                write_safetensors(state, path)
            else:
                torch.save({layout.wrapper_key: state} if layout.wrapper_key else state, path)


# ----------------------------------------------------------------------------------- command line


# Takes SOURCE and "ema" or "model", and yields a folder or file that `load_published` reads.
OpenSource = Callable[[Path, Any], AbstractContextManager[Path]]


@contextmanager
def open_as_is(source: Path, weights: Any) -> Iterator[Path]:
    """`source` itself."""
    yield source


def main(argv: Sequence[str] | None = None, open_source: OpenSource = open_as_is) -> int:
    """Exit code 0; 1: a file cannot be written; 2: weights or arguments that cannot be used.

    open_source: yields the weights to read for SOURCE (`stdit` merges LoRA runs:
    stdit.training.adapters.full_model)."""
    args = arguments.convert().parse_args(argv)
    ema = None if args.weights is None else args.weights == "ema"
    try:
        overrides: dict[str, Any] = {}
        for text in args.overrides:
            overrides = apply_override(overrides, text)
        with open_source(args.source, args.weights or "ema") as source:
            echo(convert(source, args.out, args.layout, overrides, ema))
    except (ValueError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
