"""Embeds timestep, class, text and micro-conditions, and precomputes what does not change between sampling steps.

    embed_conditions        all conditions of one forward pass
    encode_static           timestep-independent conditions: once per prompt
    precompute_conditions   conditions and every block's modulation for many timesteps: once per sampling run
    append_context_tokens   in-context conditioning: timestep, class and text as tokens of every frame

B batch · N timesteps · T frames · S tokens of a frame · K in-context tokens · L text tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.models.blocks import BlockCache, ModulationInput
from stdit.models.checks import check_static
from stdit.models.dynamic import exit_depths, is_shared
from stdit.models.embeddings import ConditionEmbedding, as_vector
from stdit.models.positions import Grid, PositionEmbeddings, pad_rope
from stdit.models.pruning import prune_ahead

if TYPE_CHECKING:
    from stdit.models.stdit import STDiT


class ConditionInputs(NamedTuple):
    """What a model is conditioned on, as `STDiT.forward` takes it."""

    timestep: Tensor | float = 0.0
    encoder_hidden_states: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    pooled_projections: Tensor | None = None
    class_labels: Tensor | None = None
    drop_condition: Tensor | None = None
    added_cond_kwargs: Mapping[str, Any] | None = None
    conditioning_frames: Tensor | None = None


class StaticConditions(NamedTuple):
    """Timestep-independent conditions.

    vector (B or 1, D)    added to the timestep embedding
    embedded              class and text
    keys_values           of the text, for each block's cross-attention
    """

    vector: Tensor | None
    embedded: ConditionEmbedding
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...]


class Conditions(NamedTuple):
    """Embedded conditions at one timestep.

    embedding (B or 1, T or 1, D), SiLU'd where adaLN reads it; text (B or 1, L, D) and its mask (B, 1, 1, keys) bool;
    context_tokens (B or 1, T or 1, K, D); precomputed: caches of the blocks, final_modulation; depth: blocks that run,
    a number or one per sample (B or 1,); None: all.
    """

    embedding: Tensor
    modulation: ModulationInput
    text: Tensor | None
    mask: Tensor | None
    context_tokens: Tensor | None
    caches: tuple[BlockCache, ...] | None = None
    final_modulation: tuple[Tensor, Tensor] | None = None
    depth: Tensor | int | None = None


def embed_conditions(model: STDiT, inputs: ConditionInputs, device: torch.device, dtype: torch.dtype) -> Conditions:
    """The conditions of one forward pass."""
    vector, embedded = _embed_static(model, inputs, device, dtype)
    timesteps = as_vector(inputs.timestep, device)
    time = model.t_embedder(timesteps, dtype)  # (B or 1, D)
    clip = time[:, None]  # (B or 1, 1, D)
    frames = _clean_frames(model, clip, inputs.conditioning_frames)  # (B or 1, T or 1, D)
    if vector is not None:
        frames, clip = frames + vector[:, None], clip + vector[:, None]
    return _with_routing(model, _assemble(model, frames, clip, embedded), timesteps, time)


@torch.no_grad()
def encode_static(model: STDiT, inputs: ConditionInputs) -> StaticConditions:
    """Timestep-independent conditions (`inputs.timestep` and `.conditioning_frames` are ignored). ValueError as
    forward's."""
    check_static(model.settings, inputs)
    weight = model.x_embedder.proj.weight
    vector, embedded = _embed_static(model, inputs, weight.device, weight.dtype)
    # Text that DiT's cross-attention reads has the timestep prepended.
    static = embedded.text is not None and model.settings.conditioning != "cross_attention"
    layers = [block.cross_attn for block in model.block_list()]
    return StaticConditions(
        vector, embedded, tuple(a.keys_values(embedded.text) if a is not None and static else None for a in layers)
    )


@torch.no_grad()
def precompute_conditions(
    model: STDiT, timesteps: Tensor, static: StaticConditions, conditioning_frames: Tensor | None = None
) -> list[Conditions]:
    """`conditions` of `STDiT.forward` for each of timesteps (N,), all modulation in one matrix product per layer.

    Memory: N times every block's modulation.
    """
    weight = model.x_embedder.proj.weight
    vector, embedded, keys_values = static
    time = model.t_embedder(timesteps.to(weight.device), weight.dtype)
    clip = time[:, None, None]  # (N, 1, 1, D)
    frames = _clean_frames(model, clip, conditioning_frames)  # (N, B or 1, T or 1, D)
    if vector is not None:
        frames, clip = frames + vector[:, None], clip + vector[:, None]
    if model.settings.conditioning in ("in_context", "cross_attention"):  # no modulation, only tokens
        each = [_assemble(model, *pair, embedded) for pair in zip(frames, clip, strict=True)]
    else:
        each = _precompute_modulation(model, frames, clip, embedded, keys_values)
    if model.settings.dynamic_width and not model.training:
        each = _with_pruned_modules(model, each, time)
    return [_with_routing(model, *one) for one in zip(each, timesteps.split(1), time.split(1), strict=True)]


def append_context_tokens(
    x: Tensor, conditions: Conditions, positions: PositionEmbeddings, grid: Grid, full: bool
) -> tuple[Tensor, Conditions, PositionEmbeddings]:
    """Tokens (B, T, S, D) -> (B, T, S + K, D): timestep, class and text in every frame. Nothing without context tokens.

    full: attention is over all frames at once.
    """
    if conditions.context_tokens is None:
        return x, conditions, positions
    context = conditions.context_tokens.expand(x.shape[0], x.shape[1], -1, -1)
    x = torch.cat([x, context], dim=2)
    if conditions.mask is not None:
        mask = F.pad(conditions.mask, (x.shape[2] - conditions.mask.shape[-1], 0), value=True)
        conditions = conditions._replace(mask=mask)
    rope = positions.rope and pad_rope(positions.rope, grid, context.shape[2], full)
    return x, conditions, positions._replace(rope=rope)


# ------------------------------------------------------------------------------------------ parts


def _embed_static(
    model: STDiT, inputs: ConditionInputs, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor | None, ConditionEmbedding]:
    """What is added to the timestep embedding, (B or 1, D) or None, and the embedded class and text."""
    settings, added = model.settings, inputs.added_cond_kwargs or {}
    embedded = ConditionEmbedding(None, None, None)
    if model.y_embedder is not None:
        mask = None if inputs.encoder_attention_mask is None else inputs.encoder_attention_mask.bool()
        embedded = model.y_embedder(
            inputs.class_labels, inputs.encoder_hidden_states, mask, inputs.pooled_projections, inputs.drop_condition, dtype
        )  # fmt: skip
    vectors = [_embed_micro_condition(model, name, added, device, dtype) for name in settings.micro_conditions]
    if embedded.vector is not None and settings.conditioning not in ("in_context", "cross_attention"):
        vectors.append(embedded.vector)
    return (sum(vectors[1:], vectors[0]) if vectors else None), embedded


def _embed_micro_condition(
    model: STDiT, name: str, added: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """(B or 1, D). "size" is PixArt-α's: height, width and aspect ratio in a third of the channels each."""
    if name != "size":
        return model.get_submodule(f"{name}_embedder")(as_vector(added[name], device), dtype)
    height, width = (as_vector(added[n], device).float() for n in ("height", "width"))
    ratio = added.get("aspect_ratio")
    ratio = height / width if ratio is None else as_vector(ratio, device)
    size, aspect = model.get_submodule("csize_embedder"), model.get_submodule("ar_embedder")
    thirds = torch.broadcast_tensors(size(height, dtype), size(width, dtype), aspect(ratio, dtype))
    return torch.cat(thirds, dim=1)


def _clean_frames(model: STDiT, embedding: Tensor, conditioning_frames: Tensor | None) -> Tensor:
    """Timestep embedding (…, 1, 1, D), per frame that of t = 0 where conditioning_frames (B, latent frames) is True.

    A patch of several frames is clean if all of them are.
    """
    if conditioning_frames is None:
        return embedding
    patch = model.patch_size[0]
    frames = F.pad(conditioning_frames.bool(), (0, -conditioning_frames.shape[1] % patch), value=True)
    patches = frames.unflatten(1, (-1, patch)).all(2)  # (B, T)
    zero = model.t_embedder(torch.zeros(1, device=embedding.device), embedding.dtype)
    return torch.where(patches[..., None], zero, embedding)


def _assemble(model: STDiT, frames: Tensor, clip: Tensor, embedded: ConditionEmbedding) -> Conditions:
    """Conditions from the summed embedding, of each frame (B or 1, T or 1, D) and of the clip (B or 1, 1, D)."""
    c = model.settings
    if c.conditioning == "adaln_single":
        assert model.t_block is not None
        return Conditions(frames, ModulationInput(model.t_block(frames)), embedded.text, embedded.mask, None)
    if c.conditioning in ("adaln", "adaln_zero", "joint"):
        video = F.silu(frames)
        text = F.silu(clip) if c.attention == "full" else video
        return Conditions(video, ModulationInput(video, text), embedded.text, embedded.mask, None)
    tokens = frames[:, :, None]  # (B or 1, T or 1, 1, D), then class, then text
    if embedded.vector is not None:
        label = embedded.vector[:, None, None].expand(-1, tokens.shape[1], -1, -1)
        tokens = torch.cat(_same_batch(tokens, label), dim=2)
    text, mask = embedded.text, embedded.mask
    if c.conditioning == "cross_attention":
        tokens = tokens[:, 0]
        text = tokens if text is None else torch.cat(_same_batch(tokens, text), dim=1)
        mask = None if mask is None else F.pad(mask, (tokens.shape[1], 0), value=True)
        return Conditions(frames, ModulationInput(None), text, mask, None)
    if text is not None:
        tokens = torch.cat(_same_batch(tokens, text[:, None].expand(-1, tokens.shape[1], -1, -1)), dim=2)
    return Conditions(frames, ModulationInput(None), None, mask, tokens)


def _same_batch(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both expanded to the larger batch; one may be 1."""
    batch = max(a.shape[0], b.shape[0])
    return a.expand(batch, *a.shape[1:]), b.expand(batch, *b.shape[1:])


def _precompute_modulation(
    model: STDiT,
    frames: Tensor,
    clip: Tensor,
    embedded: ConditionEmbedding,
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...],
) -> list[Conditions]:
    """Conditions with every block's modulation, of embeddings (N, B or 1, T or 1, D) and (N, B or 1, 1, D)."""
    steps = len(frames)
    joined = _assemble(model, frames.flatten(0, 1), clip.flatten(0, 1), embedded)  # (N B, …)
    caches = [block.precompute(joined.modulation) for block in model.block_list()]
    final = model.final_modulation(joined.embedding)

    def at(step: int, value: Any) -> Any:
        """One timestep of tensors, or tuples of them, whose first axis is N B."""
        if isinstance(value, Tensor):
            return value.unflatten(0, (steps, -1))[step]
        return value and tuple(at(step, v) for v in value)

    return [
        joined._replace(
            embedding=at(step, joined.embedding),
            modulation=ModulationInput(*at(step, joined.modulation)),
            caches=tuple(
                BlockCache(at(step, cache.modulation), at(step, cache.text_modulation), kv)
                for cache, kv in zip(caches, keys_values, strict=True)
            ),
            final_modulation=at(step, final),
        )
        for step in range(steps)
    ]


def _with_pruned_modules(model: STDiT, each: list[Conditions], time: Tensor) -> list[Conditions]:
    """Conditions whose caches hold the modules that the routers keep at each timestep embedding (N, D)."""
    pruned = prune_ahead([(block.prunable, block.dynamic.route(time, None, None)) for block in model.block_list()])
    return [
        conditions
        if conditions.caches is None
        else conditions._replace(
            caches=tuple(cache._replace(pruned=modules) for cache, modules in zip(conditions.caches, step, strict=True))
        )
        for conditions, step in zip(each, pruned, strict=True)
    ]


def _with_routing(model: STDiT, conditions: Conditions, timesteps: Tensor, time: Tensor) -> Conditions:
    """Conditions with what dynamic compute reads: the timestep embedding (B or 1, D) and the exit depth.

    At inference one value for the batch where all timesteps (B or 1,) agree, so that only what is selected runs.
    """
    c = model.settings
    if not (c.dynamic_width or c.exit_depths):
        return conditions
    shared = not model.training and is_shared(timesteps)
    if c.dynamic_width:
        modulation = conditions.modulation._replace(time=time[:1] if shared else time)
        conditions = conditions._replace(modulation=modulation)
    if c.exit_depths:
        depth = exit_depths(c, timesteps)
        conditions = conditions._replace(depth=int(depth[0]) if shared else depth)
    return conditions
