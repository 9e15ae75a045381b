"""Muon (Jordan et al. 2024) for the matrices of the blocks, AdamW for all other weights, under any ZeRO stage.

Muon's step is the momentum with all its singular values brought near 1, which takes the whole matrix; ZeRO gives the
optimizer flat partitions. Momentum is kept in the partitions, as AdamW's moments are; at each step every matrix goes to
one rank (`ZeroLayout`), which orthogonalises it and sends the parts back. A rank sends and receives as many numbers as
it holds, twice, and the products are divided between the ranks. Without ZeRO every rank does all of them.

DeepSpeed's own Muon is not used: it orthogonalises before gradients are clipped, so that clipping scales the step,
takes the rows of q, k and v as one matrix, and treats adaLN's and the final layer's matrices as hidden ones.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stdit.models.attention import Attention, CrossAttention
from stdit.models.mlp import Mlp, SwiGLU
from stdit.training.snapshot import Fragment

# Odd quintic polynomials a x + b x³ + c x⁵, each the nearest to 1 on the range where the one before leaves singular
# values of 0.003 to 1 (Amsel et al. 2025, Polar Express): they end within 0.78 and 1.20, Jordan's five steps within
# 0.68 and 1.20. Beyond 1 they diverge; values are kept 1 % below their ranges' ends, which is more than bfloat16
# rounds.
MARGIN = 1.01
POLYNOMIALS = (
    (8.3837, -24.7659, 18.3571),
    (4.0034, -2.9228, 0.5419),
    (3.4709, -2.5494, 0.5002),
    (2.4654, -1.7804, 0.4156),
)
# Linear layers whose rows are several matrices: queries, keys and values; a gate and what it multiplies.
FUSED = {"qkv": 3, "kv_linear": 2, "w12": 2}


def hidden_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The weights that Muon trains, with the number of matrices in their rows: attention and MLPs of the blocks. Not
    modulation, embeddings, routers and the final layer, whose inputs or outputs are no hidden features."""
    found: dict[nn.Parameter, int] = {}
    for name, module in model.named_modules():
        if "blocks" in name.split(".") and isinstance(module, Attention | CrossAttention | Mlp | SwiGLU):
            for child, layer in module.named_children():
                if isinstance(layer, nn.Linear) and layer.weight.requires_grad:
                    found[cast(nn.Parameter, layer.weight)] = FUSED.get(child, 1)
    return found


@torch.no_grad()
def orthogonalize(matrices: Tensor) -> Tensor:
    """(N, rows, columns) -> U Vᵀ of each one's singular value decomposition, nearly, in float32 (bfloat16 products on
    CUDA).

    Scaled by 0.2 √max(rows, columns), which gives entries the root mean square of AdamW's steps, so that its learning
    rates and weight decays hold (Liu et al. 2025, section 2.2).
    """
    rows, columns = matrices.shape[1:]
    x = matrices.mT if rows > columns else matrices
    x = x / (MARGIN * x.norm(dim=(1, 2), keepdim=True)).clamp_min(1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    return x.float() * (0.2 * math.sqrt(max(rows, columns)))


class Piece(NamedTuple):
    """Elements [start, start + numel) of a matrix, flattened, at `offset` of a rank's partition."""

    matrix: int
    start: int
    offset: int
    numel: int


class ZeroLayout:
    """Where the matrices of one flat partition are, on every rank, and which rank orthogonalises each.

    shapes: (rows, columns) of the matrices. pieces: of every rank. The same on every rank; each call is collective.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], pieces: Sequence[Sequence[Piece]], rank: int) -> None:
        self.shapes, self.rank = shapes, rank
        loads = [0] * len(pieces)
        owners = [0] * len(shapes)
        # The costliest first, each to the rank with the least to do.
        for i in sorted(range(len(shapes)), key=lambda i: (-math.prod(shapes[i]) * min(shapes[i]), i)):
            owners[i] = loads.index(min(loads))
            loads[owners[i]] += math.prod(shapes[i]) * min(shapes[i])
        self.owned = [i for i, owner in enumerate(owners) if owner == rank]
        # By rank: what this rank sends to it, and what it gets from it.
        self.sent = [[p for p in pieces[rank] if owners[p.matrix] == other] for other in range(len(pieces))]
        self.received = [[p for p in theirs if owners[p.matrix] == rank] for theirs in pieces]

    def orthogonalize(self, update: Tensor, device: torch.device) -> Tensor:
        """This rank's flat partition of matrices -> the same of the orthogonalised ones; 0 where there is no matrix."""
        sent = [p for to in self.sent for p in to]
        outgoing = _concatenate([update[p.offset : p.offset + p.numel] for p in sent], update).to(device)
        incoming = self._exchange(outgoing, self.sent, self.received)
        matrices = {i: incoming.new_empty(math.prod(self.shapes[i])) for i in self.owned}
        received = [p for source in self.received for p in source]
        for piece, values in zip(received, incoming.split([p.numel for p in received]), strict=True):
            matrices[piece.matrix][piece.start : piece.start + piece.numel] = values
        done = _orthogonalize_all({i: flat.view(self.shapes[i]) for i, flat in matrices.items()})
        back = _concatenate([done[p.matrix].reshape(-1)[p.start : p.start + p.numel] for p in received], incoming)
        returned = self._exchange(back, self.received, self.sent).to(update.device)
        result = torch.zeros_like(update)
        for piece, values in zip(sent, returned.split([p.numel for p in sent]), strict=True):
            result[piece.offset : piece.offset + piece.numel] = values
        return result

    @staticmethod
    def _exchange(values: Tensor, sent: list[list[Piece]], received: list[list[Piece]]) -> Tensor:
        """`values`, in the order of `sent`, to the ranks they are for; returns those of `received`."""
        if len(sent) == 1:
            return values
        outgoing, incoming = ([sum(p.numel for p in pieces) for pieces in both] for both in (sent, received))
        result = values.new_empty(sum(incoming))
        dist.all_to_all_single(result, values, incoming, outgoing)
        return result


class Muon(torch.optim.AdamW):
    """AdamW for the groups without `parts`; Muon for those with: the number of matrices in each of their parameters'
    rows.

    `layouts` by id of a flat partition is set under ZeRO; without, the group's parameters are whole.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, **adamw: Any) -> None:
        self.momentum = momentum
        self.layouts: dict[int, ZeroLayout] = {}
        self.device = torch.device("cpu")
        super().__init__(groups, **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = self.param_groups
        self.param_groups = [group for group in groups if "parts" not in group]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if "parts" in group:
                self._muon_step(group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        updates: dict[int, Tensor] = {}
        parameters = [p for p in group["params"] if p.grad is not None]
        for p in parameters:
            state = self.state[p]
            if not state:
                state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(p)
            state["step"] += 1
            # Checkpoints in DeepSpeed's universal form have both of Adam's moments: the second is the first, once in
            # memory.
            state["exp_avg_sq"] = state["exp_avg"]
            state["exp_avg"].lerp_(p.grad, 1 - self.momentum)
            updates[id(p)] = p.grad.lerp(state["exp_avg"], self.momentum)  # Nesterov's
        if self.layouts:
            steps = {id(p): self.layouts[id(p)].orthogonalize(updates[id(p)], self.device) for p in parameters}
        else:
            steps = self._whole(group, parameters, updates)
        for p in parameters:
            p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(steps[id(p)], alpha=group["lr"])

    @staticmethod
    def _whole(group: dict[str, Any], parameters: list[Tensor], updates: dict[int, Tensor]) -> dict[int, Tensor]:
        """Steps of parameters that are not partitioned, by id."""
        parts = {id(p): count for p, count in zip(group["params"], group["parts"], strict=True)}
        done = _orthogonalize_all(
            {(key, i): part for key, x in updates.items() for i, part in enumerate(x.chunk(parts[key]))}
        )
        return {id(p): torch.cat([done[id(p), i] for i in range(parts[id(p)])]) for p in parameters}


def _concatenate(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat(parts) if parts else like.new_empty(0)


def _orthogonalize_all(matrices: dict[Any, Tensor]) -> dict[Any, Tensor]:
    """`orthogonalize` of each; those of one shape (or of its transpose) in one call."""
    shapes: dict[tuple[int, int], list[Any]] = defaultdict(list)
    for key, matrix in matrices.items():
        shapes[cast(tuple[int, int], tuple(matrix.shape))].append(key)
    return {
        key: step
        for keys in shapes.values()
        for key, step in zip(keys, orthogonalize(torch.stack([matrices[key] for key in keys])), strict=True)
    }


def set_zero_layouts(
    optimizer: Muon,
    zero: Any,
    partitions: list[Tensor],
    stage: int,
    groups: list[list[nn.Parameter]],
    device: torch.device,
) -> None:
    """Finds the matrices in DeepSpeed's flat partitions. Collective; after `deepspeed.initialize`.

    zero: DeepSpeed's optimizer. partitions: its flat ones of the master weights. groups: parameters of each of
    `optimizer`'s groups, as they were given to it. device: that of the exchange and the products, also where the
    partitions are offloaded.
    """
    optimizer.device = device
    rank, size = dist.get_rank(), dist.get_world_size()
    group, group_parts = next((i, g["parts"]) for i, g in enumerate(optimizer.param_groups) if "parts" in g)
    shapes: dict[int, list[tuple[int, int]]] = defaultdict(list)
    mine: dict[int, list[Piece]] = defaultdict(list)
    for p, parts in zip(groups[group], group_parts, strict=True):
        rows, columns = tuple(cast(Any, p).ds_shape if stage == 3 else p.shape)
        partition, start, offset, count = zero3_fragment(zero, p, rank) if stage == 3 else zero12_fragment(group, p)
        numel = rows // parts * columns
        for part in range(parts):
            # The overlap of [start, start + count) with this part's elements.
            first, last = max(start, part * numel), min(start + count, (part + 1) * numel)
            if first < last:
                index = len(shapes[partition])
                mine[partition].append(Piece(index, first - part * numel, offset + first - start, last - first))
            shapes[partition].append((rows // parts, columns))
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, dict(mine))
    optimizer.layouts = {
        id(partitions[i]): ZeroLayout(shapes[i], [theirs.get(i, []) for theirs in everyone], rank) for i in shapes
    }


def zero3_fragment(zero: Any, p: Any, rank: int) -> Fragment:
    """The part of parameter `p` that a rank has; `master` is the number of ZeRO's flat partition."""
    partition, offset, length = zero.grad_position[zero.get_param_id(p)]
    start = rank * length
    return Fragment(partition, start, offset, max(0, min(length, p.ds_numel - start)))


def zero12_fragment(group: int, p: Any) -> Fragment:
    """As `zero3_fragment`, on this rank, of a parameter in optimizer group `group`."""
    mapping = p._hp_mapping
    if mapping is None:
        return Fragment(group, 0, 0, 0)
    ours, flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    return Fragment(group, ours.start, flat.start, flat.numel)
