"""Block-diagonal attention: many short sequences in one row of tokens, each attending to itself (or to its own text)
alone.

N, M        query and key tokens of the whole row
n, m        those of one block
H, d        heads, head width

The blocks are listed as runs of equal ones, so that a run is one batched attention, as it would be unpacked: the work
is the sum of n m, and no (N, M) mask is ever built. On CUDA, in 16 bits and without padding, all blocks are one call of
torch's varlen_attn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Run(NamedTuple):
    """`groups` groups of blocks in a row, each block of `queries` queries and `keys` keys. stride: blocks of a group,
    whose tokens alternate (attention over time at S positions: frames are n, positions the stride)."""

    groups: int
    queries: int
    keys: int
    stride: int = 1


class BlockDiagonal(NamedTuple):
    """Which of N queries attend to which of M keys: the diagonal blocks of `runs`, in their order. key_mask (M,) bool:
    False for padding; None: there is none. offsets: cumulative numbers of queries and of keys before each block, and
    all, int32, for varlen kernels."""

    runs: tuple[Run, ...]
    key_mask: Tensor | None = None
    offsets: tuple[Tensor, Tensor] | None = None


def block_diagonal(runs: Iterable[Run], device: torch.device, key_mask: Tensor | None = None) -> BlockDiagonal:
    """Of runs of blocks, neighbours of equal size as one."""
    merged: list[Run] = []
    for run in runs:
        if merged and run.stride == 1 and merged[-1][1:] == run[1:]:
            merged[-1] = run._replace(groups=merged[-1].groups + run.groups)
        else:
            merged.append(run)
    offsets = None
    if device.type == "cuda":
        sizes = torch.tensor([r[1:3] for r in merged for _ in range(r.groups * r.stride)], dtype=torch.int32)
        queries, keys = torch.cat([sizes.new_zeros(1, 2), sizes.cumsum(0, dtype=torch.int32)]).unbind(1)
        offsets = queries.to(device, non_blocking=True), keys.to(device, non_blocking=True)
    return BlockDiagonal(tuple(merged), key_mask, offsets)


def attend_in_blocks(
    attend: Attend, query: Tensor, key: Tensor, value: Tensor, blocks: BlockDiagonal, varlen: bool
) -> Tensor:
    """softmax(q kᵀ / √d) v within each block: query (1, N, H, d), key and value (1, M, H, d) -> (1, N, H, d).

    attend: the attention of one run, of (B, n, H, d), (B, m, H, d) twice and a mask (B, 1, 1, m) bool or None. varlen:
    one kernel of torch's for all runs may take its place.
    """
    queries = _split(query, blocks.runs, [run.queries for run in blocks.runs])
    keys, values = (_split(x, blocks.runs, [run.keys for run in blocks.runs]) for x in (key, value))
    if varlen and blocks.offsets is not None and blocks.key_mask is None and len(blocks.runs) > 1:
        outputs = _varlen(queries, keys, values, blocks)
    else:
        masks: list[Tensor | None] = [None] * len(blocks.runs)
        if blocks.key_mask is not None:
            split = _split(blocks.key_mask[None, :, None, None], blocks.runs, [run.keys for run in blocks.runs])
            masks = [mask.transpose(1, 3) for mask in split]
        outputs = [attend(*one) for one in zip(queries, keys, values, masks, strict=True)]
    joined = [
        rearrange(y, "(b r) n h d -> (b n r) h d", r=run.stride) for y, run in zip(outputs, blocks.runs, strict=True)
    ]
    return torch.cat(joined)[None]


def _split(x: Tensor, runs: tuple[Run, ...], lengths: list[int]) -> list[Tensor]:
    """(1, N, H, d) -> for each run (its blocks, n, H, d)."""
    parts = x[0].split([run.groups * n * run.stride for run, n in zip(runs, lengths, strict=True)])
    return [
        rearrange(part, "(b n r) h d -> (b r) n h d", n=n, r=run.stride)
        for part, run, n in zip(parts, runs, lengths, strict=True)
    ]


def _varlen(queries: list[Tensor], keys: list[Tensor], values: list[Tensor], blocks: BlockDiagonal) -> list[Tensor]:
    """All runs in one kernel."""
    from torch.nn.attention.varlen import varlen_attn

    assert blocks.offsets is not None
    q, k, v = (torch.cat([x.flatten(0, 1) for x in parts]) for parts in (queries, keys, values))
    longest = max(run.queries for run in blocks.runs), max(run.keys for run in blocks.runs)
    y = varlen_attn(q, k, v, *blocks.offsets, *longest)
    assert isinstance(y, Tensor)
    return [
        part.view_as(q) for part, q in zip(y.split([q.shape[0] * q.shape[1] for q in queries]), queries, strict=True)
    ]
