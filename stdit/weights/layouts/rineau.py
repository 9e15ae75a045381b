"""Layout of J. Rineau's DiT: learned positions, a depthwise convolution in the MLP, no null class.

Its timestep embedding is [sin, cos], ours is [cos, sin]: the column halves of the next layer are swapped.
"""

from __future__ import annotations

import math
from typing import Any

from einops import rearrange

from stdit.config.model import ModelConfig
from stdit.weights.layouts.layout import (
    Layout,
    Rule,
    SourceWeights,
    count_blocks,
    halves_swapped,
    linear,
    require_tensors,
    same,
    tensor_shape,
)
from stdit.weights.layouts.original import (
    CLASSES,
    DIMENSIONS,
    infer_classes,
    infer_learned_variance,
    infer_mlp_ratio,
    infer_num_heads,
)

# Default width, depth and heads of the published class.
DEFAULT = (512, 8, 8)


def _infer(source: SourceWeights) -> dict[str, Any]:
    projection, final, fc1 = (
        "first_layer.patchify.projection.weight",
        "final_layer.linear.weight",
        "blocks.0.mlp.c_fc.weight",
    )
    require_tensors(source, projection, final, fc1, "first_layer.pos_embed")
    state, overrides = source.state, source.overrides
    width, per_patch = tensor_shape(source, projection, 2)
    depth = count_blocks(source, "blocks.")
    channels = overrides.get("in_channels", 4)
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"{source.where}: in_channels {channels!r}; expected an integer, 1 or more")
    side = math.isqrt(per_patch // channels)
    # 1x1 patches are unlikely: 4 values are rather 1 channel of 2x2 patches than 4 channels of 1x1.
    if side * side * channels != per_patch or (side == 1 and "in_channels" not in overrides):
        raise ValueError(
            f"{source.where}: {projection} takes {per_patch} values a patch, which is no square patch of {channels} "
            "channels; give --set in_channels=…"
        )
    positions = tensor_shape(source, "first_layer.pos_embed", 3)[1]
    grid = overrides.get("position_grid") or (math.isqrt(positions),) * 2
    pair = isinstance(grid, list | tuple) and [type(n) for n in grid] == [int, int]
    if not pair or grid[0] * grid[1] != positions:
        raise ValueError(
            f"{source.where}: first_layer.pos_embed has {positions} positions, not those of position_grid {grid}; "
            "give --set position_grid=[H,W], in patches"
        )
    source.assume("in_channels", channels)
    published = (width, depth) == DEFAULT[:2] and "num_heads" not in overrides
    heads = source.assume("num_heads", DEFAULT[2]) if published else infer_num_heads(source, width, depth)
    return {
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "in_channels": channels,
        "patch_size": (1, side, side),
        "learned_variance": infer_learned_variance(source, tensor_shape(source, final, 2)[0], per_patch),
        "mlp_ratio": infer_mlp_ratio(tensor_shape(source, fc1, 2)[0], width),
        "position_grid": tuple(grid),
        "mlp": "conv2d" if any(".depthwise_conv." in name for name in state) else "gelu",
        **infer_classes(source, "first_layer.y_embedder.weight", null_class=False),
    }


def _rules(c: ModelConfig) -> list[Rule]:
    ph, pw = c.patch_size[1:]
    first = "first_layer"
    rules = [
        Rule(
            "x_embedder.proj.weight",
            (f"{first}.patchify.projection.weight",),
            lambda tensors: rearrange(tensors[0], "d (ph pw c) -> d c 1 ph pw", ph=ph, pw=pw),
            lambda tensor: [rearrange(tensor, "d c t ph pw -> d (t ph pw c)")],
        ),
        same("x_embedder.proj.bias", f"{first}.patchify.projection.bias"),
        same("pos_embed", f"{first}.pos_embed"),
        halves_swapped("t_embedder.mlp.0.weight", f"{first}.t_embedder.1.weight", axis=1),
        same("t_embedder.mlp.0.bias", f"{first}.t_embedder.1.bias"),
        *linear("t_embedder.mlp.2", f"{first}.t_embedder.3"),
        *linear("final_layer.linear"),
        *linear("final_layer.adaLN_modulation.1"),
    ]
    if c.num_classes is not None:
        rules.append(same("y_embedder.embedding_table.weight", f"{first}.y_embedder.weight"))
    for i in range(c.dimensions[1]):
        b = f"blocks.{i}"
        rules += linear(f"{b}.attn.qkv", f"{b}.attn.c_attn") + linear(f"{b}.attn.proj", f"{b}.attn.c_proj")
        rules += linear(f"{b}.mlp.fc1", f"{b}.mlp.c_fc") + linear(f"{b}.mlp.fc2", f"{b}.mlp.c_proj")
        rules += linear(f"{b}.adaLN_modulation.1")
        rules += linear(f"{b}.mlp.depthwise_conv") if c.mlp == "conv2d" else []
    return rules


def _limits(c: ModelConfig) -> list[str]:
    lines = []
    if c.patch_size[0] != 1 or c.patch_size[1] != c.patch_size[2]:
        lines.append(f"patch_size is {c.patch_size}; J. Rineau's DiT has square patches of one frame, (1, p, p)")
    if c.mlp not in ("gelu", "conv2d"):
        lines.append(f"mlp is {c.mlp!r}; J. Rineau's DiT has 'conv2d', or 'gelu'")
    return lines


RINEAU = Layout(
    name="rineau",
    title="J. Rineau's DiT",
    fixed={
        "conditioning": "adaln_zero",
        "temporal": False,
        "positions": "learned",
        "timestep_width": None,
        "timestep_freq_shift": 1,
        "timestep_activation": "gelu",
        "null_class": False,
    },
    free=DIMENSIONS | (CLASSES - {"null_class"}) | {"position_grid", "mlp"},
    infer=_infer,
    rules=_rules,
    limits=_limits,
)
