"""Layouts of diffusers' DiTTransformer2DModel, PixArtTransformer2DModel and LatteTransformer3DModel.

What tensors do not determine comes from config.json (stdit.weights.layouts.diffusers_config).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.transformers.latte_transformer_3d import LatteTransformer3DModel
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

from stdit.config.model import ModelConfig
from stdit.weights.layouts.diffusers_config import GELUS, ONLY, DiffusersConfig
from stdit.weights.layouts.layout import (
    Layout,
    Rule,
    SourceWeights,
    concatenated,
    image_patches,
    linear,
    replicated,
    same,
    tensor_shape,
)
from stdit.weights.layouts.original import CLASSES, DIMENSIONS, MAX_TOKENS, NULL_CAPTION, TEXT

# PixArt's learned null caption in folders of diffusers 0.22 to 0.25; later classes do not have it, nor used it.
DIFFUSERS_NULL_CAPTION = "caption_projection.y_embedding"


# ------------------------------------------------------------------------------------------- rules


def mlp(ours: str, theirs: str) -> list[Rule]:
    return linear(f"{ours}.fc1", f"{theirs}.net.0.proj") + linear(f"{ours}.fc2", f"{theirs}.net.2")


def self_attention(ours: str, theirs: str) -> list[Rule]:
    return concatenated(f"{ours}.qkv", (f"{theirs}.to_q", f"{theirs}.to_k", f"{theirs}.to_v")) + linear(
        f"{ours}.proj", f"{theirs}.to_out.0"
    )


def single_block(c: ModelConfig, index: int, theirs: str) -> list[Rule]:
    """A block with adaln_single (PixArt, Latte)."""
    ours = f"blocks.{index}"
    rules = [same(f"{ours}.scale_shift_table", f"{theirs}.scale_shift_table")]
    rules += self_attention(f"{ours}.attn", f"{theirs}.attn1") + mlp(f"{ours}.mlp", f"{theirs}.ff")
    if c.block_text[index]:
        rules += linear(f"{ours}.cross_attn.q_linear", f"{theirs}.attn2.to_q")
        rules += concatenated(f"{ours}.cross_attn.kv_linear", (f"{theirs}.attn2.to_k", f"{theirs}.attn2.to_v"))
        rules += linear(f"{ours}.cross_attn.proj", f"{theirs}.attn2.to_out.0")
    return rules


def single_embedders(c: ModelConfig) -> list[Rule]:
    """Embedders and final layer of PixArt and Latte."""
    embedders = {"t_embedder": "timestep_embedder"}
    if "size" in c.micro_conditions:
        embedders |= {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    rules = image_patches("x_embedder.proj", "pos_embed.proj")
    for ours, theirs in embedders.items():
        rules += linear(f"{ours}.mlp.0", f"adaln_single.emb.{theirs}.linear_1")
        rules += linear(f"{ours}.mlp.2", f"adaln_single.emb.{theirs}.linear_2")
    rules += linear("t_block.1", "adaln_single.linear")
    rules += linear("y_embedder.y_proj.fc1", "caption_projection.linear_1")
    rules += linear("y_embedder.y_proj.fc2", "caption_projection.linear_2")
    if c.null_text == "sequence":
        rules.append(same(NULL_CAPTION, DIFFUSERS_NULL_CAPTION))
    return [
        *rules,
        *linear("final_layer.linear", "proj_out"),
        same("final_layer.scale_shift_table", "scale_shift_table"),
    ]


# -------------------------------------------------------------------------------- config.json


def limits(c: ModelConfig, title: str) -> list[str]:
    """Limits that all diffusers classes share."""
    lines = []
    if c.patch_size[0] != 1 or c.patch_size[1] != c.patch_size[2]:
        lines.append(f"patch_size is {c.patch_size}; {title} has square patches of one frame, (1, p, p)")
    if c.positions == "sincos" and c.position_base is None:
        lines.append(
            f"position_base is None; {title} rescales positions to a base grid: give --set position_base=N, its side in patches"
        )
    if c.text_dim is not None and c.null_text != "empty":
        lines.append(
            f"null_text is {c.null_text!r}; {title} has no learned null caption, but encodes an empty one: "
            "--set null_text=empty drops the learned one"
        )
    return lines


def common_config(c: ModelConfig) -> dict[str, Any]:
    """config.json keys that all classes share."""
    width, depth, heads = c.dimensions
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": c.in_channels,
        "out_channels": c.in_channels * (2 if c.learned_variance else 1),
        "num_layers": depth,
        "sample_size": (c.position_base or 0) * c.patch_size[1],
        "patch_size": c.patch_size[1],
    }


def _transformer_config(c: ModelConfig) -> dict[str, Any]:
    """Keys that DiT, PixArt and Latte share."""
    gelu = next(theirs for theirs, ours in GELUS.items() if ours == c.gelu)
    return common_config(c) | {
        "dropout": 0.0,
        "attention_bias": True,
        "activation_fn": gelu,
        "norm_elementwise_affine": False,
    }


# --------------------------------------------------------------------------------------------- DiT


def _infer_dit(source: SourceWeights) -> dict[str, Any]:
    v = DiffusersConfig(source, DiTTransformer2DModel, "DiTTransformer2DModel")
    v.require(norm_type="ada_norm_zero", **ONLY)
    found = v.sizes() | {
        "gelu": v.assumed("gelu", v.one_of("activation_fn", GELUS)),
        "mlp_norm_eps": v.assumed("mlp_norm_eps", v.number("norm_eps")),
    }
    if not isinstance(v["num_embeds_ada_norm"], int):
        v.errors.append(f"num_embeds_ada_norm: {v['num_embeds_ada_norm']!r}; expected the number of classes")
    v.check()
    return found | {"num_classes": v["num_embeds_ada_norm"]}


def _dit_rules(c: ModelConfig) -> list[Rule]:
    depth = c.dimensions[1]
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(depth)]
    table = "class_embedder.embedding_table"
    rules = image_patches("x_embedder.proj", "pos_embed.proj")
    rules += replicated("t_embedder.mlp.0", [f"{e}.timestep_embedder.linear_1" for e in embedders])
    rules += replicated("t_embedder.mlp.2", [f"{e}.timestep_embedder.linear_2" for e in embedders])
    weight, _ = replicated("y_embedder.embedding_table", [f"{e}.{table}" for e in embedders])
    rules += [
        weight,
        *linear("final_layer.adaLN_modulation.1", "proj_out_1"),
        *linear("final_layer.linear", "proj_out_2"),
    ]
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        rules += linear(f"{ours}.adaLN_modulation.1", f"{theirs}.norm1.linear")
        rules += self_attention(f"{ours}.attn", f"{theirs}.attn1") + mlp(f"{ours}.mlp", f"{theirs}.ff")
    return rules


def _dit_limits(c: ModelConfig) -> list[str]:
    lines = limits(c, "diffusers' DiT")
    if c.num_classes is None:
        lines.append("num_classes is None; diffusers' DiT has classes")
    if c.timestep_freq_shift == 0:
        lines.append(
            "(diffusers' DiT divides the exponents of timestep frequencies by 127, the original DiT by 128, and diffusers "
            "publishes DiT's weights unchanged. --set timestep_freq_shift=1 mlp_norm_eps=1e-5 does the same; outputs change slightly)"
        )
    return lines


DIFFUSERS_DIT = Layout(
    name="diffusers-dit",
    title="diffusers' DiT",
    fixed={"conditioning": "adaln_zero", "temporal": False, "timestep_freq_shift": 1},
    free=(DIMENSIONS - {"mlp_ratio"}) | (CLASSES - {"null_class"}) | {"position_base", "gelu", "mlp_norm_eps"},
    infer=_infer_dit,
    rules=_dit_rules,
    limits=_dit_limits,
    diffusers_class="DiTTransformer2DModel",
    diffusers_config=lambda c: (
        _transformer_config(c)
        | {"num_embeds_ada_norm": c.num_classes, "norm_type": "ada_norm_zero", "norm_eps": c.mlp_norm_eps or c.norm_eps}
    ),
)


# ------------------------------------------------------------------------------------ PixArt, Latte


def _captioned(v: DiffusersConfig, width: int, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a class with a caption projection (an MLP with tanh GELU)."""
    v.require(**ONLY, **fixed, activation_fn="gelu-approximate", cross_attention_dim=width)
    if not isinstance(v["caption_channels"], int):
        v.errors.append(
            f"caption_channels: {v['caption_channels']!r}; expected the width of text features, which are projected"
        )
    return {"text_dim": v["caption_channels"], "norm_eps": v.assumed("norm_eps", v.number("norm_eps"))}


def _infer_null_caption(source: SourceWeights, default: str) -> dict[str, Any]:
    """The null caption, and with a learned one the caption length. default: what a folder that has a learned one
    uses."""
    if DIFFUSERS_NULL_CAPTION not in source.state or source.overrides.get("null_text", default) == "empty":
        return {"null_text": "empty", "max_text_tokens": MAX_TOKENS}
    if "null_text" not in source.overrides:
        source.notes.append(
            f"{DIFFUSERS_NULL_CAPTION} is PixArt's learned null caption, and is used (null_text: sequence); --set "
            "null_text=empty drops it, as diffusers does"
        )
    return {"null_text": "sequence", "max_text_tokens": tensor_shape(source, DIFFUSERS_NULL_CAPTION, 2)[0]}


def _captioned_config(c: ModelConfig) -> dict[str, Any]:
    return _transformer_config(c) | {
        "cross_attention_dim": c.dimensions[0],
        "caption_channels": c.text_dim,
        "norm_type": "ada_norm_single",
        "norm_eps": c.norm_eps,
        "num_embeds_ada_norm": 1000,
    }


def _text_limits(c: ModelConfig, title: str) -> list[str]:
    return limits(c, title) + ([f"text_dim is None; {title} has captions"] if c.text_dim is None else [])


def _standard_scale(c: ModelConfig) -> bool:
    return c.position_interpolation == max((c.position_base or 0) * c.patch_size[1] // 64, 1)


def _plain(number: float) -> int | float:
    return int(number) if number == int(number) else number


def _infer_pixart(source: SourceWeights) -> dict[str, Any]:
    v = DiffusersConfig(source, PixArtTransformer2DModel, "PixArtTransformer2DModel")
    found = v.sizes()
    found |= _captioned(v, found["hidden_size"], {"norm_type": "ada_norm_single", "attention_type": "default"})
    scale = v.assumed("position_interpolation", v.number("interpolation_scale", max(v["sample_size"] // 64, 1)))
    additional = v["use_additional_conditions"]
    if additional not in (None, True, False):
        v.errors.append(f"use_additional_conditions: {additional!r}; expected True, False or None")
    v.check()
    sized = v["sample_size"] == 128 if additional is None else additional
    found |= {"position_interpolation": scale, "micro_conditions": ("size",) if sized else ()}
    return found | _infer_null_caption(source, "sequence")


def _pixart_rules(c: ModelConfig) -> list[Rule]:
    blocks = [rule for i in range(c.dimensions[1]) for rule in single_block(c, i, f"transformer_blocks.{i}")]
    return single_embedders(c) + blocks


def _pixart_limits(c: ModelConfig) -> list[str]:
    lines = _text_limits(c, "diffusers' PixArt")
    if c.micro_conditions not in ((), ("size",)):
        lines.append(f"micro_conditions is {c.micro_conditions}; diffusers' PixArt has () or ('size',)")
    return lines


DIFFUSERS_PIXART = Layout(
    name="diffusers-pixart",
    title="diffusers' PixArt",
    fixed={"conditioning": "adaln_single", "temporal": False},
    free=(DIMENSIONS - {"mlp_ratio"})
    | TEXT
    | {"position_base", "position_interpolation", "micro_conditions", "norm_eps", "null_text"},
    infer=_infer_pixart,
    rules=_pixart_rules,
    limits=_pixart_limits,
    diffusers_class="PixArtTransformer2DModel",
    diffusers_config=lambda c: (
        _captioned_config(c)
        | {
            "interpolation_scale": None if _standard_scale(c) else _plain(c.position_interpolation),
            "use_additional_conditions": "size" in c.micro_conditions,
            "attention_type": "default",
        }
    ),
)


def _infer_latte(source: SourceWeights) -> dict[str, Any]:
    v = DiffusersConfig(source, LatteTransformer3DModel, "LatteTransformer3DModel")
    found = v.sizes()
    found |= _captioned(v, found["hidden_size"], {"norm_type": "ada_norm_single"})
    if not isinstance(v["video_length"], int) or v["video_length"] < 1:
        v.errors.append(f"video_length: {v['video_length']!r}; expected the number of frames")
    v.check()
    # Latte's pipelines guide with the empty caption; what its own file has is left from PixArt, where it started.
    return (
        found
        | _infer_null_caption(source, "empty")
        | {
            "depth": 2 * v["num_layers"],
            "position_interpolation": float(max(v["sample_size"] // 64, 1)),
            "position_frames": v.assumed("position_frames", v["video_length"]),
        }
    )


def _latte_rules(c: ModelConfig) -> list[Rule]:
    rules = single_embedders(c)
    for i in range(c.dimensions[1]):
        kind = "temporal_transformer_blocks" if i % 2 else "transformer_blocks"
        rules += single_block(c, i, f"{kind}.{i // 2}")
    return rules


def _latte_limits(c: ModelConfig) -> list[str]:
    lines = _text_limits(c, "diffusers' Latte")
    if c.position_base is not None:
        sample = c.position_base * c.patch_size[1]
        if c.position_interpolation != max(sample // 64, 1):
            lines.append(
                f"position_interpolation is {c.position_interpolation}; diffusers' Latte has {max(sample // 64, 1)} "
                f"with position_base {c.position_base} and patches of {c.patch_size[1]}"
            )
    if c.position_frames is None:
        lines.append(
            "position_frames is None; diffusers' Latte has a fixed number of frames: give --set position_frames=N"
        )
    return lines


DIFFUSERS_LATTE = Layout(
    name="diffusers-latte",
    title="diffusers' Latte",
    fixed={
        "conditioning": "adaln_single",
        "attention": "alternating",
        "temporal_text": False,
        "temporal_position_injection": "residual",
    },
    free=(DIMENSIONS - {"mlp_ratio"})
    | TEXT
    | {"position_base", "position_interpolation", "position_frames", "norm_eps", "null_text"},
    infer=_infer_latte,
    rules=_latte_rules,
    limits=_latte_limits,
    diffusers_class="LatteTransformer3DModel",
    diffusers_config=lambda c: (
        _captioned_config(c) | {"num_layers": c.dimensions[1] // 2, "video_length": c.position_frames}
    ),
)
