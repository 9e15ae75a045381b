"""Weights as J. Rineau's DiT has them: learned positions, a depth-wise convolution in the MLP, no class for no class.

His code of time is [sin, cos] where ours is [cos, sin]: the columns of the layer after it are turned by half.
"""

from __future__ import annotations

import math
from typing import Any

from einops import rearrange

from stdit.config.model import ModelConfig
from stdit.weights.layouts.layout import Foreign, Layout, Rule, count_blocks, linear, need, same, shape, swapped
from stdit.weights.layouts.original import (
    CLASSES,
    DIMENSIONS,
    classes_of,
    heads_of,
    learned_variance,
    ratio_of,
)

# Width, blocks and heads that the class has unless told otherwise.
DEFAULT = (512, 8, 8)


def _settings(foreign: Foreign) -> dict[str, Any]:
    projection, final, fc1 = (
        "first_layer.patchify.projection.weight",
        "final_layer.linear.weight",
        "blocks.0.mlp.c_fc.weight",
    )
    need(foreign, projection, final, fc1, "first_layer.pos_embed")
    state, told = foreign.state, foreign.overrides
    width, per_patch = shape(foreign, projection, 2)
    depth = count_blocks(foreign, "blocks.")
    channels = told.get("in_channels", 4)
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"{foreign.where}: in_channels {channels!r}; expected a whole number, 1 or more")
    side = math.isqrt(per_patch // channels)
    # One number a channel is no patch: of 4 numbers, 4 channels are less likely than patches of 2.
    if side * side * channels != per_patch or (side == 1 and "in_channels" not in told):
        raise ValueError(
            f"{foreign.where}: {projection} takes {per_patch} numbers a patch, which are no patches of {channels} channels; "
            "give --set in_channels=…"
        )
    positions = shape(foreign, "first_layer.pos_embed", 3)[1]
    grid = told.get("position_grid") or (math.isqrt(positions),) * 2
    pair = isinstance(grid, list | tuple) and [type(n) for n in grid] == [int, int]
    if not pair or grid[0] * grid[1] != positions:
        raise ValueError(
            f"{foreign.where}: first_layer.pos_embed has {positions} positions, not those of position_grid {grid}; "
            "give --set position_grid=[H,W], its patches"
        )
    heads = DEFAULT[2] if (width, depth) == DEFAULT[:2] and "num_heads" not in told else heads_of(foreign, width, depth)
    return {
        "hidden_size": width,
        "depth": depth,
        "num_heads": heads,
        "in_channels": channels,
        "patch_size": (1, side, side),
        "learned_variance": learned_variance(foreign, shape(foreign, final, 2)[0], per_patch),
        "mlp_ratio": ratio_of(shape(foreign, fc1, 2)[0], width),
        "position_grid": tuple(grid),
        "mlp": "conv2d" if any(".depthwise_conv." in name for name in state) else "gelu",
        **classes_of(foreign, "first_layer.y_embedder.weight", null_class=False),
    }


def _rules(c: ModelConfig) -> list[Rule]:
    ph, pw = c.patch_size[1:]
    first = "first_layer"
    rules = [
        Rule(
            "x_embedder.proj.weight",
            (f"{first}.patchify.projection.weight",),
            lambda found: rearrange(found[0], "d (ph pw c) -> d c 1 ph pw", ph=ph, pw=pw),
            lambda made: [rearrange(made, "d c t ph pw -> d (t ph pw c)")],
        ),
        same("x_embedder.proj.bias", f"{first}.patchify.projection.bias"),
        same("pos_embed", f"{first}.pos_embed"),
        swapped("t_embedder.mlp.0.weight", f"{first}.t_embedder.1.weight", axis=1),
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
    settings=_settings,
    rules=_rules,
    limits=_limits,
    guessed=("in_channels",),
)
