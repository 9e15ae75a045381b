"""Prunes a block's modules to the heads, MLP channels and tokens that its routers select (stdit.models.dynamic).

B           batch
T, S        frames, tokens of a frame
D           hidden size
H           heads, and channel groups of the MLP
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

# Bytes of pruned weights cached ahead of sampling; for larger models as many as the model itself has.
MIN_CACHE_BYTES = 256 * 2**20


class RouterMask(NamedTuple):
    """1 for what is selected, else 0: heads, heads_temp (B or 1, H), groups (B or 1, 1, 1, inner channels). None:
    all."""

    heads: Tensor | None = None
    heads_temp: Tensor | None = None
    groups: Tensor | None = None


class BlockModules(NamedTuple):
    """The modules of a block that can be pruned, full or pruned."""

    attn: Attention
    attn_temp: Attention | None
    mlp: Mlp | SwiGLU


def prune(modules: BlockModules, mask: RouterMask) -> BlockModules | None:
    """`modules` with the weights of the selected heads and channels only; mask: one for all samples.

    None where a layer is more than its weights (LoRA, offloading, casting, ZeRO-3); mask its output instead.
    """
    assert mask.heads is not None
    assert mask.groups is not None
    layers = [modules.attn.qkv, modules.attn.proj, *_linears(modules.mlp)]
    if modules.attn_temp is not None:
        layers += [modules.attn_temp.qkv, modules.attn_temp.proj]
    wrapped = any("forward" in module.__dict__ for module in modules if module is not None)
    if wrapped or not all(map(is_bare, layers)):
        return None
    groups = mask.groups.view(modules.attn.num_heads, -1)[:, 0]  # as many groups as heads; channels share their group's
    temp = modules.attn_temp
    if temp is not None and mask.heads_temp is not None:
        temp = _prune_attention(temp, mask.heads_temp[0])
    return BlockModules(_prune_attention(modules.attn, mask.heads[0]), temp, _prune_mlp(modules.mlp, groups))


def prune_ahead(blocks: Sequence[tuple[BlockModules, RouterMask]]) -> list[list[BlockModules | None]]:
    """Each block's pruned modules at each of N timesteps, from its modules and masks (N, …).

    Equal masks share modules. None beyond `_cache_limit`: the block then prunes when it runs.
    """
    cache: dict[tuple[int, bytes], BlockModules | None] = {}
    steps, used, limit = [], 0, _cache_limit([modules for modules, _ in blocks])
    on_host = _on_host([masks for _, masks in blocks])
    count = max(0 if masks.heads is None else len(masks.heads) for masks in on_host)
    for number in range(count):
        step: list[BlockModules | None] = []
        for i, ((modules, _), masks) in enumerate(zip(blocks, on_host, strict=True)):
            mask = RouterMask(*(m if m is None else m[number : number + 1] for m in masks))
            key = i, b"".join(m.numpy().tobytes() for m in mask if m is not None)
            if key not in cache and used < limit:
                cache[key] = pruned = prune(modules, mask)
                used += 0 if pruned is None else _own_bytes(pruned, modules)
            step.append(cache.get(key))
        steps.append(step)
    return steps


def _on_host(masks: Sequence[RouterMask]) -> list[RouterMask]:
    """The same as bools on the host, with one synchronisation."""
    present = [m > 0 for mask in masks for m in mask if m is not None]
    if not present:
        return list(masks)
    joined = torch.cat([m.flatten(1).to(present[0].device) for m in present], dim=1).cpu()
    pieces = iter(joined.split([m[0].numel() for m in present], dim=1))
    return [RouterMask(*(m if m is None else next(pieces).reshape(m.shape) for m in mask)) for mask in masks]


def _cache_limit(blocks: Sequence[BlockModules]) -> int:
    own = sum(p.nbytes for modules in blocks for m in modules if m is not None for p in m.parameters())
    return max(MIN_CACHE_BYTES, own)


def _own_bytes(pruned: BlockModules, modules: BlockModules) -> int:
    """Bytes of the weights that `pruned` does not share with `modules`."""
    own, shared = ([p for m in some if m is not None for p in m.parameters()] for some in (pruned, modules))
    return sum(p.nbytes for p in {id(p): p for p in own}.values() if all(p is not other for other in shared))


def _linears(mlp: Mlp | SwiGLU) -> tuple[nn.Linear, nn.Linear]:
    return (mlp.w12, mlp.w3) if isinstance(mlp, SwiGLU) else (mlp.fc1, mlp.fc2)


def is_bare(layer: nn.Module) -> bool:
    """Whether calling `layer` is its matrix product and nothing else: an nn.Linear without hooks of torch, accelerate
    or diffusers, whose forward is torch's or one marked `is_linear` (stdit.ops.onednn), and whose weight is present
    (ZeRO-3 leaves (0,) between calls)."""
    if type(layer) is not nn.Linear:
        return False
    own = layer.__dict__.get("forward")
    replaced = own is not None and not getattr(own, "is_linear", False)
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    hooked = hooked or hasattr(layer, "_hf_hook") or hasattr(layer, "_diffusers_hook")
    return not (replaced or hooked) and layer.weight.ndim == 2 and not layer.weight.is_meta


def _shallow_copy(module: Any) -> Any:
    """A shallow copy whose submodules can be replaced without changing `module`."""
    pruned = copy.copy(module)
    pruned.__dict__["_modules"] = dict(module._modules)
    if "forward" in module.__dict__:  # bound to `module`
        pruned.forward = MethodType(module.forward.__func__, pruned)
    return pruned


def _prune_linear(layer: nn.Linear, indices: Tensor, groups: int, stacked: int | None) -> nn.Linear:
    """`layer` with the groups `indices` (indices): groups of rows in each of `stacked` equal matrices, or of columns
    (None). Copying by groups is five times as fast as by columns."""
    weight, bias = layer.weight, layer.bias
    indices = indices.to(weight.device)
    if stacked is None:
        weight = weight.unflatten(1, (groups, -1)).index_select(1, indices).flatten(1)
    else:
        weight, bias = (
            None if p is None else p.unflatten(0, (stacked, groups, -1)).index_select(1, indices).flatten(0, 2)
            for p in (weight, bias)
        )
    pruned = _shallow_copy(layer)
    pruned.__dict__["_parameters"] = {
        name: None if p is None else nn.Parameter(p, requires_grad=False)
        for name, p in (("weight", weight), ("bias", bias))
    }
    pruned.out_features, pruned.in_features = pruned.weight.shape
    return pruned


def _prune_attention(attn: Attention, heads: Tensor) -> Attention:
    """`attn` with the heads that are on, (H,)."""
    indices = heads.nonzero().flatten()
    if len(indices) == len(heads):
        return attn
    pruned = _shallow_copy(attn)
    pruned.num_heads = len(indices)
    pruned.qkv = _prune_linear(attn.qkv, indices, len(heads), stacked=3)
    pruned.proj = _prune_linear(attn.proj, indices, len(heads), stacked=None)
    return pruned


def _prune_mlp(mlp: Mlp | SwiGLU, groups: Tensor) -> Mlp | SwiGLU:
    """`mlp` with the groups of inner channels that are on, (H,)."""
    indices, count = groups.nonzero().flatten(), len(groups)
    if len(indices) == count:
        return mlp
    pruned = _shallow_copy(mlp)
    if isinstance(mlp, SwiGLU):
        pruned.w12 = _prune_linear(mlp.w12, indices, count, stacked=2)
        pruned.w3 = _prune_linear(mlp.w3, indices, count, stacked=None)
    else:
        pruned.fc1 = _prune_linear(mlp.fc1, indices, count, stacked=1)
        pruned.fc2 = _prune_linear(mlp.fc2, indices, count, stacked=None)
    return pruned


def apply_to_tokens(x: Tensor, tokens: Tensor, vectors: Sequence[Tensor | None], run: Callable[..., Tensor]) -> Tensor:
    """x (B, T, S, D) with run(…) applied to the tokens where `tokens` (B, T, S, 1) is 1; the others are unchanged.

    run(x (1, 1, n, D), *vectors (1, 1, n or 1, ·)); vectors: per-sample or per-frame modulation (B or 1, T or 1, 1, ·).
    """
    rows = tokens.flatten().nonzero().flatten()
    if len(rows) in (0, tokens.numel()):
        return run(x, *vectors) if len(rows) else x
    flat = x.flatten(0, 2)

    def per_token(vector: Tensor | None) -> Tensor | None:
        if vector is None or vector.shape[:2] == (1, 1):
            return vector
        frames = vector.expand(x.shape[0], x.shape[1], 1, -1).flatten(0, 2)
        return frames[rows // x.shape[2]][None, None]

    new = run(flat[rows][None, None], *map(per_token, vectors))
    return flat.index_copy(0, rows, new[0, 0]).view_as(x)
