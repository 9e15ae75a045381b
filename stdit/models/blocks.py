"""The transformer block, and the layer that turns tokens back into patches.

B batch · (T, H, W) grid of patches · S = H W tokens of a frame · D hidden size · L text tokens
Tokens are (B, T, S, D). A signal tells blocks the time and the class: (B or 1, T or 1, …), 1 where it is shared.

    x = x + gate_msa attn(norm1(x)) [+ gate_msa attn_temp(norm1(x))] [+ cross_attn(x, text)] + gate_mlp mlp(norm2(x))

What makes norm1, norm2 and the gates, is `conditioning`: adaLN-single (Chen et al. 2023, PixArt-α, section 2.3), where
one network makes the modulation for all blocks and each adds its own `scale_shift_table`; adaLN and adaLN-Zero, where
each block has a network of its own; in-context and cross-attention, where norms are plain, and time and class are
tokens (all three Peebles & Xie 2023, section 3.2); joint attention, adaLN-Zero twice, for video and for text, which
meet in one attention (Esser et al. 2024, section 4).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from einops import rearrange
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.attention import Attention, CrossAttention
from stdit.models.dynamic import Costs, Dynamic, Noise, Used
from stdit.models.embeddings import Grid
from stdit.models.mlp import feed_forward
from stdit.models.positions import Places
from stdit.models.pruning import Chosen, Parts

# How blocks are compiled. They share one function, so the limit, per function, has to hold every kind of block there is in
# a model, times one frame or several, one sample or several, a shared time or each its own, a mask or none. Sizes above
# 1 are symbols from the start.
COMPILED: dict[str, Any] = {"fullgraph": True, "dynamic": True, "recompile_limit": 64}

# Shift, scale + 1 and gate of attention, then of the MLP, each (B or 1, T or 1, 1, D); None where a block has none.
Modulation = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Signals(NamedTuple):
    """The time and the class as blocks are told them, of `conditioning`'s kind, (B or 1, T or 1, D or 6 D): to the video,
    and in joint attention to the text, which is one for all frames, or one for each. time (B or 1, D): the code of the
    time alone, which dynamic width goes by."""

    video: Tensor | None
    text: Tensor | None = None
    time: Tensor | None = None


class Prepared(NamedTuple):
    """What a block computes from the conditions alone: the same in every call with the same ones. parts: of dynamic
    width, cut down to what runs at this time."""

    modulation: Modulation
    text_modulation: Modulation | None
    keys_values: tuple[Tensor, Tensor] | None
    parts: Parts | None = None


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm without weights, times `scale` (which has the 1 already), plus shift. x (B, T, S, D)."""
    if shift.numel() == x.shape[-1]:  # shared by all: the norm's own weight and bias, one pass instead of two
        return F.layer_norm(x, x.shape[-1:], scale.flatten(), shift.flatten(), eps)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), scale)


def _add(x: Tensor, gate: Tensor | None, y: Tensor, keep: Tensor | None) -> Tensor:
    """x + gate y. keep (B, 1, 1, 1): 0 where a sample's branch is dropped, else what makes up for that; None: all stay."""
    if keep is not None:
        gate = keep if gate is None else gate * keep
    return x + y if gate is None else torch.addcmul(x, gate, y)


class AdaLN(nn.Module):
    """A network from the signal to `count` vectors per block. Weights as published: `adaLN_modulation.1` in DiT's blocks."""

    def __init__(self, hidden_size: int, count: int) -> None:
        super().__init__()
        self.count = count
        # An nn.Sequential(SiLU, Linear) in DiT; the SiLU is the same for all blocks and taken once, outside.
        self.add_module("1", nn.Linear(hidden_size, count * hidden_size))

    def forward(self, signal: Tensor) -> tuple[Tensor, ...]:
        """SiLU'd code (B or 1, T or 1, D) -> `count` tensors (B or 1, T or 1, 1, D)."""
        return self.get_submodule("1")(signal).unflatten(-1, (self.count, -1)).chunk(self.count, dim=-2)


def _six(vectors: tuple[Tensor, ...]) -> Modulation:
    """Shift, scale, gate twice, shift and scale twice, or shift and scale once, as a Modulation."""
    if len(vectors) == 2:
        return (vectors[0], 1 + vectors[1], None, None, None, None)
    if len(vectors) == 4:
        shift_msa, scale_msa, shift_mlp, scale_mlp = vectors
        return (shift_msa, 1 + scale_msa, None, shift_mlp, 1 + scale_mlp, None)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
    return (shift_msa, 1 + scale_msa, gate_msa, shift_mlp, 1 + scale_mlp, gate_mlp)


class TextStream(nn.Module):
    """The text's half of a joint block. The last block's text goes no further: it has no `proj`, gates and MLP to use."""

    def __init__(self, config: ModelConfig, last: bool) -> None:
        super().__init__()
        width, _, heads = config.dimensions
        self.adaLN_modulation = AdaLN(width, 2 if last else 6)
        self.attn = Attention(width, heads, config.qk_norm)
        self.mlp = None if last else feed_forward(config)
        if last:
            del self.attn.proj


class STDiTBlock(nn.Module):
    """Self-attention, temporal attention, attention to text, MLP; each only where the config has it.

    attention="factorized": `attn` within each frame, then `attn_temp` within each place over time (Open-Sora's pairs).
    "alternating": `attn` within each frame in even blocks, over time in odd ones. "full": `attn` over all tokens.

    `attn_temp` and `attn` share shift, scale and gate: with its `proj` at zero, `attn_temp` adds nothing, at any time.
    With the gates at zero and `cross_attn.proj` at zero, as they start, the block is the identity.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        width, depth, heads = config.dimensions
        self.full = config.attention == "full"
        self.over_time = config.attention == "alternating" and index % 2 == 1
        # Whether codes of time enter here, at the first attention that looks over time.
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

        within = not self.over_time and not self.full
        window = config.window_size if within and _holds(config.window_blocks, index) else None
        compress = config.kv_compress if within and _holds(config.kv_compress_blocks, index) else None
        self.attn = Attention(width, heads, config.qk_norm, window, config.relative_positions, compress)
        self.attn_temp = None
        if config.attention == "factorized" and config.temporal:
            self.attn_temp = Attention(width, heads, config.qk_norm)
        self.cross_attn = CrossAttention(width, heads, config.cross_qk_norm) if config.block_text[index] else None
        self.mlp = feed_forward(config)
        self.dynamic = Dynamic(config, self.attn_temp is not None) if config.dynamic else None

    # -------------------------------------------------------------------------------------- forward

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        signals: Signals,
        mask: Tensor | None,
        grid: Grid,
        places: Places,
        keep: Tensor | None = None,
        prepared: Prepared | None = None,
        noise: Noise | None = None,
        complete: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Used]:
        """hidden_states (B, T, S, D) and text (B or 1, L, D) -> the same two; text changes in joint attention alone. Of
        a dynamic block in training also what was used.

        mask (B, 1, 1, keys) bool, over the text (in-context: over a frame's tokens); keep (3, B, 1, 1, 1): what drop
        path leaves of attn, attn_temp and mlp; prepared: what `prepare` made of the same signals and text. Of dynamic
        blocks in training: noise of their choices, and complete (B,) bool, samples for which everything runs.
        """
        x, text = hidden_states, encoder_hidden_states
        if prepared is None:
            prepared = self.prepare(signals)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = prepared.modulation
        keep_attn, keep_temp, keep_mlp = (None, None, None) if keep is None else keep
        (attn, attn_temp, mlp), chosen = self.parts, Chosen()
        if self.dynamic is not None:
            (attn, attn_temp, mlp), chosen = self.dynamic.parts(
                self.parts, signals.time, noise, complete, prepared.parts
            )

        if self.over_time:
            x = self._in_time(x, grid, places)
            y = self._attend_over_time(attn, self._norm1(x, shift_msa, scale_msa), places, chosen.heads)
        elif self.context is None:
            y = self._attend(attn, self._norm1(x, shift_msa, scale_msa), grid, places, mask, chosen.heads)
        else:
            y, text = self._attend_jointly(x, text, prepared, mask, grid, places)
        x = _add(x, gate_msa, y, keep_attn)
        if attn_temp is not None:
            x = self._in_time(x, grid, places)
            read = self._norm1(x, shift_msa, scale_msa) if self.config.temporal_norm else x
            y = self._attend_over_time(attn_temp, read, places, chosen.heads_temp)
            x = _add(x, gate_msa, y, keep_temp)
        if self.cross_attn is not None:
            queries = x if self.norm_cross is None else self.norm_cross(x)
            y = self.cross_attn(queries.flatten(1, 2), text, mask, prepared.keys_values)
            x = x + y.unflatten(1, (grid[0], -1))
        if self.dynamic is not None:

            def fed(x: Tensor, shift: Any, scale: Any, gate: Any, groups: Any, tokens: Any = None) -> Tensor:
                y = mlp(self._norm2(x, shift, scale), None, groups)
                return _add(x, gate, y if tokens is None else y * tokens, keep_mlp)

            x, tokens = self.dynamic.feed(x, (shift_mlp, scale_mlp, gate_mlp, chosen.groups), fed, noise, complete)
            if self.training:
                return x, text, self.dynamic.used(chosen, tokens, self.costs(x), x)
            return x, text
        x = _add(x, gate_mlp, mlp(self._norm2(x, shift_mlp, scale_mlp), grid), keep_mlp)
        return x, text

    @property
    def parts(self) -> Parts:
        return Parts(self.attn, self.attn_temp, self.mlp)

    def costs(self, x: Tensor) -> Costs:
        """Multiply-adds that a sample of tokens x (B, T, S, D) costs where everything runs."""
        assert self.dynamic is not None
        return self.dynamic.costs(self.attn, x.shape[1], x.shape[2], self.over_time)

    def prepare(self, signals: Signals, text: Tensor | None = None) -> Prepared:
        """What this block makes of the conditions alone; of the text, where it is given, its keys and values."""
        text_modulation = keys_values = None
        if self.context is not None:
            assert signals.text is not None
            text_modulation = _six(self.context.adaLN_modulation(signals.text))
        if self.cross_attn is not None and text is not None:
            keys_values = self.cross_attn.keys_values(text)
        return Prepared(self._modulation(signals.video), text_modulation, keys_values)

    def _modulation(self, signal: Tensor | None) -> Modulation:
        if self.norm1 is not None:
            return (None, None, None, None, None, None)
        assert signal is not None
        if self.adaLN_modulation is not None:
            return _six(self.adaLN_modulation(signal))
        return _six((self.scale_shift_table + signal.unflatten(-1, (6, -1))).chunk(6, dim=-2))

    def _norm1(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        if self.norm1 is not None:
            return self.norm1(x)
        assert shift is not None
        assert scale is not None
        return modulate(x, shift, scale, self.eps)

    def _norm2(self, x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
        if self.norm2 is not None:
            return self.norm2(x)
        assert shift is not None
        assert scale is not None
        return modulate(x, shift, scale, self.mlp_eps)

    # ------------------------------------------------------------------------------------ attention

    def _attend(
        self, attn: Attention, x: Tensor, grid: Grid, places: Places, mask: Tensor | None, heads: Tensor | None
    ) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D), over all tokens or within each frame."""
        t = grid[0]
        own_mask = mask if self.cross_attn is None else None  # else it is the text's
        if self.full:
            if own_mask is not None:  # every frame has its own copy of the in-context tokens
                own_mask = own_mask.repeat(1, 1, 1, t)
            return attn(x.flatten(1, 2), places.rope, own_mask, None, heads).unflatten(1, (t, -1))
        if own_mask is not None and t > 1:
            own_mask = own_mask.repeat_interleave(t, 0)
        return attn(x.flatten(0, 1), places.rope, own_mask, grid[1:], heads).unflatten(0, (-1, t))

    def _in_time(self, x: Tensor, grid: Grid, places: Places) -> Tensor:
        """(B, T, S, D) with codes of time added to the stream itself, where the config wants that and there is time."""
        if (
            self.config.temporal_position_injection != "residual"
            or not self.first_in_time
            or places.temporal is None
            or grid[0] == 1
        ):
            return x
        return x + places.temporal[:, None]

    def _attend_over_time(self, attn: Attention, x: Tensor, places: Places, heads: Tensor | None) -> Tensor:
        """(B, T, S, D) -> (B, T, S, D), within each place. Codes of time enter here and not the stream, so `proj` at zero
        hides them (unless the config puts them there)."""
        place = self.config.temporal_position_injection
        if places.temporal is not None and (
            place == "attention" or (place == "first_attention" and self.first_in_time)
        ):
            x = x + places.temporal[:, None]
        s = x.shape[2]
        y = attn(rearrange(x, "b t s d -> (b s) t d"), places.rope_temp, None, None, heads)
        return rearrange(y, "(b s) t d -> b t s d", s=s)

    def _attend_jointly(
        self, x: Tensor, text: Tensor | None, prepared: Prepared, mask: Tensor | None, grid: Grid, places: Places
    ) -> tuple[Tensor, Tensor]:
        """Attention of video and text to both: what is to be added to the video (gated later), and the text after it.

        Factorized attention attends frame by frame, and each frame has its own copy of the text, (B T, L, D).
        """
        assert self.context is not None
        assert text is not None
        assert prepared.text_modulation is not None
        t, frames = grid[0], x.flatten(1, 2) if self.full else x.flatten(0, 1)
        groups = frames.shape[0]
        if text.shape[0] != groups:
            text = text.expand(x.shape[0], -1, -1).repeat_interleave(groups // x.shape[0], 0)
        if mask is not None:
            seen = mask.expand(x.shape[0], -1, -1, -1).repeat_interleave(groups // x.shape[0], 0)
            mask = F.pad(seen, (frames.shape[1], 0), value=True)
        shift_msa, scale_msa, *_ = prepared.modulation
        y = self._norm1(x, shift_msa, scale_msa)
        video = self.attn.heads(y.flatten(1, 2) if self.full else y.flatten(0, 1), places.rope)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (
            self._per_text(m, x, groups) for m in prepared.text_modulation
        )
        assert shift is not None
        assert scale is not None
        words = self.context.attn.heads(modulate(text[:, None], shift, scale, self.eps)[:, 0], None)
        q, k, v = (torch.cat(both, dim=1) for both in zip(video, words, strict=True))
        y, text_y = self.attn.processor(q, k, v, mask).flatten(2).split([frames.shape[1], text.shape[1]], dim=1)
        y = self.attn.proj(y).unflatten(1 if self.full else 0, (t, -1) if self.full else (-1, t))
        if self.context.mlp is None:
            return y, text
        assert gate is not None
        assert shift_mlp is not None
        assert scale_mlp is not None
        text = _add(text[:, None], gate, self.context.attn.proj(text_y)[:, None], None)
        text = _add(text, gate_mlp, self.context.mlp(modulate(text, shift_mlp, scale_mlp, self.mlp_eps)), None)
        return y, text[:, 0]

    @staticmethod
    def _per_text(vector: Tensor | None, x: Tensor, groups: int) -> Tensor | None:
        """A modulation (B or 1, T or 1, 1, D) for texts (groups, 1, L, D), groups being B or B T."""
        if vector is None or vector.shape[:2] == (1, 1) or groups == x.shape[0]:
            return vector
        return vector.expand(x.shape[0], x.shape[1], -1, -1).flatten(0, 1)[:, None]


def _holds(blocks: tuple[int, ...] | None, index: int) -> bool:
    return blocks is None or index in blocks


# diffusers' caches (FirstBlockCache and its kind) look up here what a block returns.
TransformerBlockRegistry.register(
    STDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=1)
)


class FinalLayer(nn.Module):
    """Norm, modulation by the time's code, and the linear map to patches."""

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

    def prepare(self, code: Tensor) -> tuple[Tensor, Tensor] | None:
        """Shift, and scale with its 1, of the code (B or 1, T or 1, D) (SiLU'd for adaLN); None for plain norms."""
        if self.norm is not None:
            return None
        if self.adaLN_modulation is not None:
            shift, scale = self.adaLN_modulation(code)
        else:
            shift, scale = (self.scale_shift_table + code[..., None, :]).chunk(2, dim=-2)
        return shift, 1 + scale

    def forward(self, x: Tensor, code: Tensor, prepared: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x (B, T, S, D), code (B or 1, T or 1, D) -> (B, T, S, pt ph pw C)."""
        if self.norm is not None:
            return self.linear(self.norm(x))
        made = prepared or self.prepare(code)
        assert made is not None
        return self.linear(modulate(x, *made, 1e-6))
