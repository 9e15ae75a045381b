"""From one stage's model to the next one's: what is carried, dropped, newly made, and why outputs stay what they were.

    model, carried = to_video(image_model)                               # one call, an image model becomes a video model
    model, carried = carry(source, target, allow=("class_to_text",))     # any of these, to the config `target`
    print(carried)

    python -m stdit.weights.transfer SOURCE --to OUT --config target.yaml --allow add_temporal

* add_temporal: an image model gets temporal attention, joining at zero: every frame comes out as the image model has it.
  `factorized`: temporal attention in each block. `alternating`: a new block over time after each image block, so that
  the depth doubles. `full`: equal for one frame; of more, tokens see each other at once.
* class_to_text: classes give way to (or are joined by) captions. The null class's code moves into the bias of the time
  network and attention to text starts at zero: the output, whatever the caption, equals the old model's unconditional
  output. Where classes stay, so does the output for every class.
* rescale_positions: scales, tables and frames of positions change; learned tables are interpolated. Outputs change.
* add_micro_conditions: the model is told more of the clip, from zero. Outputs do not change.
* adaln_to_single: DiT's blocks become PixArt's (adaln, adaln_zero to adaln_single), equal at time 500 without a class.
* new_text_projection: features of another width: y_proj and the null caption are new, outputs change. Captions of another
  length, or another null caption: what reads the text stays.
* add_dynamic: routers (dynamic_width, dynamic_tokens), all open: outputs do not change; or other exit_depths: they do.

Depth and width do not grow otherwise.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from stdit.config import ConfigError, ModelConfig, Transition, apply_override, read_extended, validate
from stdit.files import atomic_folder
from stdit.models.stdit import STDiT
from stdit.weights import growth
from stdit.weights.convert import load_foreign
from stdit.weights.growth import Growth

# In the order in which they are made.
CHANGES: dict[Transition, Callable[[Growth], None]] = {
    "new_text_projection": growth.new_text_projection,
    "class_to_text": growth.class_to_text,
    "add_temporal": growth.add_temporal,
    "rescale_positions": growth.rescale_positions,
    "add_micro_conditions": growth.add_micro_conditions,
    "add_dynamic": growth.add_dynamic,
    "adaln_to_single": growth.adaln_to_single,
}


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
    unknown = sorted(set(allow) - set(CHANGES))
    if unknown:
        raise ValueError(f"allow: there is no change {', '.join(unknown)}; there are {', '.join(CHANGES)}")
    found = growth.changes(source.settings, target, allow)
    model = STDiT.from_settings(target, seed).to(source.device)
    if model.dtype != source.dtype:  # diffusers warns of every cast, even one to the same dtype.
        model = model.to(source.dtype)
    before, fresh = source.state_dict(), model.state_dict()
    origins = {name: growth.origin(name, growth.doubles(source.settings, target)) for name in fresh}
    kept = {n: o for n, o in origins.items() if o is not None and o in before and before[o].shape == fresh[n].shape}
    work = Growth(source, target, before, fresh, {**fresh, **{n: before[o] for n, o in kept.items()}}, kept)
    for change, make in CHANGES.items():
        if change in found:
            make(work)
    model.load_state_dict(work.after)
    model.train(source.training)
    used = set(work.kept.values())
    return model, Carried(
        tuple(name for name in fresh if name in work.kept),
        tuple(name for name in before if name not in used),
        tuple(name for name in fresh if name not in work.kept),
        tuple(work.notes),
    )


def to_video(
    model: STDiT,
    attention: Literal["factorized", "alternating", "full"] = "factorized",
    allow: tuple[str, ...] = (),
    seed: int = 0,
    **settings: Any,
) -> tuple[STDiT, Carried]:
    """The video model that an image model grows into, and what was carried, dropped, newly made. `settings`: others of
    ModelConfig that the video model shall have, temporal_positions or mlp, say; `allow` what they need beyond add_temporal.

    ValueError: it is no image model (`temporal: false`), or `settings` do not go together, or change something else.
    """
    old = model.settings
    if not growth.is_image(old):
        raise ValueError(
            f"this model has temporal attention already (attention {old.attention}, temporal {old.temporal})"
        )
    grown = growth.doubled(old) if attention == "alternating" else old
    target = ModelConfig(**grown.model_dump() | {"temporal": True, "attention": attention} | settings)
    return carry(model, target, ("add_temporal", *allow), seed)


def _folded(names: tuple[str, ...]) -> str:
    """Names with those of several blocks counted once: `blocks.*.attn_temp.qkv.weight`, or `blocks.1,3,….attn.qkv.weight`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        found = re.match(r"blocks\.(\d+)\.(.*)", name)
        blocks.setdefault(found[2] if found else name, []).extend([int(found[1])] if found else [])
    return ", ".join(f"blocks.{_numbers(numbers)}.{rest}" if numbers else rest for rest, numbers in blocks.items())


def _numbers(blocks: list[int]) -> str:
    """All from the first on: *. Else the numbers, of many the first two."""
    if blocks == list(range(len(blocks))) and len(blocks) > 1:
        return "*"
    return ",".join(map(str, blocks if len(blocks) <= 2 else [*blocks[:2], "…"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Grows a model into another: weights carried over, the rest made anew."
    )
    parser.add_argument("source", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("--to", type=Path, required=True, help="the folder to write; there must be none")
    parser.add_argument("--config", type=Path, help="a YAML file with a `model:` section; without it, the source's own")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="temporal=true, say; repeatable"
    )
    parser.add_argument("--allow", nargs="*", default=[], choices=get_args(Transition), help="changes to go through")
    parser.add_argument("--seed", type=int, default=0, help="of new weights")
    try:
        print(_written(parser.parse_args()))
    except (ConfigError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _written(args: argparse.Namespace) -> str:
    """Writes the grown model; what the command prints. ValueError: an argument, the source, or what cannot be carried."""
    inside = args.source.resolve() in (args.to.resolve(), *args.to.resolve().parents)
    if inside:
        raise ConfigError(f"--to: {args.to} is the source {args.source}, or in it; name another place")
    if args.to.exists() or args.to.is_symlink():
        raise ConfigError(f"--to: {args.to} exists already")
    above = next(parent for parent in args.to.parents if parent.exists() or parent.is_symlink())
    if not above.is_dir():
        raise ConfigError(f"--to: {args.to}: {above} is no folder")
    if not (args.source / "config.json").is_file():
        raise ConfigError(f"{args.source}: no config.json there; a folder that save_pretrained wrote is needed")
    # Each tensor in its own dtype, which diffusers' reader would make float32 of.
    source = load_foreign(args.source)
    if len({p.dtype for p in source.parameters()}) > 1:  # one for all, which loses nothing
        torch.nn.Module.to(source, torch.float32)
    target = _target(source, args.config, args.set)
    model, carried = carry(source, target, tuple(args.allow), args.seed)
    with atomic_folder(args.to) as folder:
        model.save_pretrained(folder)
    same = "\nnote: nothing changes: this is a copy of the source" if target == source.settings else ""
    return f"{args.source} -> {args.to}\n{carried}{same}"


def _target(source: STDiT, config: Path | None, overrides: list[str]) -> ModelConfig:
    data, name = source.settings.model_dump(mode="json"), "the source's config"
    if config is not None:
        read, name = read_extended(config), f"{config}: model"
        if "model" not in read:
            raise ConfigError(f"{config}: model: missing key")
        data = read["model"]
    for override in overrides:
        data = apply_override(data, override)
    return validate(data, ModelConfig, name)


if __name__ == "__main__":
    main()
