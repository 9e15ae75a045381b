"""Token routing in training (Krause et al. 2025, TREAD): a share of the tokens bypasses some blocks and is put back
after them.

B           batch
T, S        frames, tokens of a frame
K           tokens of a frame that are kept: the others bypass blocks start … end - 1
D, d        hidden size, head width

Kept patches are drawn anew for each sample and are the same in all of its frames. So attention within frames sees K
tokens, attention over time all T frames at K places, full attention T K tokens; every one keeps its own position.
In-context tokens are always kept. Sampling and validation run all tokens.

With `model.sparse_dense` (SPRINT, arXiv 2510.21986) what bypassed the blocks is put back as a learned mask token, and a
linear map fuses it with the tokens before them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stdit.config import ModelConfig, TokenRoutingConfig
from stdit.models.blocks import BlockState
from stdit.models.dynamic import Generators, uniform
from stdit.models.positions import Rope


def route_tokens(
    routing: TokenRoutingConfig, config: ModelConfig, states: list[BlockState], x: Tensor, generator: Generators
) -> list[BlockState]:
    """`states` for tokens x (B, T, S, D), those of the routed blocks with what their K tokens need, and with the
    samples whose path is dropped. Nothing is drawn for the latter at path_drop 0."""
    kept = choose_tokens(routing.share, states[0].grid, x, generator)
    changes: dict[str, Any] = {}
    if kept.shape[1] < x.shape[2]:
        changes = _of_kept_tokens(config, states[0], x, kept)
    if routing.path_drop:
        changes["path_dropped"] = uniform((), len(x), generator, x.device) < routing.path_drop
    return [state._replace(**changes) if routing.start <= i < routing.end else state for i, state in enumerate(states)]


def drop_path_of_all(sparse: tuple[int, int], states: list[BlockState]) -> list[BlockState]:
    """`states` with which blocks start … end - 1 are not run."""
    return [state._replace(path_dropped=True) if i in range(*sparse) else state for i, state in enumerate(states)]


def _of_kept_tokens(config: ModelConfig, state: BlockState, x: Tensor, kept: Tensor) -> dict[str, Any]:
    """What changes in a block's state with the tokens `kept` (B, K)."""
    full, in_context = config.attention == "full", config.conditioning == "in_context"
    rope, mask = state.positions.rope, state.mask
    if rope is not None:
        rope = Rope(*(_kept_rotations(table, kept, x.shape[1], full) for table in rope))
    if mask is not None and in_context:  # over the tokens of a frame; any other is over the text
        mask = mask.expand(len(x), -1, -1, -1).gather(3, kept[:, None, None])
    return {"positions": state.positions._replace(rope=rope), "mask": mask, "kept": kept}


class SparseDenseFusion(nn.Module):
    """Fuses the tokens before the sparse blocks with those after them: Linear([dense, sparse]), 2 D -> D (SPRINT, arXiv
    2510.21986).

    Tokens that bypassed the sparse blocks, and all of a sample whose path is dropped, are `mask_token` in `sparse`. As
    initialised it returns `sparse`: the model is the one without it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * width, width)
        self.mask_token = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def init_weights(self) -> None:
        """(0 | I)."""
        width = len(self.mask_token)
        nn.init.zeros_(self.proj.bias)
        self.proj.weight.copy_(torch.eye(width, 2 * width).roll(width, 1))
        nn.init.zeros_(self.mask_token)

    def forward(self, dense: Tensor, sparse: Tensor, state: BlockState) -> Tensor:
        """Tokens before and after the sparse blocks, (B, T, S, D) each, and the state of one of these -> (B, T, S,
        D)."""
        if state.path_dropped is True:
            sparse = self.mask_token.to(dense.dtype).expand_as(dense)
        elif self.training:  # in every step, so that ranks agree on which parameters have gradients
            sparse = torch.where(_ran(sparse, state), sparse, self.mask_token.to(sparse.dtype))
        return self.proj(torch.cat([dense.to(sparse.dtype), sparse], dim=-1))


def _ran(x: Tensor, state: BlockState) -> Tensor:
    """(B, 1, S, 1) bool: the tokens that went through the sparse blocks."""
    ran = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    if state.kept is not None:
        ran = torch.zeros_like(ran).scatter(1, state.kept, ran[:, : state.kept.shape[1]])
    if isinstance(state.path_dropped, Tensor):
        ran = ran & ~state.path_dropped[:, None]
    return ran[:, None, :, None]


def choose_tokens(share: float, grid: tuple[int, int, int], x: Tensor, generator: Generators) -> Tensor:
    """(B, K) indices, rising, into the tokens of a frame of x (B, T, S, D): all but `share` of the patches, at least
    one, and whatever comes after the patches."""
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
