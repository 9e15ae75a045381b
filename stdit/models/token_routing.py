"""Token routing in training (Krause et al. 2025, TREAD): a share of the tokens bypasses some blocks and is put back after them.

B           batch
T, S        frames, tokens of a frame
K           tokens of a frame that are kept: the others bypass blocks start … end - 1
D, d        hidden size, head width

Kept patches are drawn anew for each sample and are the same in all of its frames. So attention within frames sees K tokens,
attention over time all T frames at K places, full attention T K tokens; every one keeps its own position. In-context tokens
are always kept. Sampling and validation run all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stdit.config import ModelConfig, TokenRoutingConfig
from stdit.models.blocks import BlockState
from stdit.models.dynamic import Generators, uniform
from stdit.models.positions import Rope


def route_tokens(
    routing: TokenRoutingConfig, config: ModelConfig, states: list[BlockState], x: Tensor, generator: Generators
) -> list[BlockState]:
    """`states` for tokens x (B, T, S, D), those of the routed blocks with what their K tokens need."""
    kept = choose_tokens(routing.share, states[0].grid, x, generator)
    if kept.shape[1] == x.shape[2]:
        return states
    full, in_context = config.attention == "full", config.conditioning == "in_context"
    rope, mask = states[0].positions.rope, states[0].mask
    if rope is not None:
        rope = Rope(*(_kept_rotations(table, kept, x.shape[1], full) for table in rope))
    if mask is not None and in_context:  # over the tokens of a frame; any other is over the text
        mask = mask.expand(len(x), -1, -1, -1).gather(3, kept[:, None, None])
    return [
        state._replace(positions=state.positions._replace(rope=rope), mask=mask, kept=kept)
        if routing.start <= i < routing.end
        else state
        for i, state in enumerate(states)
    ]


def choose_tokens(share: float, grid: tuple[int, int, int], x: Tensor, generator: Generators) -> Tensor:
    """(B, K) indices, rising, into the tokens of a frame of x (B, T, S, D): all but `share` of the patches, at least one, and
    whatever comes after the patches."""
    patches = grid[1] * grid[2]
    count = max(1, patches - round(share * patches))
    order = uniform((patches,), len(x), generator, x.device).argsort(dim=1)
    context = torch.arange(patches, x.shape[2], device=x.device).expand(len(x), -1)
    return torch.cat([order[:, :count].sort(dim=1).values, context], dim=1)


def take_tokens(x: Tensor, kept: Tensor) -> Tensor:
    """(B, T, S, D) -> (B, T, K, D)."""
    return x.gather(2, _index(x, kept))


def put_back(x: Tensor, y: Tensor, kept: Tensor) -> Tensor:
    """x (B, T, S, D) with the tokens `kept` (B, K) replaced by y (B, T, K, D)."""
    return x.to(y.dtype).scatter(2, _index(x, kept), y)


def _index(x: Tensor, kept: Tensor) -> Tensor:
    return kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def _kept_rotations(table: Tensor, kept: Tensor, t: int, full: bool) -> Tensor:
    """(T S, 1, d/2) -> (B, T K, 1, d/2) in full attention, else (S, 1, d/2) -> (B T, K, 1, d/2)."""
    if full:
        return table.unflatten(0, (t, -1))[:, kept].transpose(0, 1).flatten(1, 2)
    return table[kept].repeat_interleave(t, 0)
