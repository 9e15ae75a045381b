"""Packed sequences: clips of several shapes in one forward pass, their tokens in one row, each attending to its own
clip alone (Krell et al. 2021; Dehghani et al. 2023, NaViT, section 2.1).

B, T, S     clips, frames and tokens of a frame of one part, whose clips have equal shapes
N           tokens of all parts: the sum of B T S
R           rows of modulation: a clip's, or one for each of its frames
D           hidden size

Embedding and unpatchifying go part by part, by the part's own grid. Between them the tokens are (1, N, 1, D), as N
frames of one token: a block runs as it is, with modulation and positions by token. What attends to what are diagonal
blocks (block_diagonal.py): clips in full attention, frames in attention within them, positions of a clip in attention
over time, a clip and its caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stdit.models.block_diagonal import BlockDiagonal, Run, block_diagonal
from stdit.models.blocks import BlockState, ModulationInput, PackedBlocks
from stdit.models.checks import check_inputs
from stdit.models.conditioning import ConditionInputs, Conditions, embed_conditions
from stdit.models.dynamic import Generators
from stdit.models.embeddings import unpatchify
from stdit.models.positions import Grid, PositionEmbeddings, Rope

if TYPE_CHECKING:
    from stdit.models.stdit import STDiT


class PackedClips(NamedTuple):
    """What `STDiT.forward` takes in place of latents: for each part, clips of one shape, its arguments by name
    (hidden_states, conditions, generator). The timestep is a number, (1,), or one for each clip of all parts, in their
    order."""

    parts: Sequence[Mapping[str, Any]]


class Part(NamedTuple):
    """One part, embedded: tokens (B, T, S, D), its grid and latents' size, factors of drop path (depth, 3, B, 1, 1,
    1)."""

    x: Tensor
    grid: Grid
    size: torch.Size
    conditions: Conditions
    positions: PositionEmbeddings
    drop_path: Tensor | None


def packed_forward(model: STDiT, clips: PackedClips, timestep: Tensor | float) -> list[Tensor]:
    """The prediction (B, C, T, H, W) for each part, as `model` gives it for the part alone.

    ValueError: an architecture or setting that cannot be packed; inputs as forward's.
    """
    model.settings.check_packing()
    if model.sequence_parallel is not None or model.token_routing is not None:
        raise ValueError("packed sequences go neither with sequence parallelism nor with token routing")
    timesteps = _split(timestep, [len(part["hidden_states"]) for part in clips.parts])
    parts = [_embed(model, timestep=t, **part) for t, part in zip(timesteps, clips.parts, strict=True)]
    x = torch.cat([part.x.flatten(0, 2) for part in parts])[None, :, None]  # (1, N, 1, D)
    rows = _rows(parts)
    for hidden, _ in model.run_blocks(x, _text(parts), _block_states(model, parts, rows)):
        x = hidden
    embedding = torch.cat([_by_row(part.conditions.embedding, part) for part in parts])[rows]
    x = model.final_layer(x, embedding[None])[0, :, 0]  # (N, pt ph pw C)
    return [
        unpatchify(own.unflatten(0, (len(part.x), -1)), part.grid, model.patch_size, part.size)
        for own, part in zip(x.split([_tokens(part) for part in parts]), parts, strict=True)
    ]


def _embed(
    model: STDiT, hidden_states: Tensor, timestep: Tensor | float, generator: Generators = None, **conditions: Any
) -> Part:
    """conditions: as ConditionInputs, which are STDiT.forward's arguments."""
    inputs = ConditionInputs(timestep, **conditions)
    grid = check_inputs(model.settings, hidden_states, inputs)
    x, positions = model.embed_latents(hidden_states, grid, inputs.added_cond_kwargs)
    embedded = embed_conditions(model, inputs, x.device, x.dtype)
    return Part(x, grid, hidden_states.shape[2:], embedded, positions, model.drop_path_factors(x, generator))


def _split(timestep: Tensor | float, counts: list[int]) -> list[Tensor | float]:
    """The timesteps of each part. ValueError: not as many as there are clips."""
    if not isinstance(timestep, Tensor) or timestep.numel() == 1:
        return [timestep] * len(counts)
    if timestep.shape != (sum(counts),):
        raise ValueError(
            f"timestep has shape {tuple(timestep.shape)}; {sum(counts)} clips are packed, expected ({sum(counts)},)"
        )
    return list(timestep.split(counts))


def _tokens(part: Part) -> int:
    return part.x.shape[:3].numel()


# ---------------------------------------------------------------------------------- by row, by token


def _by_row(vectors: Tensor, part: Part) -> Tensor:
    """(B or 1, T or 1, D) -> (R, D): one for each clip, or each of its frames."""
    return vectors.expand(len(part.x), -1, -1).flatten(0, 1)


def _rows(parts: Sequence[Part]) -> Tensor:
    """The row of each token, (N,)."""
    found, first = [], 0
    for part in parts:
        (b, t, s, _), frames = part.x.shape, part.conditions.embedding.shape[1]
        rows = torch.arange(first, first + b * frames, device=part.x.device)
        found.append(rows.view(b, frames, 1).expand(b, t, s).flatten())
        first += b * frames
    return torch.cat(found)


def _by_token(part: Part, table: Tensor, frames: int, tokens: int) -> Tensor:
    """A table of `frames` (T or 1) times `tokens` (S or 1) entries -> one for each token of the part, (B T S, …)."""
    b, t, s, _ = part.x.shape
    entries = table.shape[1:]
    return table.view(1, frames, tokens, *entries).expand(b, t, s, *entries).flatten(0, 2)


def _positions(model: STDiT, parts: Sequence[Part]) -> PositionEmbeddings:
    """What the attentions need of positions, by token: temporal (N, D), rotations (N, 1, d/2)."""
    c = model.settings

    def joined(take: Callable[[Part], Tensor | None], over: str) -> Tensor | None:
        tables = []
        for part in parts:
            if (table := take(part)) is None:
                return None
            t, s = part.x.shape[1:3]
            tables.append(_by_token(part, table, *{"time": (t, 1), "frame": (1, s), "clip": (t, s)}[over]))
        return torch.cat(tables)

    def rope(take: Callable[[PositionEmbeddings], Rope | None], over: str) -> Rope | None:
        cos, sin = (joined(lambda part, i=i: (found := take(part.positions)) and found[i], over) for i in (0, 1))
        return None if cos is None or sin is None else Rope(cos, sin)

    def temporal(part: Part) -> Tensor | None:
        table = part.positions.temporal
        # On the residual stream, a single frame gets none (STDiTBlock.add_temporal_positions).
        alone = c.temporal_position_injection == "residual" and part.grid[0] == 1
        return torch.zeros_like(table) if table is not None and alone else table

    full = c.attention == "full"
    return PositionEmbeddings(
        None,
        None if full else joined(temporal, "time"),  # full: already added
        rope(lambda p: p.rope, "clip" if full else "frame"),
        rope(lambda p: p.rope_temp, "time"),
    )


# ------------------------------------------------------------------------------------------ blocks


def _block_states(model: STDiT, parts: Sequence[Part], rows: Tensor) -> list[BlockState]:
    """The inputs of each block, for tokens (1, N, 1, D)."""
    video = None
    if parts[0].conditions.modulation.video is not None:
        by_row = [_by_row(m, part) for part in parts if (m := part.conditions.modulation.video) is not None]
        video = torch.cat(by_row)[:, None]  # (R, 1, D or 6 D)
    state = BlockState(
        (len(rows), 1, 1),
        _positions(model, parts),
        ModulationInput(video, rows=rows),
        packed=_attention_blocks(model, parts),
    )
    factors = _drop_path(parts)
    if factors is None:
        return [state] * len(model.blocks)
    return [state._replace(drop_path=(own[0], own[1], own[2])) for own in factors]


def _attention_blocks(model: STDiT, parts: Sequence[Part]) -> PackedBlocks:
    spatial, temporal = [], []
    for part in parts:
        b, t, s, _ = part.x.shape
        full = model.settings.attention == "full"
        spatial.append(Run(b, t * s, t * s) if full else Run(b * t, s, s))
        temporal.append(Run(b, t, t, stride=s))
    device = parts[0].x.device
    return PackedBlocks(block_diagonal(spatial, device), block_diagonal(temporal, device), _text_blocks(parts))


def _drop_path(parts: Sequence[Part]) -> Tensor | None:
    """Factors by token, (depth, 3, 1, N, 1, 1)."""
    if parts[0].drop_path is None:
        return None
    found = [
        part.drop_path.repeat_interleave(_tokens(part) // len(part.x), 2)
        for part in parts
        if part.drop_path is not None
    ]
    return torch.cat(found, dim=2).transpose(2, 3)


def _text(parts: Sequence[Part]) -> Tensor | None:
    """The captions of all clips in a row, (1, M, D)."""
    texts = [text.expand(len(p.x), -1, -1).flatten(0, 1) for p in parts if (text := p.conditions.text) is not None]
    return torch.cat(texts)[None] if texts else None


def _text_blocks(parts: Sequence[Part]) -> BlockDiagonal | None:
    """Each clip's tokens and its own caption; padding is masked."""
    runs, masks = [], []
    for part in parts:
        if (text := part.conditions.text) is None:
            return None
        (b, t, s, _), length, mask = part.x.shape, text.shape[1], part.conditions.mask
        runs.append(Run(b, t * s, length))
        if mask is None:
            mask = torch.ones(1, length, dtype=torch.bool, device=part.x.device)
        masks.append(mask.reshape(-1, length).expand(b, -1).flatten())
    padded = any(part.conditions.mask is not None for part in parts)
    return block_diagonal(runs, parts[0].x.device, torch.cat(masks) if padded else None)
