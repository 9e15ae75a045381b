"""The transformer block, and the layer that turns tokens back into patches.

B batch · (T, H, W) grid of patches · S = H W · N = T S tokens, frames outermost · D hidden size · L text tokens
modulation (B or 1, 6, D): shift, scale, gate for attention, then for the MLP; 1 where the whole batch shares it

adaLN-single (Chen et al. 2023, PixArt-α, section 2.3): one network makes the modulation from the time, for all blocks;
each block adds its own `scale_shift_table`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from einops import rearrange
from torch import Tensor, nn

from stdit.models.attention import Attention, CrossAttention
from stdit.models.conditioning import Mlp
from stdit.models.embeddings import Grid, Rope

EPS = 1e-6


class Places(NamedTuple):
    """Positions of one grid. `spatial` (S, D) and `temporal` (T, D), sine-cosine; `rope` for `attn`, `rope_temp` for `attn_temp`."""

    spatial: Tensor | None
    temporal: Tensor | None
    rope: Rope | None
    rope_temp: Rope | None


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then x (1 + scale) + shift. x (B, N, D); shift, scale (B or 1, 1, D)."""
    if shift.shape[0] == 1:  # shared by the batch: the norm's own weight and bias, one pass instead of two
        return F.layer_norm(x, x.shape[-1:], (1 + scale).flatten(), shift.flatten(), EPS)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), 1 + scale)


class STDiTBlock(nn.Module):
    """Self-attention, temporal attention, attention to text, MLP; each only where the config has it.

    attention="factorized": `attn` within each frame, then `attn_temp` within each place over time (Open-Sora's pairs).
    attention="full": `attn` over all tokens, no `attn_temp`. One frame goes the same way as many.

    `attn_temp` and `attn` share shift, scale and gate: with its `proj` at zero, `attn_temp` adds nothing, at any time.
    With the gates at zero and `cross_attn.proj` at zero, as they start, the block is the identity.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        attention: Literal["factorized", "full"],
        temporal: bool,
        text: bool,
        qk_norm: bool,
        gelu: Literal["tanh", "erf"],
    ) -> None:
        super().__init__()
        self.full = attention == "full"
        self.scale_shift_table = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.attn_temp = Attention(hidden_size, num_heads, qk_norm) if temporal and not self.full else None
        self.cross_attn = CrossAttention(hidden_size, num_heads, qk_norm) if text else None
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), hidden_size, gelu)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        modulation: Tensor,
        grid: Grid,
        places: Places,
    ) -> Tensor:
        """hidden_states (B, N, D), encoder_hidden_states (B or 1, L, D), mask (B, 1, 1, L) bool -> (B, N, D)."""
        x = hidden_states
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + modulation).chunk(
            6, dim=1
        )
        x = torch.addcmul(x, gate_msa, self._attend(modulate(x, shift_msa, scale_msa), grid, places.rope))
        if self.attn_temp is not None:
            y = self._attend_over_time(self.attn_temp, modulate(x, shift_msa, scale_msa), grid, places)
            x = torch.addcmul(x, gate_msa, y)
        if self.cross_attn is not None:
            assert encoder_hidden_states is not None
            x = x + self.cross_attn(x, encoder_hidden_states, encoder_attention_mask)
        return torch.addcmul(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))

    def _attend(self, x: Tensor, grid: Grid, rope: Rope | None) -> Tensor:
        """(B, N, D) -> (B, N, D), over all tokens or within each frame."""
        if self.full:
            return self.attn(x, rope)
        t = grid[0]
        return rearrange(self.attn(rearrange(x, "b (t s) d -> (b t) s d", t=t), rope), "(b t) s d -> b (t s) d", t=t)

    @staticmethod
    def _attend_over_time(attn_temp: Attention, x: Tensor, grid: Grid, places: Places) -> Tensor:
        """(B, N, D) -> (B, N, D), within each place. Positions enter here and not the stream, so `proj` at zero hides them."""
        t = grid[0]
        if places.temporal is not None:
            x = (x.unflatten(1, (t, -1)) + places.temporal[:, None]).flatten(1, 2)
        s = x.shape[1] // t
        y = attn_temp(rearrange(x, "b (t s) d -> (b s) t d", t=t), places.rope_temp)
        return rearrange(y, "(b s) t d -> b (t s) d", s=s)


# diffusers' caches (FirstBlockCache and its kind) look up here what a block returns: the hidden states alone.
TransformerBlockRegistry.register(STDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class FinalLayer(nn.Module):
    """Norm, modulation by the time's code itself, and the linear map to patches."""

    def __init__(self, hidden_size: int, outputs: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)
        self.linear = nn.Linear(hidden_size, outputs)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        """x (B, N, D), code (B or 1, D) -> (B, N, pt ph pw C)."""
        shift, scale = (self.scale_shift_table + code[:, None]).chunk(2, dim=1)
        return self.linear(modulate(x, shift, scale))
