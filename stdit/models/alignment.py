"""Alignment of an early block's tokens to the clean latents in training (Wang et al. 2026, SRA 2).

B           batch
T, S        frames, tokens of a frame
D           hidden size
P           values of a patch: its latents' channels times its size

    loss = 1 - cos(head(tokens of the block), patches of the clean latents)       mean over tokens, REPA's similarity

The target needs no network but the autoencoder that has made the latents. The head is trained beside the model and is no part
of it: weights that are saved, exported or transferred have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.models.blocks import BlockState
from stdit.models.embeddings import patchify
from stdit.models.sequence_parallel import TokenShards, gather_tokens
from stdit.models.stdit import STDiT


class Aligned(nn.Module):
    """A model with the head that maps tokens after block `block` (from 0) to patches."""

    def __init__(self, base: STDiT, block: int, seed: int = 0) -> None:
        super().__init__()
        self.base, self.block = base, block
        width, _, _ = base.settings.dimensions
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            layers = nn.Linear(width, width), nn.Linear(width, base.settings.patch_values)
            for layer in layers:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.head = nn.Sequential(layers[0], nn.SiLU(), layers[1])

    def forward(
        self, hidden_states: Tensor, timestep: Tensor | float, clean_latents: Tensor | None = None, **inputs: Any
    ) -> Any:
        """As `STDiT.forward`. With clean_latents (B, C, T, H, W) a tuple, whose last element is the alignment loss (B,)."""
        if clean_latents is None:
            return self.base(hidden_states, timestep, **inputs)
        with captured_tokens(self.base, self.block) as captured:
            outputs = self.base(hidden_states, timestep, **inputs | {"return_dict": False})
        tokens, shards = captured[0]
        target = patchify(clean_latents, self.base.patch_size)  # (B, T, S, P)
        # Gathered when they are few: P values a token. In-context tokens come after the patches.
        projected = gather_tokens(self.head(tokens), shards)[:, :, : target.shape[2]]
        similarity = F.cosine_similarity(projected.float(), target.float(), dim=-1)
        return *outputs, 1 - similarity.mean((1, 2))


@contextmanager
def captured_tokens(model: STDiT, block: int) -> Iterator[list[tuple[Tensor, TokenShards | None]]]:
    """Within the context each forward pass appends its tokens (B, T, S, D) after `block`, with gradients, and their shards.

    Taken where `run_blocks` passes them on: a hook on the block would be compiled with it, and called once more when
    activation checkpointing computes the block again.
    """
    run_blocks, captured = model.run_blocks, []

    def run(x: Tensor, text: Tensor | None, states: Sequence[BlockState]) -> Iterator[Any]:
        for i, (tokens, stats) in enumerate(run_blocks(x, text, states)):
            if i == block:
                captured.append((tokens, states[i].shards))
            yield tokens, stats

    model.run_blocks = run
    try:
        yield captured
    finally:
        del model.run_blocks
