"""Feed-forward networks of the block: GELU MLP, SwiGLU, and MLPs with a depth-wise convolution.

B           batch
T, H, W     grid of patches;  S = H W
D, F        hidden size, inner width
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.positions import Grid


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))). Weights as published: `fc1`, `fc2`."""

    def __init__(self, inputs: int, hidden: int, outputs: int, gelu: Literal["tanh", "erf"]) -> None:
        super().__init__()
        self.gelu = "none" if gelu == "erf" else gelu
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor, grid: Grid | None = None, channel_mask: Tensor | None = None) -> Tensor:
        """(…, D) -> (…, D). channel_mask (…, F): 0 for inner channels that are dropped, else 1."""
        if channel_mask is not None:
            return self.fc2(F.gelu(self.fc1(x) * channel_mask, approximate=self.gelu))
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class SwiGLU(nn.Module):
    """w3(silu(a) b) with [a; b] = w12(x) (Shazeer 2020, equation 6)."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner)
        self.w3 = nn.Linear(inner, hidden_size)

    def forward(self, x: Tensor, grid: Grid | None = None, channel_mask: Tensor | None = None) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        if channel_mask is not None:
            value = value * channel_mask
        return self.w3(F.silu(gate) * value)


class ConvMlp(Mlp):
    """fc2(depthwise_conv(gelu(fc1(x)))) on the grid (Li et al. 2021, LocalViT; J. Rineau's DiT).

    over_time: a 3 x 3 x 3 convolution, else 3 x 3 within each frame. Temporal padding repeats the first and last frame,
    so that a still clip gives the output of its frame.
    """

    def __init__(self, hidden_size: int, hidden: int, gelu: Literal["tanh", "erf"], over_time: bool) -> None:
        super().__init__(hidden_size, hidden, hidden_size, gelu)
        conv = nn.Conv3d if over_time else nn.Conv2d
        self.depthwise_conv = conv(hidden, hidden, 3, padding=0 if over_time else 1, groups=hidden)

    def forward(self, x: Tensor, grid: Grid | None = None, channel_mask: Tensor | None = None) -> Tensor:
        """x (B, T, S, D) -> (B, T, S, D)."""
        assert grid is not None
        assert channel_mask is None
        t, h, w = grid
        y = F.gelu(self.fc1(x), approximate=self.gelu)
        if isinstance(self.depthwise_conv, nn.Conv3d):
            y = rearrange(y, "b t (h w) f -> b f t h w", h=h, w=w)
            y = torch.cat([y[:, :, :1], y, y[:, :, -1:]], dim=2)
            y = rearrange(self.depthwise_conv(F.pad(y, (1, 1, 1, 1))), "b f t h w -> b t (h w) f")
        else:
            y = rearrange(y, "b t (h w) f -> (b t) f h w", h=h, w=w)
            y = rearrange(self.depthwise_conv(y), "(b t) f h w -> b t (h w) f", t=t)
        return self.fc2(y)


def feed_forward(config: ModelConfig) -> Mlp | SwiGLU:
    """The feed-forward network of `config`."""
    (width, _, _), inner = config.dimensions, config.mlp_width
    if config.mlp == "swiglu":
        return SwiGLU(width, inner)
    if config.mlp == "gelu":
        return Mlp(width, inner, width, config.gelu)
    return ConvMlp(width, inner, config.gelu, config.mlp == "conv3d")
