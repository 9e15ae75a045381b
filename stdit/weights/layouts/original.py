"""Weights as DiT (facebookresearch), PixArt-α and -Σ, and Latte's class-conditional model have them.

Their parameter names are ours (or ours are theirs); what differs is the Conv2d of the patches, and the tables of positions.
"""

from __future__ import annotations

from typing import Any

from stdit.config.model import SIZES, ModelConfig
from stdit.weights.layouts.layout import (
    Foreign,
    Layout,
    Rule,
    Tables,
    count_blocks,
    image_patches,
    linear,
    need,
    same,
    shape,
)
from stdit.weights.layouts.positions import (
    frames_limits,
    spatial_settings,
    spatial_table,
    table_limits,
    temporal_settings,
    temporal_table,
)

DIMENSIONS = frozenset(
    {"hidden_size", "depth", "num_heads", "in_channels", "patch_size", "learned_variance", "mlp_ratio"}
)
PLACES = frozenset({"positions", "position_base", "position_interpolation", "position_grid"})
TIMES = frozenset({"temporal_positions", "temporal_interpolation", "position_frames"})
CLASSES = frozenset({"num_classes", "null_class"})
TEXT = frozenset({"text_dim", "max_text_tokens"})


# --------------------------------------------------------------------------- settings, from tensors


def ratio_of(inner: int, width: int) -> float:
    """The mlp_ratio whose `int(width * ratio)` is `inner`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else ratio * (1 + 2**-52)


def heads_of(foreign: Foreign, width: int, depth: int, head_tensors: tuple[str, ...] = ()) -> int:
    """Heads: set by the user, as in the config beside the file, by tensors as wide as a head, or of a published size."""
    if "num_heads" in foreign.overrides:
        return foreign.overrides["num_heads"]
    if isinstance(foreign.config.get("num_heads"), int):
        return foreign.config["num_heads"]
    for name in head_tensors:
        if name in foreign.state and name.removesuffix("weight") + "bias" not in foreign.state:
            head = shape(foreign, name, 1, 2)[-1]
            if width % head == 0:
                return width // head
    for size, blocks, heads in SIZES.values():
        if (size, blocks) == (width, depth):
            return heads
    raise ValueError(
        f"{foreign.where}: the file does not say how many heads there are, and hidden size {width} with {depth} blocks is no "
        "published size; give --set num_heads=…"
    )


def dimensions(foreign: Foreign, depth: int, block: str, head_tensors: tuple[str, ...] = ()) -> dict[str, Any]:
    """Sizes of a model whose patches are embedded by `x_embedder`, and whose first block is called `block`."""
    fc1 = f"{block}.mlp.fc1.weight"
    need(foreign, "x_embedder.proj.weight", "final_layer.linear.weight", fc1)
    width, channels, *sides = shape(foreign, "x_embedder.proj.weight", 4, 5)
    patch = (1, *sides) if len(sides) == 2 else tuple(sides)
    outputs, inner = shape(foreign, "final_layer.linear.weight", 2)[0], shape(foreign, fc1, 2)[0]
    per_patch = channels * patch[0] * patch[1] * patch[2]
    return {
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads_of(foreign, width, depth, head_tensors),
        "in_channels": channels,
        "patch_size": patch,
        "learned_variance": learned_variance(foreign, outputs, per_patch),
        "mlp_ratio": ratio_of(inner, width),
    }


def learned_variance(foreign: Foreign, outputs: int, per_patch: int) -> bool:
    """Whether there are twice as many outputs as inputs of a patch."""
    if outputs not in (per_patch, 2 * per_patch):
        raise ValueError(
            f"{foreign.where}: the final layer has {outputs} outputs a patch; with {per_patch} inputs it has {per_patch}, or "
            f"{2 * per_patch} with learned variance"
        )
    return outputs == 2 * per_patch


def classes_of(
    foreign: Foreign, table: str = "y_embedder.embedding_table.weight", null_class: bool = True
) -> dict[str, Any]:
    """Classes, of a table that has a row for no class too unless told otherwise."""
    if table not in foreign.state:
        return {"num_classes": None, "null_class": True}
    null = bool(foreign.overrides.get("null_class", null_class))
    return {"num_classes": shape(foreign, table, 2)[0] - null, "null_class": null}


def text_of(foreign: Foreign) -> dict[str, Any]:
    """Width and length of captions, of PixArt's embedder."""
    found: dict[str, Any] = {"text_dim": shape(foreign, "y_embedder.y_proj.fc1.weight", 2)[1]}
    if "y_embedder.y_embedding" in foreign.state:
        found["max_text_tokens"] = shape(foreign, "y_embedder.y_embedding", 2)[0]
    return found


# ------------------------------------------------------------------------------------------- rules


def body(c: ModelConfig) -> list[Rule]:
    """All but the patches' embedding, where the file's names are ours."""
    rules = linear("t_embedder.mlp.0") + linear("t_embedder.mlp.2") + linear("final_layer.linear")
    rules += [same("pos_embed")] if c.positions == "learned" else []
    rules += [same("temp_embed")] if c.has_time and c.time_positions == "learned" else []
    if c.conditioning == "adaln_single":
        rules += [*linear("t_block.1"), same("final_layer.scale_shift_table")]
    else:
        rules += linear("final_layer.adaLN_modulation.1")
    if c.num_classes is not None:
        rules.append(same("y_embedder.embedding_table.weight"))
    if c.text_dim is not None:
        rules += linear("y_embedder.y_proj.fc1") + linear("y_embedder.y_proj.fc2")
        rules += [same("y_embedder.y_embedding")] if c.null_text != "empty" else []
    for name in c.micro_conditions:
        for embedder in ("csize_embedder", "ar_embedder") if name == "size" else (f"{name}_embedder",):
            rules += linear(f"{embedder}.mlp.0") + linear(f"{embedder}.mlp.2")
    return rules


def block(c: ModelConfig, index: int, theirs: str | None = None) -> list[Rule]:
    """A block, called `theirs` in the file."""
    ours = f"blocks.{index}"
    names = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    names += ["attn_temp.qkv", "attn_temp.proj"] if c.attention == "factorized" and c.temporal else []
    names += ["cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"] if c.block_text[index] else []
    names += ["adaLN_modulation.1"] if c.conditioning == "adaln_zero" else []
    lone = ["scale_shift_table"] if c.conditioning == "adaln_single" else []
    if c.qk_norm == "layer":
        names += ["attn.q_norm", "attn.k_norm"]
    elif c.qk_norm == "rms":
        lone += ["attn.q_norm.weight", "attn.k_norm.weight"]
    if _in(c.kv_compress, c.kv_compress_blocks, index):
        names += ["attn.sr", "attn.norm"]
    if c.relative_positions and _in(c.window_size, c.window_blocks, index):
        lone += ["attn.rel_pos_h", "attn.rel_pos_w"]
    rules = [rule for name in names for rule in linear(f"{ours}.{name}", theirs and f"{theirs}.{name}")]
    return rules + [same(f"{ours}.{name}", theirs and f"{theirs}.{name}") for name in lone]


def _in(value: int | None, blocks: tuple[int, ...] | None, index: int) -> bool:
    return value is not None and (blocks is None or index in blocks)


def _rules(c: ModelConfig) -> list[Rule]:
    blocks = [rule for i in range(c.dimensions[1]) for rule in block(c, i)]
    return image_patches("x_embedder.proj", "x_embedder.proj") + body(c) + blocks


def _limits(title: str, c: ModelConfig) -> list[str]:
    lines = table_limits(c, title)
    if c.patch_size[0] != 1 or c.patch_size[1] != c.patch_size[2]:
        lines.append(f"patch_size is {c.patch_size}; {title} has square patches of one frame, (1, p, p)")
    return lines


# --------------------------------------------------------------------------------------------- DiT


def _dit_settings(foreign: Foreign) -> dict[str, Any]:
    depth = count_blocks(foreign, "blocks.")
    return dimensions(foreign, depth, "blocks.0") | classes_of(foreign) | spatial_settings(foreign)


DIT = Layout(
    name="dit",
    title="DiT",
    fixed={"conditioning": "adaln_zero", "temporal": False},
    free=DIMENSIONS | PLACES | CLASSES,
    settings=_dit_settings,
    rules=_rules,
    tables=spatial_table,
    limits=lambda c: _limits("DiT", c),
    guessed=("null_class",),
)


# ------------------------------------------------------------------------- Latte, class-conditional


def _latte_settings(foreign: Foreign) -> dict[str, Any]:
    depth = count_blocks(foreign, "blocks.")
    found = dimensions(foreign, depth, "blocks.0") | classes_of(foreign)
    return found | spatial_settings(foreign) | temporal_settings(foreign, "temp_embed")


def _latte_tables(c: ModelConfig) -> Tables:
    return spatial_table(c) | temporal_table(c, "temp_embed")


LATTE = Layout(
    name="latte",
    title="Latte (class-conditional)",
    fixed={"conditioning": "adaln_zero", "attention": "alternating", "temporal_position_injection": "residual"},
    free=DIMENSIONS | PLACES | TIMES | CLASSES,
    settings=_latte_settings,
    rules=_rules,
    tables=_latte_tables,
    limits=lambda c: _limits("Latte", c) + frames_limits(c, "Latte"),
    guessed=("null_class",),
)


# ------------------------------------------------------------------------------------------- PixArt


def _pixart_settings(foreign: Foreign) -> dict[str, Any]:
    depth = count_blocks(foreign, "blocks.")
    relative = [i for i in range(depth) if f"blocks.{i}.attn.rel_pos_h" in foreign.state]
    pooled = [i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in foreign.state]
    head = tuple(f"blocks.{i}.attn.rel_pos_h" for i in relative)
    found = dimensions(foreign, depth, "blocks.0", head) | text_of(foreign) | spatial_settings(foreign)
    found["micro_conditions"] = ("size",) if any(n.startswith("csize_embedder.") for n in foreign.state) else ()
    found["qk_norm"] = "layer" if any(".attn.q_norm." in n for n in foreign.state) else None
    if pooled:
        side = shape(foreign, f"blocks.{pooled[0]}.attn.sr.weight", 4)[-1]
        found |= {"kv_compress": side, "kv_compress_blocks": None if len(pooled) == depth else tuple(pooled)}
    if relative:
        side = (shape(foreign, head[0], 2)[0] + 1) // 2
        found |= {"window_size": side, "window_blocks": None if len(relative) == depth else tuple(relative)}
        found["relative_positions"] = True
    return found


def _pixart_limits(c: ModelConfig) -> list[str]:
    lines = _limits("PixArt", c)
    if c.text_dim is None:
        lines.append("text_dim is None; PixArt has captions")
    if c.micro_conditions not in ((), ("size",)):
        lines.append(f"micro_conditions is {c.micro_conditions}; PixArt has () or ('size',)")
    if c.qk_norm == "rms":
        lines.append("qk_norm is 'rms'; PixArt has None or 'layer'")
    return lines


PIXART = Layout(
    name="pixart",
    title="PixArt",
    fixed={"conditioning": "adaln_single", "temporal": False, "null_text": "sequence"},
    free=DIMENSIONS
    | PLACES
    | TEXT
    | {
        "micro_conditions",
        "qk_norm",
        "kv_compress",
        "kv_compress_blocks",
        "window_size",
        "window_blocks",
        "relative_positions",
    },
    settings=_pixart_settings,
    rules=_rules,
    tables=spatial_table,
    limits=_pixart_limits,
    wrap="state_dict",
)
