"""Transfers weights between training stages: loads what matches, initialises the rest so that outputs are preserved.

    model, report = to_video(image_model)                                       # inflate an image model to video
    # Any change below, to the config `target`.
    model, report = transfer_weights(source, target, allow=("class_to_text",))
    print(report)

    python -m stdit.weights.transfer SOURCE --to OUT --config target.yaml --allow add_temporal

* add_temporal: zero-initialised temporal attention for an image model, which keeps its output for every frame.
  `factorized`: temporal attention in each block. `alternating`: a temporal block after each spatial block, doubling the
  depth. `full`: spatial attention becomes 3D; outputs are unchanged for one frame.
* class_to_text: captions replace, or join, class labels. The null-class embedding moves into the bias of the timestep
  MLP, and cross-attention is zero-initialised: outputs equal the source's unconditional ones, whatever the caption.
  Where classes stay, outputs are unchanged for every class.
* rescale_positions: positions change with resolution or duration; learned tables are interpolated. Outputs change.
* add_micro_conditions: new micro-condition embedders, zero-initialised. Outputs are unchanged.
* adaln_to_single: DiT's blocks (adaln, adaln_zero) become PixArt's (adaln_single); equal at timestep 500 without a
  class.
* new_text_projection: another text width: y_proj and the null caption are newly initialised, outputs change. For
  another caption length or null caption, the projection is kept.
* add_sparse_dense: a fusion of what is before and after the sparse blocks, which starts as the latter. Outputs are
  unchanged.
* add_dynamic: routers, initialised fully open: outputs are unchanged. Or other exit_depths: outputs change.

Depth and width do not change otherwise.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from stdit import arguments
from stdit.config import ConfigError, ModelConfig, Transition, apply_override, read_extended, validate
from stdit.console import echo
from stdit.errors import exit_code
from stdit.files import atomic_folder, check_writable
from stdit.integrity import seal_model
from stdit.memory import check_fits
from stdit.models.cost import parameter_count
from stdit.models.stdit import STDiT
from stdit.weights import transitions
from stdit.weights.convert import OpenSource, failed_writes_named, load_published, open_as_is
from stdit.weights.layouts.original import NULL_CAPTION

# The timestep at which per-block and shared modulation agree after adaln_to_single (PixArt-α, section 2.3).
ADALN_SINGLE_TIMESTEP = 500.0


@dataclass(frozen=True)
class TransferReport:
    """Parameter names: loaded from the source (changed as `notes` say), dropped from it, newly initialised in the
    target."""

    loaded: tuple[str, ...]
    dropped: tuple[str, ...]
    newly_initialised: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"loaded: {len(self.loaded)} parameters"]
        for kind, names in (("dropped", self.dropped), ("newly initialised", self.newly_initialised)):
            lines += [f"{kind}: {_format_names(names)}"] if names else []
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


@dataclass
class TransferState:
    """A transfer in progress. `loaded_from`: target parameter name to source parameter name."""

    source: STDiT
    new: ModelConfig
    source_state: dict[str, Tensor]
    initial_state: dict[str, Tensor]
    state: dict[str, Tensor]
    loaded_from: dict[str, str]
    notes: list[str] = field(default_factory=list)

    @property
    def old(self) -> ModelConfig:
        return self.source.settings

    @property
    def interleaved(self) -> bool:
        return transitions.interleaves_blocks(self.old, self.new)


# --------------------------------------------------------------------------------------- transfer


@torch.no_grad()
def transfer_weights(
    source: STDiT, target: ModelConfig, allow: tuple[str, ...] = (), seed: int = 0
) -> tuple[STDiT, TransferReport]:
    """A model of config `target` with the weights of `source`, on its device and in its dtype.

    Args:
        allow: the changes of architecture that may be made.
        seed: of newly initialised weights.

    Raises:
        ValueError: the configs differ in something that no change in `allow` covers; all are listed, with both values.
    """
    if unknown := sorted(set(allow) - set(CHANGES)):
        raise ValueError(f"allow: unknown change {', '.join(unknown)}; available: {', '.join(CHANGES)}")
    required = transitions.required_changes(source.settings, target, allow)
    model = STDiT.from_settings(target, seed).to(source.device)
    if model.dtype != source.dtype:  # diffusers warns about every cast, even to the same dtype
        model = model.to(source.dtype)
    old, initial = source.state_dict(), model.state_dict()
    interleaved = transitions.interleaves_blocks(source.settings, target)
    names = {name: transitions.source_name(name, interleaved) for name in initial}
    loaded = {n: s for n, s in names.items() if s is not None and s in old and old[s].shape == initial[n].shape}
    transfer = TransferState(
        source, target, old, initial, {**initial, **{n: old[s] for n, s in loaded.items()}}, loaded
    )
    for change, apply in CHANGES.items():
        if change in required:
            apply(transfer)
    model.load_state_dict(transfer.state)
    model.train(source.training)
    used = set(transfer.loaded_from.values())
    return model, TransferReport(
        loaded=tuple(name for name in initial if name in transfer.loaded_from),
        dropped=tuple(name for name in old if name not in used),
        newly_initialised=tuple(name for name in initial if name not in transfer.loaded_from),
        notes=tuple(transfer.notes),
    )


def to_video(
    model: STDiT,
    attention: Literal["factorized", "alternating", "full"] = "factorized",
    allow: tuple[str, ...] = (),
    seed: int = 0,
    **settings: Any,
) -> tuple[STDiT, TransferReport]:
    """Inflates an image model to a video model. `settings`: further ModelConfig values of the video model, such as
    temporal_positions or mlp; `allow`: the changes that they need beyond add_temporal.

    ValueError: not an image model (`temporal: false`), or `settings` are inconsistent or need another change.
    """
    old = model.settings
    if not transitions.is_image_model(old):
        raise ValueError(
            f"this model has temporal attention already (attention {old.attention}, temporal {old.temporal})"
        )
    base = transitions.interleaved_config(old) if attention == "alternating" else old
    target = ModelConfig(**base.model_dump() | {"temporal": True, "attention": attention} | settings)
    return transfer_weights(model, target, ("add_temporal", *allow), seed)


# ------------------------------------------------------------------------------- changes of weights


def new_text_projection(transfer: TransferState) -> None:
    """Re-initialises the text embedder for another text width; for another caption length, keeps it and the null
    rows."""
    old, new = transfer.old, transfer.new
    if (old.text_dim, old.text_projection) != (new.text_dim, new.text_projection):
        prefixes = ("y_embedder.y_", "y_embedder.pooled_proj.")
        for name in [n for n in transfer.loaded_from if n.startswith(prefixes)]:
            del transfer.loaded_from[name]
            transfer.state[name] = transfer.initial_state[name]
        transfer.notes.append(
            "new_text_projection: the text projection is newly initialised; outputs for captions change"
        )
        return
    note = "new_text_projection: outputs for captions are unchanged"
    if NULL_CAPTION in transfer.source_state and NULL_CAPTION in transfer.state:
        rows = min(old.max_text_tokens, new.max_text_tokens)
        loaded, initial = transfer.source_state[NULL_CAPTION], transfer.initial_state[NULL_CAPTION]
        transfer.state[NULL_CAPTION] = torch.cat([loaded[:rows], initial[rows:]])
        transfer.loaded_from[NULL_CAPTION] = NULL_CAPTION
        note += f"; {rows} rows of the null caption are kept"
    transfer.notes.append(note)


def class_to_text(transfer: TransferState) -> None:
    """Zero-initialises what text adds. Where classes are removed, moves the null-class embedding into the bias of the
    timestep MLP (PixArt-α's reparametrisation, section 2.2)."""
    old, new = transfer.old, transfer.new
    if old.pooled_dim is None:
        _zero(transfer.state, r"^y_embedder\.pooled_proj\.2\.")
    if new.num_classes is not None or old.num_classes is None:
        note = "class_to_text: cross-attention is zero-initialised; outputs are unchanged"
    elif not old.null_class:
        note = "class_to_text: cross-attention is zero-initialised; outputs are those of the source without a class"
    else:
        bias = "t_embedder.mlp.2.bias"
        null = transfer.source_state["y_embedder.embedding_table.weight"][-1]
        transfer.state[bias] = transfer.source_state[bias] + null
        for name, weight in transfer.source_state.items():  # routers read the timestep embedding, not the class
            if match := re.match(r"(.*\.dynamic\.(?:heads|heads_temp|groups))\.weight$", name):
                router = f"{match[1]}.bias"
                transfer.state[router] = transfer.source_state[router] - weight @ null
        note = f"class_to_text: {bias} now includes the null class; outputs are the source's unconditional ones"
    transfer.notes.append(note)


def add_temporal(transfer: TransferState) -> None:
    """Zero-initialises temporal layers; 2D convolutions become the middle slice of 3D ones."""
    old, new, state = transfer.old, transfer.new, transfer.state
    if (old.mlp, new.mlp) == ("conv2d", "conv3d"):
        for name in [n for n in state if n.endswith("depthwise_conv.weight")]:
            source = transitions.source_name(name, transfer.interleaved)
            if source is not None:
                state[name] = F.pad(transfer.source_state[source][:, :, None], (0, 0, 0, 0, 1, 1))
                transfer.loaded_from[name] = source
    if "temp_embed" in state and (new.temporal_position_injection == "residual" or new.attention == "full"):
        _zero(state, "^temp_embed$")  # added to the residual stream, so no zero-initialised layer hides it
    if new.attention == "full":
        transfer.notes.append(
            f"add_temporal: attention now spans frames; outputs for one frame are unchanged{_full_attention_note(new)}"
        )
        return
    if new.attention == "factorized":
        _zero(state, r"\.attn_temp\.proj\.")
        note = "add_temporal: temporal attention is zero-initialised"
    else:
        note = "add_temporal: image block i is now block 2i; the temporal blocks between are zero-initialised"
        # adaln_zero gates start at zero; if the layers they gate were zero as well, neither would get a gradient.
        if new.conditioning == "adaln_zero":
            note += " (gates)"
        else:
            _zero(state, r"^blocks\.\d*[13579]\.(attn\.proj|cross_attn\.proj|mlp\.fc2|mlp\.w3)\.")
    if new.temporal_position_injection == "residual" and new.time_positions == "sincos":
        note += "; outputs for one frame are unchanged, those for more are not: temporal_position_injection residual adds sine-cosine "
        note += "time positions to the input of all blocks"
    else:
        note += "; outputs are the image model's, frame by frame"
    transfer.notes.append(note)


def _full_attention_note(new: ModelConfig) -> str:
    """How full attention changes outputs for several frames."""
    if new.conditioning == "joint":
        return "; with more frames, text tokens get a smaller share of the attention"
    if new.time_positions in ("sincos", "rope"):
        return f"; with more frames, time positions ({new.time_positions}) change outputs at once"
    return ", and so are those for one repeated frame"


def _zero(state: dict[str, Tensor], pattern: str) -> None:
    for name, weight in state.items():
        if re.search(pattern, name):
            state[name] = torch.zeros_like(weight)


def rescale_positions(transfer: TransferState) -> None:
    """Interpolates learned tables: bicubic in space, linear in time. Sine-cosine and RoPE follow from the config."""
    old, new = transfer.old, transfer.new
    unused = transitions.TEMPORAL if transitions.is_image_model(old) else set()
    note = "rescale_positions: "
    note += transitions.describe_differences(old, new, sorted(transitions.POSITIONS - unused))
    if "pos_embed" in transfer.source_state and old.position_grid != new.position_grid:
        assert old.position_grid is not None
        assert new.position_grid is not None
        table = transfer.source_state["pos_embed"].float()
        table = rearrange(table, "n (h w) d -> n d h w", h=old.position_grid[0])
        table = F.interpolate(table, new.position_grid, mode="bicubic", antialias=True)
        transfer.state["pos_embed"] = rearrange(table, "n d h w -> n (h w) d")
        transfer.loaded_from["pos_embed"] = "pos_embed"
        note += "; the learned spatial table is interpolated"
    same_frames = old.position_frames == new.position_frames
    if "temp_embed" in transfer.source_state and not transitions.is_image_model(old) and not same_frames:
        assert new.position_frames is not None
        table = transfer.source_state["temp_embed"].float().transpose(1, 2)  # (1, D, F)
        table = F.interpolate(table, new.position_frames, mode="linear", align_corners=False)
        transfer.state["temp_embed"] = table.transpose(1, 2)
        transfer.loaded_from["temp_embed"] = "temp_embed"
        note += "; the learned temporal table is interpolated"
    transfer.notes.append(note)


def add_micro_conditions(transfer: TransferState) -> None:
    """The embedders' last layers are zero-initialised, as in every new model."""
    added = [name for name in transfer.new.micro_conditions if name not in transfer.old.micro_conditions]
    transfer.notes.append(
        f"add_micro_conditions: {', '.join(added)}, with zero-initialised embedders; outputs are unchanged"
    )


def add_sparse_dense(transfer: TransferState) -> None:
    transfer.notes.append(
        "add_sparse_dense: the fusion starts as the sparse blocks' output, the mask token as zero; outputs are unchanged"
    )


def add_dynamic(transfer: TransferState) -> None:
    """Routers are initialised open, as in every new model."""
    if transfer.old.exit_depths == transfer.new.exit_depths:
        note = "add_dynamic: routers are initialised fully open; outputs are unchanged"
    else:
        note = "add_dynamic: new routers are fully open; outputs change at the timesteps where exit_depths skips blocks"
    transfer.notes.append(note)


def adaln_to_single(transfer: TransferState) -> None:
    """Replaces the per-block modulation MLPs by their mean, shared, and a table per block that makes up the difference
    at ADALN_SINGLE_TIMESTEP without a class (PixArt-α, section 2.3)."""
    old, source, state = transfer.old, transfer.source_state, transfer.state
    width, depth, _ = old.dimensions
    table = source.get("y_embedder.embedding_table.weight")
    timestep = torch.full((1,), ADALN_SINGLE_TIMESTEP, device=transfer.source.device)
    embedding = transfer.source.t_embedder(timestep, transfer.source.dtype)[0].float()  # (D,)
    if table is not None and old.null_class:
        embedding = embedding + table[-1].float()
    activation = F.silu(embedding)
    layers = [_modulation_layer(source, i, width) for i in range(depth)]
    weight, bias = (torch.stack(tensors).mean(0) for tensors in zip(*layers, strict=True))  # (6, D, D), (6, D)
    state["t_block.1.weight"], state["t_block.1.bias"] = weight.flatten(0, 1), bias.flatten()
    for i, (block_weight, block_bias) in enumerate(layers):
        name = f"blocks.{2 * i if transfer.interleaved else i}.scale_shift_table"
        state[name] = (block_weight - weight) @ activation + block_bias - bias
    final_weight, final_bias = (source[f"final_layer.adaLN_modulation.1.{n}"].float() for n in ("weight", "bias"))
    state["final_layer.scale_shift_table"] = (final_weight @ activation + final_bias).unflatten(0, (2, -1)) - embedding
    optional = {"micro-conditions": old.micro_conditions, "pooled text": old.pooled_text or old.pooled_dim}
    without = "".join(f" and {name}" for name, present in optional.items() if present)
    transfer.notes.append(
        "adaln_to_single: t_block is the mean of the blocks' adaLN_modulation; each scale_shift_table adds the block's "
        f"difference at timestep {ADALN_SINGLE_TIMESTEP:g}, where outputs without a class{without} are unchanged; "
        "outputs at other timesteps change"
    )


def _modulation_layer(state: dict[str, Tensor], index: int, width: int) -> tuple[Tensor, Tensor]:
    """A block's modulation layer as (6, D, D) and (6, D), float32; for `adaln` (no gates), gates of 1 are inserted."""
    weight, bias = (state[f"blocks.{index}.adaLN_modulation.1.{n}"].float() for n in ("weight", "bias"))
    weight, bias = weight.unflatten(0, (-1, width)), bias.unflatten(0, (-1, width))
    if len(bias) == 4:
        zero, one = torch.zeros_like(weight[:1]), torch.ones_like(bias[:1])
        weight = torch.cat([weight[:2], zero, weight[2:], zero])
        bias = torch.cat([bias[:2], one, bias[2:], one])
    return weight, bias


# In the order in which they are applied.
CHANGES: dict[Transition, Callable[[TransferState], None]] = {
    "new_text_projection": new_text_projection,
    "class_to_text": class_to_text,
    "add_temporal": add_temporal,
    "rescale_positions": rescale_positions,
    "add_micro_conditions": add_micro_conditions,
    "add_dynamic": add_dynamic,
    "add_sparse_dense": add_sparse_dense,
    "adaln_to_single": adaln_to_single,
}


# ----------------------------------------------------------------------------------------- report


def _format_names(names: tuple[str, ...]) -> str:
    """Names, grouped over blocks: `blocks.*.attn_temp.qkv.weight`, or `blocks.1,3,….attn.qkv.weight`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        match = re.match(r"blocks\.(\d+)\.(.*)", name)
        blocks.setdefault(match[2] if match else name, []).extend([int(match[1])] if match else [])
    return ", ".join(f"blocks.{_format_indices(i)}.{rest}" if i else rest for rest, i in blocks.items())


def _format_indices(blocks: list[int]) -> str:
    """`*` for all from 0 on; else the first two."""
    if blocks == list(range(len(blocks))) and len(blocks) > 1:
        return "*"
    return ",".join(map(str, blocks if len(blocks) <= 2 else [*blocks[:2], "…"]))


# ----------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None, open_source: OpenSource = open_as_is) -> int:
    """Exit code 0; 1: a file cannot be written; 2: weights or arguments that cannot be used.

    open_source: yields the weights to read for SOURCE (`stdit` merges LoRA runs:
    stdit.training.adapters.full_model)."""
    args = arguments.transfer().parse_args(argv)
    try:
        with open_source(args.source, "ema") as source:
            echo(transfer_file(source, args.out, args.config, args.overrides, tuple(args.allow), args.seed))
    except (ConfigError, ValueError, OSError) as error:
        echo(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    return 0


def transfer_file(
    source: Path, out: Path, config: Path | None, overrides: list[str], allow: tuple[str, ...], seed: int
) -> str:
    """Writes the target model to the folder `out`; returns the report.

    ValueError: a wrong argument, an unreadable source, or a difference that `allow` does not cover.
    """
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise ConfigError(f"--to: {out} is the source {source}, or inside it; choose another folder")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"--to: {out} exists already")
    parent = next(p for p in out.parents if p.exists() or p.is_symlink())
    if not parent.is_dir():
        raise ConfigError(f"--to: {out}: {parent} is not a folder")
    check_writable(out.parent)
    # from_pretrained would cast to float32; load_published keeps each tensor's dtype.
    model = load_published(source)
    if len({p.dtype for p in model.parameters()}) > 1:  # one dtype for all, without loss
        torch.nn.Module.to(model, torch.float32)
    target = _target_config(model, config, overrides)
    parameters = parameter_count(target)
    check_fits(f"the target has {parameters / 1e6:,.0f} M parameters, which take", 4 * parameters)
    new, report = transfer_weights(model, target, allow, seed)
    with failed_writes_named(out), atomic_folder(out) as folder:
        new.save_pretrained(folder)
        seal_model(folder)
    copied = "\nnote: nothing changes: this is a copy of the source" if target == model.settings else ""
    return f"{source} -> {out}\n{report}{copied}"


def _target_config(source: STDiT, config: Path | None, overrides: list[str]) -> ModelConfig:
    data, name = source.settings.model_dump(mode="json"), "the source's config"
    if config is not None:
        content, name = read_extended(config), f"{config}: model"
        if "model" not in content:
            raise ConfigError(f"{config}: model: missing key")
        data = content["model"]
    for override in overrides:
        data = apply_override(data, override)
    return validate(data, ModelConfig, name)


if __name__ == "__main__":
    sys.exit(main())
