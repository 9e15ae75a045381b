"""Alignment of an early block's tokens in training: to the clean latents (Wang et al. 2026, SRA 2), or to the features
of a frozen vision encoder (Yu et al. 2025, REPA; Singh et al. 2025, iREPA).

B           batch
T, S        frames, tokens of a frame, S = H W
D           hidden size
P           values of a patch: its latents' channels times its size
F           width of a vision encoder's features

    loss = 1 - cos(head(tokens of the block), target)       mean over tokens

    target latents     patches of the clean latents (B, T, S, P): no network but the autoencoder that has made them
    target features    features at the tokens' places (B, T, S, F), interpolated where they are on another grid

The head is trained beside the model and is no part of it: weights that are saved, exported or transferred have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.config import AlignmentConfig
from stdit.models.blocks import BlockState
from stdit.models.embeddings import patchify
from stdit.models.positions import Grid
from stdit.models.sequence_parallel import TokenShards, gather_tokens
from stdit.models.stdit import STDiT

# Against a division by 0 where a feature is the same at all places of a frame, as in iREPA's code.
EPS = 1e-6


class Aligned(nn.Module):
    """A model with the head that maps tokens after a block to the target. ValueError: target features of unknown
    width."""

    def __init__(self, base: STDiT, alignment: AlignmentConfig, seed: int = 0) -> None:
        super().__init__()
        self.base, self.alignment = base, alignment
        width, _, _ = base.settings.dimensions
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.head = make_head(alignment, width, base.settings.patch_values)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, alignment_target: Tensor | None = None, **inputs: Any
    ) -> Any:
        """As `STDiT.forward`. With alignment_target (B, C, T, H, W), the clean latents or a vision encoder's features
        on a grid of their own, a tuple, whose last element is the alignment loss (B,)."""
        if alignment_target is None:
            return self.base(hidden_states, timestep, **inputs)
        with captured_tokens(self.base, self.alignment.block) as captured:
            outputs = self.base(hidden_states, timestep, **inputs | {"return_dict": False})
        tokens, grid, shards = captured[0]
        target = self.targets(alignment_target, grid)
        similarity = F.cosine_similarity(self.project(tokens, grid, shards).float(), target.float(), dim=-1)
        return *outputs, 1 - similarity.mean((1, 2))

    def project(self, tokens: Tensor, grid: Grid, shards: TokenShards | None) -> Tensor:
        """The head's output (B, T, S, P or F) for tokens (B, T, S, D) of a grid (T, H, W)."""
        t, h, w = grid
        if not self.alignment.irepa:
            # Gathered when they are few: P or F values a token. In-context tokens come after the patches.
            return gather_tokens(self.head(tokens), shards)[:, :, : h * w]
        frames = gather_tokens(tokens, shards)[:, :, : h * w].flatten(0, 1)  # a convolution needs its neighbours
        frames = self.head(frames.transpose(1, 2).unflatten(2, (h, w)))
        return frames.flatten(2).transpose(1, 2).unflatten(0, (-1, t))

    @torch.no_grad()
    def targets(self, target: Tensor, grid: Grid) -> Tensor:
        """Clean latents (B, C, T, H, W) or features (B, F, t, h, w) by the tokens of a grid (T, H, W), (B, T, S, P or
        F)."""
        if self.alignment.target == "latents":
            return patchify(target, self.base.patch_size)
        x = target.float()
        if tuple(x.shape[2:]) != grid:
            x = F.interpolate(x, grid, mode="trilinear", align_corners=False)
        x = x.flatten(3).permute(0, 2, 3, 1)  # (B, T, S, F)
        if self.alignment.irepa:
            x = x - self.alignment.irepa_gamma * x.mean(2, keepdim=True)
            x = x / (x.std(2, keepdim=True) + EPS)
        return x

    def meta_target(self, hidden_states: Tensor, grid: Grid) -> Tensor:
        """A target without values for latents (B, C, T, H, W), to count operations with."""
        if self.alignment.target == "latents":
            return hidden_states
        assert self.alignment.features_dim is not None
        return hidden_states.new_empty(len(hidden_states), self.alignment.features_dim, *grid)


def make_head(alignment: AlignmentConfig, width: int, patch_values: int) -> nn.Module:
    """A head for tokens `width` wide: of the latents' patches an MLP of two layers, of features one of three or, in
    iREPA, a convolution."""
    if alignment.target == "latents":
        head = _mlp(width, width, patch_values)
    elif (outputs := alignment.features_dim) is None:
        raise ValueError("train.alignment.features_dim is not known; it follows from the features (data.features)")
    elif alignment.irepa:
        head = nn.Conv2d(width, outputs, kernel_size=3, padding=1)
    else:
        head = _mlp(width, alignment.projector_dim, alignment.projector_dim, outputs)
    for layer in head.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return head


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@contextmanager
def captured_tokens(model: STDiT, block: int) -> Iterator[list[tuple[Tensor, Grid, TokenShards | None]]]:
    """Within the context each forward pass appends its tokens (B, T, S, D) after `block`, with gradients, their grid
    and their shards.

    Taken where `run_blocks` passes them on: a hook on the block would be compiled with it, and called once more when
    activation checkpointing computes the block again.
    """
    run_blocks, captured = model.run_blocks, []

    def run(x: Tensor, text: Tensor | None, states: Sequence[BlockState]) -> Iterator[Any]:
        for i, (tokens, stats) in enumerate(run_blocks(x, text, states)):
            if i == block:
                captured.append((tokens, states[i].grid, states[i].shards))
            yield tokens, stats

    model.run_blocks = run
    try:
        yield captured
    finally:
        del model.run_blocks
