"""Self-attention and cross-attention, on the back ends of diffusers' dispatcher.

B           batch (times frames or positions, where attention is factorized)
N, M        query and key tokens
H, D, d     heads, hidden size, head width D / H

`model.set_attention_backend("flash")` (flash-attn), "_native_flash" (torch), "sage" and so on set the back end of
`AttentionProcessor`; diffusers imports the package and raises if it is missing. Back ends without masks leave masked
attention to torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,  # pyright: ignore[reportPrivateUsage]  (the only way to read which back end is active)
    dispatch_attention_fn,
)
from einops import rearrange
from torch import Tensor, nn

from stdit.config.model import QKNorm
from stdit.models.block_diagonal import BlockDiagonal, attend_in_blocks
from stdit.models.positions import Rope, apply_rope
from stdit.models.sequence_parallel import TokenShards, from_heads, to_heads
from stdit.ops.rms_norm import rms_norm

# Back ends that take boolean masks (xformers would add them as 0 and 1); all others leave masked attention to NATIVE.
MASKED = frozenset(
    {
        AttentionBackendName.NATIVE,
        AttentionBackendName._NATIVE_CUDNN,
        AttentionBackendName._NATIVE_EFFICIENT,
        AttentionBackendName._NATIVE_MATH,
        AttentionBackendName._NATIVE_NPU,
        AttentionBackendName.FLASH_VARLEN,
        AttentionBackendName.FLASH_VARLEN_HUB,
        AttentionBackendName._FLASH_VARLEN_3,
        AttentionBackendName._FLASH_3_VARLEN_HUB,
        AttentionBackendName.SAGE_VARLEN,
    }
)

# On a CPU, up to this many queries times keys, two plain products and a softmax are used. Measured forward and backward
# with two threads, the fused kernel takes 2 to 4 times as long at 4 x 4 and 16 x 16, 1.2 to 1.7 at 64 x 64, and wins
# from about 192 x 192; with one thread they tie. Not in compiled graphs, which would compile anew where a size passes
# it.
PLAIN_LIMIT = 128 * 128


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v, written out. Shapes as in `AttentionProcessor`."""
    query, key, value = (x.transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    scores = query @ key.transpose(-1, -2)  # (B, H, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (scores.softmax(-1) @ value).transpose(1, 2)


class AttentionProcessor:
    """softmax(q kᵀ / √d) v by this layer's back end, or else the active one.

    query (B, N, H, d); key, value (B, M, H, d); mask (B, 1, 1, M) bool, True for keys to attend to, at least
    one per row; or (B, H, N, M), added to the scores; or which diagonal blocks attend, B being 1. Returns (B, N, H, d).
    """

    # Written by diffusers' set_attention_backend and enable_parallelism.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockDiagonal | None = None) -> Tensor:
        if isinstance(mask, BlockDiagonal):
            varlen = self._unnamed and query.dtype in (torch.bfloat16, torch.float16)
            return attend_in_blocks(self, query, key, value, mask, varlen)
        if not torch.compiler.is_compiling() and len(query) == 0:  # a rank without frames: not every kernel takes it
            return plain_attention(query, key, value, mask)
        backend = self._attention_backend
        active = backend or _AttentionBackendRegistry.get_active_backend()[0]
        short = not torch.compiler.is_compiling() and query.shape[1] * key.shape[1] <= PLAIN_LIMIT
        if self._unnamed and query.device.type == "cpu" and short:
            return plain_attention(query, key, value, mask)
        if mask is not None and (active not in MASKED or mask.dtype != torch.bool):
            backend = AttentionBackendName.NATIVE
        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=backend, parallel_config=self._parallel_config
        )

    @property
    def _unnamed(self) -> bool:
        """Whether nobody has chosen a back end."""
        active = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        named = self._attention_backend is not None or active != AttentionBackendName.NATIVE
        return not named and self._parallel_config is None


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with the weight cast to the input's dtype, which the fused kernel needs under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


def _head_norm(kind: QKNorm | None, hidden_size: int, num_heads: int) -> nn.Module | None:
    """RMSNorm per head (STDiT3, SD3) or LayerNorm over the full width (PixArt-Σ)."""
    if kind == "rms":
        return RMSNorm(hidden_size // num_heads, eps=1e-6)
    return None if kind is None else nn.LayerNorm(hidden_size)


def split_heads(x: Tensor, norm: nn.Module | None, num_heads: int) -> Tensor:
    """(B, N, D) -> (B, N, H, d), LayerNorm before splitting heads, RMSNorm after."""
    if isinstance(norm, nn.LayerNorm):
        x = norm(x)
    x = x.unflatten(-1, (num_heads, -1))
    return norm(x) if isinstance(norm, RMSNorm) else x


class Attention(nn.Module, AttentionModuleMixin):
    """Self-attention. Weights as published: `qkv` (rows [q; k; v]), `proj`, `q_norm`, `k_norm`.

    window_size: windowed attention, patches per side. relative: decomposed relative position bias in the windows, by
    row and by column (`rel_pos_h`, `rel_pos_w`; Li et al. 2022, ViTDet).
    kv_compress: keys and values of kv_compress² patches are merged by a depth-wise convolution (`sr`) and a LayerNorm
    (`norm`; Chen et al. 2024, PixArt-Σ, section 2.3), or sampled (`kv_sampling`, ModelConfig.kv_compress_sampling).
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]  # noqa: RUF012 (diffusers' own declaration)
    _supports_qkv_fusion = False
    is_cross_attention = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        qk_norm: QKNorm | None = None,
        window_size: int | None = None,
        relative: bool = False,
        kv_compress: int | None = None,
        kv_sampling: str = "conv",
    ) -> None:
        super().__init__()
        self.num_heads, self.window_size = num_heads, window_size
        self.kv_compress, self.kv_sampling = kv_compress, kv_sampling
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = _head_norm(qk_norm, hidden_size, num_heads)
        self.k_norm = _head_norm(qk_norm, hidden_size, num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.rel_pos_h = self.rel_pos_w = None
        if window_size and relative:
            self.rel_pos_h = nn.Parameter(torch.zeros(2 * window_size - 1, hidden_size // num_heads))
            self.rel_pos_w = nn.Parameter(torch.zeros(2 * window_size - 1, hidden_size // num_heads))
        self.sr = self.norm = None
        if kv_compress and kv_sampling == "conv":
            self.sr = nn.Conv2d(hidden_size, hidden_size, kv_compress, stride=kv_compress, groups=hidden_size)
            self.norm = nn.LayerNorm(hidden_size)
        self.processor: Any = AttentionProcessor()

    def forward(
        self,
        hidden_states: Tensor,
        rope: Rope | None = None,
        mask: Tensor | BlockDiagonal | None = None,
        plane: tuple[int, int] | None = None,
        head_mask: Tensor | None = None,
        shards: TokenShards | None = None,
    ) -> Tensor:
        """(B, N, D) -> (B, N, D). rope of the N tokens; mask (B, 1, 1, N) bool over keys, or diagonal blocks; plane:
        (rows, columns) of the N patches, for windows and key/value compression; head_mask (samples or 1, H), 0 for
        heads whose output is dropped (samples divides B). shards: the N tokens are this rank's, and attend to those of
        all ranks (mask: of all)."""
        x = hidden_states
        if self.window_size is not None:
            assert plane is not None
            w, (rows, columns) = self.window_size, (plane[0] // self.window_size, plane[1] // self.window_size)
            x = rearrange(x, "b (i h j w) d -> (b i j) (h w) d", i=rows, j=columns, h=w, w=w)
            y = rearrange(
                self._attention(x, rope, mask, None, None),
                "(b i j) (h w) d -> b (i h j w) d",
                i=rows,
                j=columns,
                h=w,
                w=w,
            )
        else:
            y = self._attention(x, rope, mask, plane, shards)
        if head_mask is not None:
            factors = head_mask.repeat_interleave(y.shape[0] // head_mask.shape[0], 0)
            y = (y.unflatten(-1, (self.num_heads, -1)) * factors[:, None, :, None]).flatten(2)
        return self.proj(y)

    def qkv_heads(
        self, x: Tensor, rope: Rope | None, plane: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, N, H, d), keys and values (B, M, H, d) of x (B, N, D); M is N without key/value compression."""
        if self.kv_compress is None and not isinstance(self.q_norm, nn.LayerNorm):
            q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b n h d", qkv=3, h=self.num_heads).unbind(0)
            if self.q_norm is not None and self.k_norm is not None:
                q, k = self.q_norm(q), self.k_norm(k)
        else:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
            q, k = split_heads(q, self.q_norm, self.num_heads), split_heads(k, self.k_norm, self.num_heads)
            if self.kv_compress is not None:
                k, v = (
                    self._compress_kv(k.flatten(2), plane).unflatten(-1, (self.num_heads, -1)),
                    self._compress_kv(v, plane),
                )
            v = v.unflatten(-1, (self.num_heads, -1))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        return q, k, v

    def _attention(
        self,
        x: Tensor,
        rope: Rope | None,
        mask: Tensor | BlockDiagonal | None,
        plane: tuple[int, int] | None,
        shards: TokenShards | None,
    ) -> Tensor:
        q, k, v = to_heads(self.qkv_heads(x, rope, plane), shards)
        if self.rel_pos_h is not None and self.rel_pos_w is not None:
            mask = self._relative_bias(q, self.rel_pos_h, self.rel_pos_w)
        return from_heads(self.processor(q, k, v, mask), self.num_heads, shards).flatten(2)

    def _compress_kv(self, x: Tensor, plane: tuple[int, int] | None) -> Tensor:
        """(B, H W, D) -> (B, H W / r², D), or (B, H W / r, D) for every r-th token."""
        assert plane is not None
        r = self.kv_compress
        if self.kv_sampling == "uniform_every":
            return x[:, ::r]
        if (
            self.sr is None or self.norm is None
        ):  # PixArt-Σ's "ave" interpolates to the nearest patch, so it is "uniform"
            return x.unflatten(1, plane)[:, ::r, ::r].flatten(1, 2)
        pooled = self.sr(rearrange(x, "b (h w) d -> b d h w", h=plane[0], w=plane[1]))
        return self.norm(rearrange(pooled, "b d h w -> b (h w) d"))

    def _relative_bias(self, q: Tensor, rel_pos_h: Tensor, rel_pos_w: Tensor) -> Tensor:
        """Bias of a window's scores (B, H, N, N): each query with the embedding of its offset to each key."""
        assert self.window_size is not None
        index = torch.arange(self.window_size, device=q.device)
        offset = index[:, None] - index + self.window_size - 1  # (query, key)
        square = q.unflatten(1, (self.window_size, self.window_size))
        rows = torch.einsum("bijnd,ikd->bnijk", square, rel_pos_h[offset])
        columns = torch.einsum("bijnd,jkd->bnijk", square, rel_pos_w[offset])
        return rearrange(rows[..., None] + columns[..., None, :], "b n i j k l -> b n (i j) (k l)")


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention from video tokens to text tokens. Weights as published: `q_linear`, `kv_linear` (rows [k; v]), `proj`.

    `qk_norm` as in self-attention.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]  # noqa: RUF012
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: QKNorm | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = _head_norm(qk_norm, hidden_size, num_heads)
        self.k_norm = _head_norm(qk_norm, hidden_size, num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Any = AttentionProcessor()

    def keys_values(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B or 1, M, H, d), of text (B or 1, M, D): the same at every step of sampling."""
        k, v = self.kv_linear(encoder_hidden_states).chunk(2, dim=-1)
        return split_heads(k, self.k_norm, self.num_heads), split_heads(v, None, self.num_heads)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        mask: Tensor | BlockDiagonal | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """hidden_states (B, N, D), text (B or 1, M, D) or its keys and values, mask (B, 1, 1, M) bool -> (B, N, D)."""
        if keys_values is None:
            assert encoder_hidden_states is not None
            keys_values = self.keys_values(encoder_hidden_states)
        q = split_heads(self.q_linear(hidden_states), self.q_norm, self.num_heads)
        k, v = keys_values
        if len(k) != len(q):  # one text for the whole batch
            k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
        return self.proj(self.processor(q, k, v, mask).flatten(2))
