"""Sequence parallelism: one clip's tokens over several ranks.

B batch · T frames · S tokens of a frame · D hidden size · H heads, d head width · L text tokens · n ranks of a group

Between attentions a rank has S / n tokens of every frame, (B, T, S / n, D), so that temporal attention, attention to
text, MLP and modulation run as on one rank. The other attentions exchange:

    within frames   tokens for whole frames, B T / n a rank, and back: x twice (Zhao et al. 2024, DSP)
    full            heads of queries, keys and values for all tokens, and back: four times x (Jacobs et al. 2023,
                    Ulysses)
    joint           as these; text is replicated: in full attention its heads are divided and its output gathered

What n does not divide is shared out as evenly as possible: ranks differ by at most one token, frame or head.

Gradients. Every function here is differentiated exactly, across ranks: backward gives each rank the gradient of the sum
of all ranks' losses. The ranks of a group compute the same loss, from the gathered prediction; so the mean of the
gradients over all ranks of a run, as DeepSpeed and DDP take it, is that of the mean loss, with no factor to be set
anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stdit.models.positions import PositionEmbeddings, Rope


class SequenceParallel(NamedTuple):
    """This rank among the `size` ranks that share a clip's tokens. group: the name of their process group."""

    group: str
    rank: int
    size: int


class TokenShards(NamedTuple):
    """The tokens of one forward pass, divided over a group: of `frames` frames (B T) with `tokens` tokens each (S)."""

    group: str
    rank: int
    size: int
    frames: int
    tokens: int


QKV = tuple[Tensor, Tensor, Tensor]


def share(count: int, ranks: int) -> list[int]:
    """`count` things over `ranks` ranks, the first of which have one more where it does not divide."""
    # range() makes numbers of a compiled graph's symbols: exchanges of symbolic sizes take minutes to trace.
    count, ranks = len(range(count)), len(range(ranks))
    return [count // ranks + (rank < count % ranks) for rank in range(ranks)]


# ------------------------------------------------------------------------------- a model's tokens


def shard_tokens(
    x: Tensor, positions: PositionEmbeddings, parallel: SequenceParallel | None, full: bool
) -> tuple[Tensor, PositionEmbeddings, TokenShards | None]:
    """Tokens (B, T, S, D), the same on every rank, to this rank's of each frame, and the positions of its attentions.

    full: attention is over all frames at once. ValueError: fewer tokens in a frame than ranks.
    """
    if parallel is None:
        return x, positions, None
    (group, rank, size), (batch, t, s, _) = parallel, x.shape
    if s < size:
        raise ValueError(f"a frame has {s} tokens; sequence parallelism over {size} ranks needs one for each")
    if full and positions.rope is not None:  # rotations are applied before the exchange
        cos, sin = (_own(table.unflatten(0, (t, s)), 1, parallel).flatten(0, 1) for table in positions.rope)
        positions = positions._replace(rope=Rope(cos, sin))
    # A copy, so that the whole is freed.
    return _own(x, 2, parallel).contiguous(), positions, TokenShards(group, rank, size, batch * t, s)


def own_tokens(x: Tensor, shards: TokenShards | None) -> Tensor:
    """This rank's part of (B, T, S, …), the same on every rank."""
    return x if shards is None else _own(x, 2, shards)


def gather_tokens(x: Tensor, shards: TokenShards | None) -> Tensor:
    """Every rank's tokens: (B, T, S / n, D) -> (B, T, S, D)."""
    return x if shards is None else _all_gather(x, 2, share(shards.tokens, shards.size), shards)


def mean_over_tokens(x: Tensor, shards: TokenShards | None) -> Tensor:
    """Mean of (B, T, S / n, 1) over all tokens of each sample, (B,), the same on every rank."""
    if shards is None:
        return x.mean((1, 2, 3))
    sums = _all_gather(x.sum((1, 2, 3))[None], 0, [1] * shards.size, shards)  # (n, B)
    return sums.sum(0) / (x.shape[1] * shards.tokens)


# ----------------------------------------------------------------------- attention within frames


def to_frames(x: Tensor, shards: TokenShards | None) -> Tensor:
    """Tokens (B, T, S, D) to frames (B T, S, D); sharded: this rank's tokens to its frames with all their tokens."""
    x = x.flatten(0, 1)
    if shards is None:
        return x
    frames, tokens = share(shards.frames, shards.size), share(shards.tokens, shards.size)
    return _exchange(x, 0, frames, 1, tokens, shards)


def from_frames(x: Tensor, t: int, shards: TokenShards | None) -> Tensor:
    """The inverse of `to_frames`. t: frames of a sample."""
    if shards is not None:
        frames, tokens = share(shards.frames, shards.size), share(shards.tokens, shards.size)
        x = _exchange(x, 1, tokens, 0, frames, shards)
    return x.unflatten(0, (-1, t))


def per_frame(x: Tensor, t: int, shards: TokenShards | None) -> Tensor:
    """Rows of samples (B, …) for each of their t frames, (B t, …); sharded: for this rank's frames."""
    return own_frames(x if t == 1 else x.repeat_interleave(t, 0), shards)


def own_frames(x: Tensor, shards: TokenShards | None) -> Tensor:
    """(B T, …) -> the rows of this rank's frames."""
    return x if shards is None else _own(x, 0, shards)


# -------------------------------------------------------------------------------- full attention


def to_heads(qkv: QKV, shards: TokenShards | None) -> QKV:
    """All heads of this rank's tokens, (B, T S / n, H, d), to its heads of all tokens, (B, T S, H / n, d)."""
    if shards is None:
        return qkv
    stacked = torch.stack(qkv).unflatten(2, (shards.frames // qkv[0].shape[0], -1))  # (3, B, T, S / n, H, d)
    heads, tokens = share(stacked.shape[4], shards.size), share(shards.tokens, shards.size)
    q, k, v = _exchange(stacked, 4, heads, 3, tokens, shards).flatten(2, 3).unbind(0)
    return q, k, v


def from_heads(x: Tensor, heads: int, shards: TokenShards | None) -> Tensor:
    """(B, T S, H / n, d) -> (B, T S / n, H, d), with H `heads`."""
    if shards is None:
        return x
    x = x.unflatten(1, (shards.frames // x.shape[0], -1))  # (B, T, S, H / n, d)
    tokens = share(shards.tokens, shards.size)
    return _exchange(x, 2, tokens, 3, share(heads, shards.size), shards).flatten(1, 2)


def own_heads(qkv: QKV, shards: TokenShards | None) -> QKV:
    """This rank's heads of text, (B, L, H, d), which every rank has."""
    if shards is None:
        return qkv
    q, k, v = (_own(x, 2, shards) for x in qkv)
    return q, k, v


def all_heads(x: Tensor, heads: int, shards: TokenShards | None) -> Tensor:
    """Every rank's heads of text: (B, L, H / n, d) -> (B, L, H, d), with H `heads`."""
    return x if shards is None else _all_gather(x, 2, share(heads, shards.size), shards)


# ----------------------------------------------------------------------------------- collectives


def _own(x: Tensor, dim: int, parallel: SequenceParallel | TokenShards) -> Tensor:
    return x.split(share(x.shape[dim], parallel.size), dim)[parallel.rank]


def _all_gather(x: Tensor, dim: int, sizes: Sequence[int], shards: TokenShards) -> Tensor:
    """Every rank's x, of sizes[rank] along `dim`, joined. Its backward sums all ranks' gradients of each part."""
    copies = x[None].expand(shards.size, *x.shape)
    return _exchange(copies, 0, [1] * shards.size, dim + 1, sizes, shards)[0]


def _exchange(
    x: Tensor, scatter_dim: int, scatter: Sequence[int], gather_dim: int, gather: Sequence[int], shards: TokenShards
) -> Tensor:
    """Sends scatter[i] entries of `scatter_dim` to rank i; joins what comes from rank i, gather[i] entries, along
    `gather_dim`."""
    sent = [part.reshape(-1) for part in x.split(list(scatter), scatter_dim)]
    shape = list(x.shape)
    shape[scatter_dim] = scatter[shards.rank]
    shapes = [[*shape[:gather_dim], count, *shape[gather_dim + 1 :]] for count in gather]
    sizes = [math.prod(one) for one in shapes]
    received = all_to_all(torch.cat(sent), sizes, [part.numel() for part in sent], shards.group)
    parts = [part.view(one) for part, one in zip(received.split(sizes), shapes, strict=True)]
    return torch.cat(parts, dim=gather_dim)


def all_to_all(x: Tensor, received: Sequence[int], sent: Sequence[int], group: str) -> Tensor:
    """`sent[i]` numbers of x (N,) to rank i of `group`, and `received[i]` from it. Differentiable; needs no process
    group on the meta device."""
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(x, list(received), list(sent), group))
