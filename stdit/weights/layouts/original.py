"""Layouts of DiT (facebookresearch), PixArt-α and -Σ, and class-conditional Latte.

Our parameter names are theirs; what differs is the Conv2d patch embedding and the stored position tables.
"""

from __future__ import annotations

from typing import Any

from stdit.config.model import SIZES, ModelConfig
from stdit.weights.layouts.layout import (
    Layout,
    Rule,
    SourceWeights,
    Tables,
    count_blocks,
    image_patches,
    linear,
    require_tensors,
    same,
    tensor_shape,
)
from stdit.weights.layouts.position_tables import (
    choose_other_grids,
    infer_spatial_positions,
    infer_temporal_positions,
    spatial_limits,
    spatial_table,
    temporal_limits,
    temporal_table,
)

DIMENSIONS = frozenset(
    {"hidden_size", "depth", "num_heads", "in_channels", "patch_size", "learned_variance", "mlp_ratio"}
)
SPATIAL = frozenset({"positions", "position_base", "position_interpolation", "position_grid"})
TEMPORAL = frozenset({"temporal_positions", "temporal_interpolation", "position_frames"})
CLASSES = frozenset({"num_classes", "null_class"})
TEXT = frozenset({"text_dim", "max_text_tokens"})
NULL_CAPTION = "y_embedder.y_embedding"
# Caption length where neither a learned null caption nor a config determines it: PixArt-Σ's, and diffusers' pipelines'.
MAX_TOKENS = 300


# --------------------------------------------------------------------------- settings, from tensors


def infer_mlp_ratio(inner: int, width: int) -> float:
    """The mlp_ratio whose `int(width * ratio)` is `inner`."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else ratio * (1 + 2**-52)


def infer_num_heads(source: SourceWeights, width: int, depth: int, head_tensors: tuple[str, ...] = ()) -> int:
    """Number of heads: from `--set`, config.json, a tensor of the head dimension, or a published size."""
    if "num_heads" in source.overrides:
        return source.overrides["num_heads"]
    if isinstance(source.config.get("num_heads"), int):
        return source.config["num_heads"]
    for name in head_tensors:
        if name in source.state and name.removesuffix("weight") + "bias" not in source.state:
            head = tensor_shape(source, name, 1, 2)[-1]
            if width % head == 0:
                return width // head
    for size, blocks, heads in SIZES.values():
        if (size, blocks) == (width, depth):
            return source.assume("num_heads", heads)
    raise ValueError(
        f"{source.where}: the file does not determine the number of heads, and hidden size {width} with {depth} blocks is "
        "not a published size; give --set num_heads=…"
    )


def infer_dimensions(
    source: SourceWeights, depth: int, block: str, head_tensors: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Sizes of a model with an `x_embedder`, from shapes; `block`: prefix of its first block."""
    fc1 = f"{block}.mlp.fc1.weight"
    require_tensors(source, "x_embedder.proj.weight", "final_layer.linear.weight", fc1)
    width, channels, *sides = tensor_shape(source, "x_embedder.proj.weight", 4, 5)
    patch = (1, *sides) if len(sides) == 2 else tuple(sides)
    outputs, inner = tensor_shape(source, "final_layer.linear.weight", 2)[0], tensor_shape(source, fc1, 2)[0]
    per_patch = channels * patch[0] * patch[1] * patch[2]
    return {
        "hidden_size": width,
        "depth": depth,
        "num_heads": infer_num_heads(source, width, depth, head_tensors),
        "in_channels": channels,
        "patch_size": patch,
        "learned_variance": infer_learned_variance(source, outputs, per_patch),
        "mlp_ratio": infer_mlp_ratio(inner, width),
    }


def infer_learned_variance(source: SourceWeights, outputs: int, per_patch: int) -> bool:
    """Whether the final layer has twice as many outputs as a patch has inputs."""
    if outputs not in (per_patch, 2 * per_patch):
        raise ValueError(
            f"{source.where}: the final layer has {outputs} outputs a patch; with {per_patch} inputs it has {per_patch}, or "
            f"{2 * per_patch} with learned variance"
        )
    return outputs == 2 * per_patch


def infer_classes(
    source: SourceWeights, table: str = "y_embedder.embedding_table.weight", null_class: bool = True
) -> dict[str, Any]:
    """Classes, from the embedding table; its last row is the null class unless `--set null_class=false`."""
    if table not in source.state:
        return {"num_classes": None, "null_class": True}
    null = bool(source.overrides.get("null_class", null_class))
    if null_class:
        source.assume("null_class", null)
    return {"num_classes": tensor_shape(source, table, 2)[0] - null, "null_class": null}


def infer_text(source: SourceWeights) -> dict[str, Any]:
    """Caption width and length, from PixArt's caption embedder."""
    text_dim = tensor_shape(source, "y_embedder.y_proj.fc1.weight", 2)[1]
    if NULL_CAPTION in source.state:
        return {"text_dim": text_dim, "max_text_tokens": tensor_shape(source, NULL_CAPTION, 2)[0]}
    if source.overrides.get("null_text") != "empty":
        raise ValueError(
            f"{source.where}: no {NULL_CAPTION}, the learned null caption; give --set null_text=empty to use the text "
            "encoder's features of an empty caption instead"
        )
    return {"text_dim": text_dim, "max_text_tokens": source.assume("max_text_tokens", MAX_TOKENS)}


# ------------------------------------------------------------------------------------------- rules


def embedders_and_final_layer(c: ModelConfig) -> list[Rule]:
    """Everything but the patch embedding and the blocks, with unchanged names."""
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
        rules += [same(NULL_CAPTION)] if c.null_text != "empty" else []
    for name in c.micro_conditions:
        for embedder in ("csize_embedder", "ar_embedder") if name == "size" else (f"{name}_embedder",):
            rules += linear(f"{embedder}.mlp.0") + linear(f"{embedder}.mlp.2")
    return rules


def block(c: ModelConfig, index: int, theirs: str | None = None) -> list[Rule]:
    """A block, whose prefix in the file is `theirs`."""
    ours = f"blocks.{index}"
    names = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    names += ["attn_temp.qkv", "attn_temp.proj"] if c.attention == "factorized" and c.temporal else []
    names += ["cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj"] if c.block_text[index] else []
    names += ["adaLN_modulation.1"] if c.conditioning == "adaln_zero" else []
    tensors = ["scale_shift_table"] if c.conditioning == "adaln_single" else []
    if c.qk_norm == "layer":
        names += ["attn.q_norm", "attn.k_norm"]
    elif c.qk_norm == "rms":
        tensors += ["attn.q_norm.weight", "attn.k_norm.weight"]
    if c.kv_compress_sampling == "conv" and _applies(c.kv_compress, c.kv_compress_blocks, index):
        names += ["attn.sr", "attn.norm"]
    if c.relative_positions and _applies(c.window_size, c.window_blocks, index):
        tensors += ["attn.rel_pos_h", "attn.rel_pos_w"]
    rules = [rule for name in names for rule in linear(f"{ours}.{name}", theirs and f"{theirs}.{name}")]
    return rules + [same(f"{ours}.{name}", theirs and f"{theirs}.{name}") for name in tensors]


def _applies(value: int | None, blocks: tuple[int, ...] | None, index: int) -> bool:
    return value is not None and (blocks is None or index in blocks)


def _rules(c: ModelConfig) -> list[Rule]:
    blocks = [rule for i in range(c.dimensions[1]) for rule in block(c, i)]
    return image_patches("x_embedder.proj", "x_embedder.proj") + embedders_and_final_layer(c) + blocks


def _limits(title: str, c: ModelConfig) -> list[str]:
    lines = spatial_limits(c, title)
    if c.patch_size[0] != 1 or c.patch_size[1] != c.patch_size[2]:
        lines.append(f"patch_size is {c.patch_size}; {title} has square patches of one frame, (1, p, p)")
    return lines


# --------------------------------------------------------------------------------------------- DiT


def _infer_dit(source: SourceWeights) -> dict[str, Any]:
    depth = count_blocks(source, "blocks.")
    found = infer_dimensions(source, depth, "blocks.0") | infer_classes(source)
    return found | choose_other_grids(source, infer_spatial_positions(source), "DiT", rescaled=True)


DIT = Layout(
    name="dit",
    title="DiT",
    fixed={"conditioning": "adaln_zero", "temporal": False},
    free=DIMENSIONS | SPATIAL | CLASSES,
    infer=_infer_dit,
    rules=_rules,
    tables=spatial_table,
    limits=lambda c: _limits("DiT", c),
)


# ------------------------------------------------------------------------- Latte, class-conditional


def _infer_latte(source: SourceWeights) -> dict[str, Any]:
    depth = count_blocks(source, "blocks.")
    found = infer_dimensions(source, depth, "blocks.0") | infer_classes(source)
    found |= choose_other_grids(source, infer_spatial_positions(source), "Latte", rescaled=False)
    return found | infer_temporal_positions(source, "temp_embed")


def _latte_tables(c: ModelConfig) -> Tables:
    return spatial_table(c) | temporal_table(c, "temp_embed")


LATTE = Layout(
    name="latte",
    title="Latte (class-conditional)",
    fixed={"conditioning": "adaln_zero", "attention": "alternating", "temporal_position_injection": "residual"},
    free=DIMENSIONS | SPATIAL | TEMPORAL | CLASSES,
    infer=_infer_latte,
    rules=_rules,
    tables=_latte_tables,
    limits=lambda c: _limits("Latte", c) + temporal_limits(c, "Latte"),
)


# ------------------------------------------------------------------------------------------- PixArt


def _infer_pixart(source: SourceWeights) -> dict[str, Any]:
    depth = count_blocks(source, "blocks.")
    relative = [i for i in range(depth) if f"blocks.{i}.attn.rel_pos_h" in source.state]
    pooled = [i for i in range(depth) if f"blocks.{i}.attn.sr.weight" in source.state]
    head = tuple(f"blocks.{i}.attn.rel_pos_h" for i in relative)
    found = infer_dimensions(source, depth, "blocks.0", head) | infer_text(source)
    found |= infer_spatial_positions(source)
    found["micro_conditions"] = ("size",) if any(n.startswith("csize_embedder.") for n in source.state) else ()
    found["qk_norm"] = "layer" if any(".attn.q_norm." in n for n in source.state) else None
    if pooled:
        side = tensor_shape(source, f"blocks.{pooled[0]}.attn.sr.weight", 4)[-1]
        found |= {"kv_compress": side, "kv_compress_blocks": None if len(pooled) == depth else tuple(pooled)}
    elif (
        not relative and not found["micro_conditions"] and "kv_compress" not in source.overrides
    ):  # else it is PixArt-α
        source.notes.append(
            "no key/value compression is assumed: PixArt-Σ's sampling by ave, uniform or uniform_every has no weights; for "
            "it, --set kv_compress=2 kv_compress_sampling=uniform kv_compress_blocks=[…]"
        )
    if relative:
        side = (tensor_shape(source, head[0], 2)[0] + 1) // 2
        found |= {"window_size": side, "window_blocks": None if len(relative) == depth else tuple(relative)}
        found["relative_positions"] = True
    return found


def _pixart_differences(c: ModelConfig) -> list[str]:
    if c.window_size is None:
        return []
    return [
        f"PixArt-α's released code ignores window_size {c.window_size} and relative positions: its attention spans the "
        "image. Here, windows are used; --set window_size=null window_blocks=null relative_positions=false ignores them"
    ]


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
    | SPATIAL
    | TEXT
    | {
        "micro_conditions",
        "qk_norm",
        "kv_compress",
        "kv_compress_blocks",
        "kv_compress_sampling",
        "window_size",
        "window_blocks",
        "relative_positions",
    },
    infer=_infer_pixart,
    rules=_rules,
    tables=spatial_table,
    limits=_pixart_limits,
    wrapper_key="state_dict",
    differences=_pixart_differences,
)
