"""The transformer block, and the final layer that maps tokens to patches.

B           batch
T, S        frames, tokens of a frame (H W patches, and in-context tokens)
L           text tokens
D           hidden size
x           tokens, (B, T, S, D)

    x = x + gate_msa attn(norm1(x))                  norm1(x) = scale_msa LayerNorm(x) + shift_msa
    x = x + gate_msa attn_temp(norm1(x))             factorized attention
    x = x + cross_attn(x, text)                      text
    x = x + gate_mlp mlp(norm2(x))                   norm2(x) = scale_mlp LayerNorm(x) + shift_mlp

`conditioning` decides where shift, scale and gate come from: adaLN-single (Chen et al. 2023, PixArt-α, section 2.3),
one network for all blocks plus each block's `scale_shift_table`; adaLN and adaLN-Zero, a network per block; in-context
and cross-attention, plain LayerNorms, with timestep and class as tokens (all three Peebles & Xie 2023, section 3.2);
joint attention, adaLN-Zero for video and for text, which meet in one attention (Esser et al. 2024, section 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from einops import rearrange
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.attention import Attention, CrossAttention
from stdit.models.block_diagonal import BlockDiagonal
from stdit.models.mlp import feed_forward
from stdit.models.positions import Grid, PositionEmbeddings
from stdit.models.pruning import BlockModules
from stdit.models.sequence_parallel import (
    TokenShards,
    all_heads,
    from_frames,
    from_heads,
    own_frames,
    own_heads,
    per_frame,
    to_frames,
    to_heads,
)

if TYPE_CHECKING:
    from stdit.models.dynamic import ComputeStats, RouterNoise

# Arguments of torch.compile. Blocks share one compiled function, so the limit, which is per function, must hold every
# variant within a model: kinds of block, one frame or several, one sample or several, shared or separate timesteps,
# with or without mask. Sizes above 1 are symbolic from the start.
COMPILE_OPTIONS: dict[str, Any] = {"fullgraph": True, "dynamic": True, "recompile_limit": 64}

# shift, 1 + scale and gate of attention, then of the MLP, each (B or 1, T or 1, 1, D); None where a block has none.
Modulation = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class ModulationInput(NamedTuple):
    """What modulation is computed from, (B or 1, T or 1, D, or 6 D for adaLN-single): for the video tokens and, in
    joint attention, for the text (per frame or for the clip). time (B or 1, D): the timestep embedding, which routers
    read. rows (N,): of packed sequences, whose `video` is (R, 1, …), the row of each token."""

    video: Tensor | None
    text: Tensor | None = None
    time: Tensor | None = None
    rows: Tensor | None = None


class BlockCache(NamedTuple):
    """What a block computes from conditions only: modulation, keys and values of the text, (B or 1, L, H, d) each, and
    with dynamic width the modules pruned to what runs at this timestep."""

    modulation: Modulation
    text_modulation: Modulation | None = None
    keys_values: tuple[Tensor, Tensor] | None = None
    pruned: BlockModules | None = None


class PackedBlocks(NamedTuple):
    """Which tokens of packed sequences attend to which: within frames (or clips, in full attention), over time, and
    each clip's to its text."""

    spatial: BlockDiagonal
    temporal: BlockDiagonal
    text: BlockDiagonal | None


class BlockState(NamedTuple):
    """A block's inputs in one forward pass, besides tokens and text.

    grid            (T, H, W) patches
    mask            (B, 1, 1, keys) bool, over the text (in-context: over the tokens of a frame)
    cache           precomputed conditions; None: the block computes them from `modulation`
    drop_path       (B, 1, 1, 1) factors of the branches attn, attn_temp and mlp, in training
    router_noise    and force_full (B,) bool, samples that skip nothing: routers in training (stdit.models.dynamic)
    residual        (B, T, S, D), added after the block: a control branch's
    active          (B or 1, 1, 1, 1) bool: samples that have not exited yet
    shards          sequence parallelism: the tokens are this rank's, S / n of each frame
    kept            (B, K) tokens of a frame that enter the block, in training; the others bypass it
    path_dropped    (B,) bool, in training: samples whose sparse blocks the mask token replaces; True: the block is not
                    run
    packed          packed sequences: x is (1, N, 1, D), positions and modulation are by token (stdit.models.packing)
    """

    grid: Grid
    positions: PositionEmbeddings
    modulation: ModulationInput
    mask: Tensor | None = None
    cache: BlockCache | None = None
    drop_path: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    router_noise: RouterNoise | None = None
    force_full: Tensor | None = None
    residual: Tensor | None = None
    active: Tensor | None = None
    shards: TokenShards | None = None
    kept: Tensor | None = None
    path_dropped: Tensor | bool = False
    packed: PackedBlocks | None = None


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, times `scale` (which includes the 1), plus shift. x (B, T, S, D)."""
    if shift.numel() == x.shape[-1]:  # shared by all tokens: as the norm's weight and bias, one kernel instead of two
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def gated_add(x: Tensor, gate: Tensor | None, y: Tensor, drop_path: Tensor | None = None) -> Tensor:
    """x + gate y. drop_path (B, 1, 1, 1): 0 for samples whose branch is dropped, else 1 / keep rate."""
    if drop_path is not None:
        gate = drop_path if gate is None else gate * drop_path
    return x + y if gate is None else torch.addcmul(x, gate, y)


class AdaLN(nn.Module):
    """Linear map of the embedding to `count` modulation vectors. Weights as published: `adaLN_modulation.1` in DiT."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        # nn.Sequential(SiLU, Linear) in DiT; the SiLU is the same for all blocks and applied once, outside.
        self.add_module("1", nn.Linear(hidden_size, count * hidden_size))

    def forward(self, embedding: Tensor) -> tuple[Tensor, ...]:
        """SiLU'd (B or 1, T or 1, D) -> `count` tensors (B or 1, T or 1, 1, D)."""
        return self.get_submodule("1")(embedding).unflatten(-1, (self.count, -1)).chunk(self.count, dim=-2)


def as_modulation(vectors: tuple[Tensor, ...]) -> Modulation:
    """Six vectors (shift, scale, gate twice), four (no gates) or two (attention's shift and scale) as a Modulation."""
    if len(vectors) == 2:
        return (vectors[0], 1 + vectors[1], None, None, None, None)
    if len(vectors) == 4:
        shift_msa, scale_msa, shift_mlp, scale_mlp = vectors
        return (shift_msa, 1 + scale_msa, None, shift_mlp, 1 + scale_mlp, None)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
    return (shift_msa, 1 + scale_msa, gate_msa, shift_mlp, 1 + scale_mlp, gate_mlp)


def per_token(modulation: Modulation, rows: Tensor | None) -> Modulation:
    """Vectors (R, 1, 1, D) for N packed tokens, (1, N, 1, D); rows (N,), the row of each token. None: as they are."""
    if rows is None:
        return modulation
    first, second, third, fourth, fifth, sixth = (m if m is None else m[:, 0][rows][None] for m in modulation)
    return (first, second, third, fourth, fifth, sixth)


class TextStream(nn.Module):
    """The text half of a joint block. In the last block the text ends: no `proj`, gates or MLP."""

    def __init__(self, config: ModelConfig, last: bool) -> None:
        super().__init__()
        width, _, heads = config.dimensions
        self.adaLN_modulation = AdaLN(width, 2 if last else 6)
        self.attn = Attention(width, heads, config.qk_norm)
        self.mlp = None if last else feed_forward(config)
        if last:
            del self.attn.proj


class STDiTBlock(nn.Module):
    """Self-attention, temporal attention, cross-attention to text, MLP; each where the config has it.

    attention="factorized": `attn` within each frame, then `attn_temp` over time at each position (Open-Sora 1.0).
    "alternating": `attn` within each frame in even blocks, over time in odd ones (Latte). "full": `attn` over all
    tokens.

    `attn_temp` shares shift, scale and gate with `attn`: with its `proj` at zero it adds nothing. With gates and
    `cross_attn.proj` at zero, as initialised, the block is the identity.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        width, depth, heads = config.dimensions
        self.full = config.attention == "full"
        self.over_time = config.attention == "alternating" and index % 2 == 1
        # The first block with temporal attention.
        self.first_in_time = index == (1 if config.attention == "alternating" else 0)
        self.eps = config.norm_eps
        self.mlp_eps = config.mlp_norm_eps or config.norm_eps

        self.norm1 = self.norm2 = self.norm_cross = self.adaLN_modulation = self.context = None
        if config.conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)
        elif config.conditioning in ("in_context", "cross_attention"):
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=self.eps), nn.LayerNorm(width, eps=self.mlp_eps)
        else:
            self.adaLN_modulation = AdaLN(width, 4 if config.conditioning == "adaln" else 6)
        if config.conditioning == "cross_attention":
            self.norm_cross = nn.LayerNorm(width, eps=self.eps)
        if config.conditioning == "joint":
            self.context = TextStream(config, last=index == depth - 1)

        spatial = not self.over_time and not self.full
        window = config.window_size if spatial and _includes(config.window_blocks, index) else None
        compress = config.kv_compress if spatial and _includes(config.kv_compress_blocks, index) else None
        sampling = config.kv_compress_sampling
        self.attn = Attention(width, heads, config.qk_norm, window, config.relative_positions, compress, sampling)
        self.attn_temp = None
        if config.attention == "factorized" and config.temporal:
            self.attn_temp = Attention(width, heads, config.qk_norm)
        self.cross_attn = CrossAttention(width, heads, config.cross_qk_norm) if config.block_text[index] else None
        self.mlp = feed_forward(config)

    # -------------------------------------------------------------------------------------- forward

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor | None, ComputeStats | None]:
        """Tokens (B, T, S, D) and text (B or 1, L, D) -> the same two (text changes in joint attention only), and what
        a dynamic block computed, in training."""
        x, text = hidden_states, encoder_hidden_states
        cache = state.cache or self.precompute(state.modulation)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = cache.modulation
        drop_attn, drop_temp, drop_mlp = state.drop_path

        if self.over_time:
            x = self.add_temporal_positions(x, state)
        y, text = self.self_attention(self.attn, self.norm_msa(x, shift_msa, scale_msa), text, state, cache)
        x = gated_add(x, gate_msa, y, drop_attn)
        if self.attn_temp is not None:
            x = self.add_temporal_positions(x, state)
            y = self.temporal_attention(self.attn_temp, self.norm_temp(x, shift_msa, scale_msa), state)
            x = gated_add(x, gate_msa, y, drop_temp)
        if self.cross_attn is not None:
            x = x + self.text_attention(x, text, state, cache)
        y = self.feed_forward(self.norm_mlp(x, shift_mlp, scale_mlp), state)
        x = gated_add(x, gate_mlp, y, drop_mlp)
        return x, text, None

    def precompute(self, modulation: ModulationInput, text: Tensor | None = None) -> BlockCache:
        """What this block computes from conditions only; keys and values where text (B or 1, L, D) is passed."""
        text_modulation = keys_values = None
        if self.context is not None:
            assert modulation.text is not None
            text_modulation = as_modulation(self.context.adaLN_modulation(modulation.text))
        if self.cross_attn is not None and text is not None:
            keys_values = self.cross_attn.keys_values(text)
        return BlockCache(per_token(self._modulation(modulation.video), modulation.rows), text_modulation, keys_values)

    def _modulation(self, video: Tensor | None) -> Modulation:
        if self.norm1 is not None:
            return (None, None, None, None, None, None)
        assert video is not None
        if self.adaLN_modulation is not None:
            return as_modulation(self.adaLN_modulation(video))
        return as_modulation((self.scale_shift_table + video.unflatten(-1, (6, -1))).chunk(6, dim=-2))

    @property
    def prunable(self) -> BlockModules:
        """The modules that dynamic width prunes."""
        return BlockModules(self.attn, self.attn_temp, self.mlp)

    # ---------------------------------------------------------------------------------------- norms

    def norm_msa(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """norm1 of the formula."""
        if self.norm1 is not None:
            return self.norm1(x)
        assert shift is not None
        assert scale is not None
        return modulate(x, shift, scale, self.eps)

    def norm_temp(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """The input of `attn_temp`: norm1(x), or x itself (Open-Sora 1.0)."""
        return self.norm_msa(x, shift, scale) if self.config.temporal_norm else x

    def norm_mlp(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        """norm2 of the formula."""
        if self.norm2 is not None:
            return self.norm2(x)
        assert shift is not None
        assert scale is not None
        return modulate(x, shift, scale, self.mlp_eps)

    # ------------------------------------------------------------------------------------ attention

    def self_attention(
        self, attn: Callable[..., Tensor], x: Tensor, text: Tensor | None, state: BlockState, cache: BlockCache
    ) -> tuple[Tensor, Tensor | None]:
        """`attn` of x (B, T, S, D), within frames, over time or over all tokens; and the text, updated if joint."""
        if self.context is not None:
            return self._joint_attention(x, text, state, cache)
        if self.over_time:
            return self.temporal_attention(attn, x, state), text
        t, shards = state.grid[0], state.shards
        if state.packed is not None:
            return attn(x.flatten(1, 2), state.positions.rope, state.packed.spatial).unflatten(1, (t, -1)), text
        mask = state.mask if self.cross_attn is None else None  # else it is the text's
        if self.full:
            if mask is not None:  # every frame has its own copy of the in-context tokens
                mask = mask.repeat(1, 1, 1, t)
            return attn(x.flatten(1, 2), state.positions.rope, mask, shards=shards).unflatten(1, (t, -1)), text
        if mask is not None:
            mask = per_frame(mask, t, shards)
        y = attn(to_frames(x, shards), state.positions.rope, mask, state.grid[1:])
        return from_frames(y, t, shards), text

    def temporal_attention(self, attn: Callable[..., Tensor], x: Tensor, state: BlockState) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D), over the frames at each of the S positions.

        Temporal positions are added here, not to the residual stream, so that `proj` at zero hides them (unless
        `temporal_position_injection` says otherwise).
        """
        where, temporal = self.config.temporal_position_injection, state.positions.temporal
        if temporal is not None and (where == "attention" or (where == "first_attention" and self.first_in_time)):
            x = x + temporal[:, None]
        mask = state.packed and state.packed.temporal
        y = attn(rearrange(x, "b t s d -> (b s) t d"), state.positions.rope_temp, mask)
        return rearrange(y, "(b s) t d -> b t s d", s=x.shape[2])

    def add_temporal_positions(self, x: Tensor, state: BlockState) -> Tensor:
        """x (B, T, S, D) with temporal positions on the residual stream, where `temporal_position_injection` says
        so."""
        temporal, injected = state.positions.temporal, self.config.temporal_position_injection == "residual"
        if not injected or not self.first_in_time or temporal is None or state.grid[0] == 1:
            return x
        return x + temporal[:, None]

    def text_attention(self, x: Tensor, text: Tensor | None, state: BlockState, cache: BlockCache) -> Tensor:
        """`cross_attn` of x (B, T, S, D) to the text -> (B, T, S, D)."""
        assert self.cross_attn is not None
        queries = x if self.norm_cross is None else self.norm_cross(x)
        mask = state.mask if state.packed is None else state.packed.text
        y = self.cross_attn(queries.flatten(1, 2), text, mask, cache.keys_values)
        return y.unflatten(1, (state.grid[0], -1))

    def _joint_attention(
        self, x: Tensor, text: Tensor | None, state: BlockState, cache: BlockCache
    ) -> tuple[Tensor, Tensor]:
        """Attention of video and text tokens to both: the video's output (gated by the caller), and the updated text.

        Factorized attention runs frame by frame, and each frame has its own copy of the text, (B T, L, D).
        """
        assert self.context is not None
        assert text is not None
        assert cache.text_modulation is not None
        t, mask, heads = state.grid[0], state.mask, self.attn.num_heads
        # Sharded by frames, with their texts, or by heads.
        by_frames, by_heads = (None, state.shards) if self.full else (state.shards, None)
        video = x.flatten(1, 2) if self.full else to_frames(x, by_frames)  # (groups, N, D)
        texts = 1 if self.full else t  # of a sample
        # Of ranks that share frames, as many may be this one's as there are samples: then the shape does not tell.
        if text.shape[0] != video.shape[0] or (by_frames is not None and self.index == 0):
            text = per_frame(text.expand(x.shape[0], -1, -1), texts, by_frames)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            self._per_text(m, x, by_frames) for m in cache.text_modulation
        )
        assert shift is not None
        assert scale is not None
        video_qkv = to_heads(self.attn.qkv_heads(video, state.positions.rope), by_heads)
        text_qkv = self.context.attn.qkv_heads(modulate(text[:, None], shift, scale, self.eps)[:, 0], None)
        q, k, v = (torch.cat(both, dim=1) for both in zip(video_qkv, own_heads(text_qkv, by_heads), strict=True))
        n, length = video_qkv[0].shape[1], text.shape[1]
        if mask is not None:
            mask = F.pad(per_frame(mask.expand(x.shape[0], -1, -1, -1), texts, by_frames), (n, 0), value=True)
        y, text_y = self.attn.processor(q, k, v, mask).split([n, length], dim=1)
        y = self.attn.proj(from_heads(y, heads, by_heads).flatten(2))
        y = y.unflatten(1, (t, -1)) if self.full else from_frames(y, t, by_frames)
        if self.context.mlp is None:
            return y, text
        text_y = all_heads(text_y, heads, by_heads).flatten(2)
        assert gate is not None
        assert shift_mlp is not None
        assert scale_mlp is not None
        text = gated_add(text[:, None], gate, self.context.attn.proj(text_y)[:, None])
        text = gated_add(text, gate_mlp, self.context.mlp(modulate(text, shift_mlp, scale_mlp, self.mlp_eps)))
        return y, text[:, 0]

    def _per_text(self, vector: Tensor | None, x: Tensor, shards: TokenShards | None) -> Tensor | None:
        """Modulation (B or 1, T or 1, 1, D) for texts (groups, 1, L, D), groups being B, or B T (of this rank)."""
        if vector is None or vector.shape[:2] == (1, 1) or self.full:
            return vector
        return own_frames(vector.expand(x.shape[0], x.shape[1], -1, -1).flatten(0, 1)[:, None], shards)

    # ----------------------------------------------------------------------------------------- mlp

    def feed_forward(self, x: Tensor, state: BlockState) -> Tensor:
        """`mlp` of x (B, T, S, D); one with a convolution within frames reads whole frames."""
        t, shards = state.grid[0], state.shards
        if shards is None or self.config.mlp != "conv2d":
            return self.mlp(x, state.grid)
        y = self.mlp(to_frames(x, shards)[:, None], (1, *state.grid[1:]))
        return from_frames(y[:, 0], t, shards)


def _includes(blocks: tuple[int, ...] | None, index: int) -> bool:
    return blocks is None or index in blocks


# diffusers' caches (FirstBlockCache and others) look up here what a block returns.
BLOCK_METADATA = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
TransformerBlockRegistry.register(STDiTBlock, BLOCK_METADATA)


class FinalLayer(nn.Module):
    """Modulated norm, and the linear map from tokens to patches."""

    def __init__(self, config: ModelConfig, outputs: int) -> None:
        super().__init__()
        width, _, _ = config.dimensions
        self.norm = self.adaLN_modulation = None
        if config.conditioning == "adaln_single":
            self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        elif config.conditioning in ("in_context", "cross_attention"):
            self.norm = nn.LayerNorm(width, eps=1e-6)
        else:
            self.adaLN_modulation = AdaLN(width, 2)
        self.linear = nn.Linear(width, outputs)

    def precompute(self, embedding: Tensor) -> tuple[Tensor, Tensor] | None:
        """shift and 1 + scale from the embedding (B or 1, T or 1, D) (SiLU'd for adaLN); None for plain norms."""
        if self.norm is not None:
            return None
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(embedding)
        else:
            shift, scale = (self.scale_shift_table + embedding[..., None, :]).chunk(2, dim=-2)
        return shift, 1 + scale

    def forward(self, x: Tensor, embedding: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, T, S, D), embedding (B or 1, T or 1, D) or its precomputed modulation -> (B, T, S, pt ph pw C)."""
        if self.norm is not None:
            return self.linear(self.norm(x))
        modulation = modulation or self.precompute(embedding)
        assert modulation is not None
        return self.linear(modulate(x, *modulation, 1e-6))
