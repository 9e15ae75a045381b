"""A block's parts cut down to what is chosen of them: heads, groups of the MLP's channels, tokens (stdit.models.dynamic).

B batch · (T, S) tokens · D hidden size · H heads, and groups
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stdit.models.attention import Attention
from stdit.models.mlp import Mlp, SwiGLU

# Bytes of weights that are cut down ahead of sampling in any case; of larger models as many as they have themselves.
AHEAD = 256 * 2**20


class Chosen(NamedTuple):
    """1 where a part runs, else 0: heads, heads_temp (B or 1, H), groups (B or 1, 1, 1, inner channels). None: all do."""

    heads: Tensor | None = None
    heads_temp: Tensor | None = None
    groups: Tensor | None = None


class Parts(NamedTuple):
    """The parts of a block that may run in part; cut down to what is chosen, or whole."""

    attn: Attention
    attn_temp: Attention | None
    mlp: Mlp | SwiGLU


def cut(whole: Parts, chosen: Chosen) -> Parts | None:
    """`whole` with the chosen heads' and channels' weights alone, chosen being one choice for all samples.

    None where a layer is more than its weights (LoRA, offloading, casting, ZeRO-3): its masked output is then exact.
    """
    assert chosen.heads is not None
    assert chosen.groups is not None
    layers = [whole.attn.qkv, whole.attn.proj, *_linears(whole.mlp)]
    if whole.attn_temp is not None:
        layers += [whole.attn_temp.qkv, whole.attn_temp.proj]
    wrapped = any("forward" in part.__dict__ for part in whole if part is not None)
    if wrapped or not all(map(is_bare, layers)):
        return None
    groups = chosen.groups.view(whole.attn.num_heads, -1)[:, 0]  # as many as heads; each channel has its group's
    temp = whole.attn_temp
    if temp is not None and chosen.heads_temp is not None:
        temp = _cut_attention(temp, chosen.heads_temp[0])
    return Parts(_cut_attention(whole.attn, chosen.heads[0]), temp, _cut_mlp(whole.mlp, groups))


def cut_ahead(blocks: Sequence[tuple[Parts, Chosen]]) -> list[list[Parts | None]]:
    """Every block's parts at each of N times, of what is chosen at all of them, as long as they take no more than
    `_limit` allows; equal choices share theirs. None: too many by now, they are cut when they are needed."""
    made: dict[tuple[int, bytes], Parts | None] = {}
    steps, held, limit = [], 0, _limit([whole for whole, _ in blocks])
    on_host = _on_host([every for _, every in blocks])
    times = max(0 if every.heads is None else len(every.heads) for every in on_host)
    for number in range(times):
        step: list[Parts | None] = []
        for i, ((whole, _), every) in enumerate(zip(blocks, on_host, strict=True)):
            chosen = Chosen(*(c if c is None else c[number : number + 1] for c in every))
            key = i, b"".join(c.numpy().tobytes() for c in chosen if c is not None)
            if key not in made and held < limit:
                made[key] = parts = cut(whole, chosen)
                held += 0 if parts is None else _bytes(parts, whole)
            step.append(made.get(key))
        steps.append(step)
    return steps


def _on_host(choices: Sequence[Chosen]) -> list[Chosen]:
    """The same as bools on the host, for which the device is waited for once."""
    some = [c > 0 for every in choices for c in every if c is not None]
    if not some:
        return list(choices)
    joined = torch.cat([c.flatten(1).to(some[0].device) for c in some], dim=1).cpu()
    parts = iter(joined.split([c[0].numel() for c in some], dim=1))
    return [Chosen(*(c if c is None else next(parts).reshape(c.shape) for c in every)) for every in choices]


def _limit(wholes: Sequence[Parts]) -> int:
    return max(AHEAD, sum(p.nbytes for parts in wholes for m in parts if m is not None for p in m.parameters()))


def _bytes(parts: Parts, whole: Parts) -> int:
    """What the weights take that `parts` does not share with `whole`."""
    own, shared = ([p for m in some if m is not None for p in m.parameters()] for some in (parts, whole))
    return sum(p.nbytes for p in {id(p): p for p in own}.values() if all(p is not other for other in shared))


def _linears(mlp: Mlp | SwiGLU) -> tuple[nn.Linear, nn.Linear]:
    return (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLU) else (mlp.fc1, mlp.fc2)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling `layer` is its weight's product and nothing else: an nn.Linear without hooks of torch, accelerate
    or diffusers, whose forward is torch's or one marked `is_linear` (stdit.ops.onednn), and whose weight is there
    (ZeRO-3 leaves (0,) between calls)."""
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__.get("forward")
    replaced = own is not None and not getattr(own, "is_linear", False)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    hooked = hooked or hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook")
    return not (replaced or hooked) and layer.weight.ndim == 2 and not layer.weight.is_meta


def _like(module: Any) -> Any:
    """A shallow copy whose submodules may be replaced without a change to `module`."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    if "forward" in module.__dict__:  # is bound to `module`
        made.forward = MethodType(module.forward.__func__, made)
    return made


def _cut_linear(layer: nn.Linear, kept: Tensor, groups: int, stacked: int | None) -> nn.Linear:
    """`layer` with `kept` of its groups, which are not trained: groups of rows, in each of `stacked` equal matrices; of
    columns where that is None. Whole groups are copied, which is five times as fast as column by column."""
    weight, bias = layer.weight, layer.bias
    kept = kept.to(weight.device)
    if stacked is None:
        weight = weight.unflatten(1, (groups, -1)).index_select(1, kept).flatten(1)
    else:
        weight, bias = (
            None if p is None else p.unflatten(0, (stacked, groups, -1)).index_select(1, kept).flatten(0, 2)
            for p in (weight, bias)
        )
    made = _like(layer)
    made.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(p, requires_grad=False)
        for name, p in (("weight", weight), ("bias", bias))
    }
    made.out_features, made.in_features = made.weight.shape
    return made


def _cut_attention(attn: Attention, heads: Tensor) -> Attention:
    """`attn` with those heads that are on, (H,)."""
    kept = heads.nonzero().flatten()
    if len(kept) == len(heads):
        return attn
    made = _like(attn)
    made.num_heads = len(kept)
    made.qkv = _cut_linear(attn.qkv, kept, len(heads), stacked=3)
    made.proj = _cut_linear(attn.proj, kept, len(heads), stacked=None)
    return made


def _cut_mlp(mlp: Mlp | SwiGLU, groups: Tensor) -> Mlp | SwiGLU:
    """`mlp` with those groups of inner channels that are on, (H,)."""
    kept, count = groups.nonzero().flatten(), len(groups)
    if len(kept) == count:
        return mlp
    made = _like(mlp)
    if isinstance(mlp, SwiGLU):
        made.w12 = _cut_linear(mlp.w12, kept, count, stacked=2)
        made.w3 = _cut_linear(mlp.w3, kept, count, stacked=None)
    else:
        made.fc1 = _cut_linear(mlp.fc1, kept, count, stacked=1)
        made.fc2 = _cut_linear(mlp.fc2, kept, count, stacked=None)
    return made


def for_some(x: Tensor, tokens: Tensor, vectors: Sequence[Tensor | None], run: Callable[..., Tensor]) -> Tensor:
    """x (B, T, S, D) with those tokens replaced by run(…) where `tokens` (B, T, S, 1) is 1; the others stay as they are.

    run(x (1, 1, n, D), *vectors (1, 1, n or 1, ·)); vectors: (B or 1, T or 1, 1, ·), what each token is told.
    """
    rows = tokens.flatten().nonzero().flatten()
    if len(rows) in (0, tokens.numel()):
        return run(x, *vectors) if len(rows) else x
    flat = x.flatten(0, 2)

    def told(vector: Tensor | None) -> Tensor | None:
        if vector is None or vector.shape[:2] == (1, 1):
            return vector
        frames = vector.expand(x.shape[0], x.shape[1], 1, -1).flatten(0, 2)
        return frames[rows // x.shape[2]][None, None]

    new = run(flat[rows][None, None], *map(told, vectors))
    return flat.index_copy(0, rows, new[0, 0]).view_as(x)
