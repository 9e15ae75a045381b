"""Self-attention and cross-attention, by the kernels that diffusers' dispatcher knows by name.

B batch (frames or pixels folded in, where attention is factorized) · N, M query and key tokens
H heads · D hidden size · d = D / H

The one place where a back end is chosen: `model.set_attention_backend("flash")` (flash-attn),
"_native_flash" (torch's own), "sage" and so on write into `AttentionProcessor`; diffusers imports
the package and says so when it is missing. Kernels that take no mask leave masked cross-attention
to torch's scaled_dot_product_attention.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,  # pyright: ignore[reportPrivateUsage]  (the only way to read which back end is active)
    dispatch_attention_fn,
)
from einops import rearrange
from torch import Tensor, nn

from stdit.models.embeddings import Rope, rotate

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
# from about 192 x 192; with one thread they tie.
PLAIN_LIMIT = 128 * 128


def plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √d) v, written out. Shapes as in `AttentionProcessor`."""
    query, key, value = (x.transpose(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    scores = query @ key.transpose(-1, -2)  # (B, H, N, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2)


class AttentionProcessor:
    """softmax(q kᵀ / √d) v by the back end that was set on this layer, or else by the active one.

    query (B, N, H, d); key, value (B, M, H, d); mask (B, 1, 1, M) bool, True where a key is seen,
    at least one in every row. Returns (B, N, H, d).
    """

    # Written by diffusers' set_attention_backend and enable_parallelism.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        backend = self._attention_backend
        active = backend or _AttentionBackendRegistry.get_active_backend()[0]
        unnamed = backend is None and active == AttentionBackendName.NATIVE and self._parallel_config is None
        if unnamed and query.device.type == "cpu" and query.shape[1] * key.shape[1] <= PLAIN_LIMIT:
            return plain_attention(query, key, value, mask)
        if mask is not None and active not in MASKED:
            backend = AttentionBackendName.NATIVE
        return dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=backend, parallel_config=self._parallel_config
        )


class RMSNorm(nn.RMSNorm):
    """torch's, with the weight in the input's dtype: under autocast the fused kernel wants both equal."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module, AttentionModuleMixin):
    """Self-attention. Weights as published: `qkv` (rows [q; k; v]), `proj`; with `qk_norm`, an RMS norm per head."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]  # noqa: RUF012 (diffusers' own declaration)
    _supports_qkv_fusion = False
    is_cross_attention = False

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else None
        self.k_norm = RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else None
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Any = AttentionProcessor()

    def forward(self, hidden_states: Tensor, rope: Rope | None = None) -> Tensor:
        """hidden_states (B, N, D), rope over the N tokens -> (B, N, D)."""
        q, k, v = rearrange(self.qkv(hidden_states), "b n (qkv h d) -> qkv b n h d", qkv=3, h=self.num_heads).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(self.processor(q, k, v).flatten(2))


class CrossAttention(nn.Module, AttentionModuleMixin):
    """Attention from video tokens to text tokens. Weights as published: `q_linear`, `kv_linear` (rows [k; v]), `proj`.

    `qk_norm` as in self-attention.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]  # noqa: RUF012
    _supports_qkv_fusion = False
    is_cross_attention = True

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear = nn.Linear(hidden_size, hidden_size)
        self.kv_linear = nn.Linear(hidden_size, 2 * hidden_size)
        self.q_norm = RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else None
        self.k_norm = RMSNorm(hidden_size // num_heads, eps=1e-6) if qk_norm else None
        self.proj = nn.Linear(hidden_size, hidden_size)
        self.processor: Any = AttentionProcessor()

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, mask: Tensor | None = None) -> Tensor:
        """hidden_states (B, N, D), encoder_hidden_states (B or 1, M, D), mask (B, 1, 1, M) bool -> (B, N, D)."""
        q = rearrange(self.q_linear(hidden_states), "b n (h d) -> b n h d", h=self.num_heads)
        kv = rearrange(self.kv_linear(encoder_hidden_states), "b m (kv h d) -> kv b m h d", kv=2, h=self.num_heads)
        k, v = kv.unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if len(k) != len(q):  # one text (the null) for the whole batch
            k, v = k.expand(len(q), -1, -1, -1), v.expand(len(q), -1, -1, -1)
        return self.proj(self.processor(q, k, v, mask).flatten(2))
