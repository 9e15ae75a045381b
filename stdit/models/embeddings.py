"""Embeddings: latents to patch tokens and back; timestep, class and text to vectors and tokens.

B           batch
C           latent channels
T, H, W     grid of patches;  N = T H W tokens
L, E        text tokens, width of the text encoder's features
D           hidden size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.mlp import Mlp
from stdit.models.positions import Grid, cached_table

# ---------------------------------------------------------------------------------------- patches


class PatchConv(nn.Conv3d):
    """A convolution whose stride is its kernel, computed as one matrix product over patches: same weights, same
    result."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, T pt, H ph, W pw), any dtype -> (B, D, T, H, W)."""
        pt, ph, pw = self.kernel_size  # and stride
        patches = rearrange(
            input.to(self.weight.dtype), "b c (t pt) (h ph) (w pw) -> b t h w (c pt ph pw)", pt=pt, ph=ph, pw=pw
        )
        return rearrange(F.linear(patches, self.weight.flatten(1), self.bias), "b t h w d -> b d t h w")


class PatchEmbed3D(nn.Module):
    """Latents to tokens: patches of (pt, ph, pw), one linear map each (`proj`, a Conv3d as published)."""

    def __init__(self, channels: int, hidden_size: int, patch_size: Grid) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = PatchConv(channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, T pt, H ph, W pw) -> (B, N, D). Latents that patches do not fill are padded with zeros at the end."""
        return rearrange(self.proj(_pad(latents, self.patch_size)), "b d t h w -> b (t h w) d")


def _pad(latents: Tensor, patch_size: Grid) -> Tensor:
    """(B, C, T', H', W') -> (B, C, T pt, H ph, W pw), with zeros at the end where patches are not filled."""
    t, h, w = (-size % patch for size, patch in zip(latents.shape[2:], patch_size, strict=True))
    return F.pad(latents, (0, w, 0, h, 0, t)) if t or h or w else latents


def patchify(latents: Tensor, patch_size: Grid) -> Tensor:
    """(B, C, T', H', W') -> (B, T, S, pt ph pw C), padded as for PatchEmbed3D; `unpatchify` of it are the latents."""
    pt, ph, pw = patch_size
    pattern = "b c (t pt) (h ph) (w pw) -> b t (h w) (pt ph pw c)"
    return rearrange(_pad(latents, patch_size), pattern, pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: Grid, size: Sequence[int]) -> Tensor:
    """(B, N, pt ph pw C), channels innermost as DiT has them -> (B, C, *size), cropped from (B, C, T pt, H ph, W
    pw)."""
    (t, h, w), (pt, ph, pw) = grid, patch_size
    x = rearrange(tokens, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw)
    return x[:, :, : size[0], : size[1], : size[2]]


# ---------------------------------------------------------------------------------------- scalars


@cached_table
def _frequencies(half: int, freq_shift: int, device: torch.device) -> Tensor:
    """(half,) float32: 10000^(-i / (half - freq_shift))."""
    # In the published order of operations, to the last bit.
    return torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - freq_shift)).to(device)


def timestep_embedding(values: Tensor, size: int, freq_shift: int = 0) -> Tensor:
    """Sinusoidal embedding [cos, sin] of scalars (B,), any dtype -> (B, size) float32. Timesteps run from 0 to 1000.

    freq_shift: 0 for DiT's and PixArt's frequencies, 1 for those of diffusers' DiT.
    """
    angles = values.float()[:, None] * _frequencies(size // 2, freq_shift, values.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def as_vector(value: Any, device: torch.device) -> Tensor:
    """A number, (), (1,) or (B,) -> (1,) or (B,). One value expanded over a batch comes back as (1,): the batch shares
    it."""
    vector = torch.as_tensor(value, device=device).reshape(-1)
    return vector[:1] if vector.stride(0) == 0 else vector


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of a scalar and an MLP; for the timestep and the micro-conditions."""

    def __init__(
        self,
        hidden_size: int,
        width: int = 256,
        freq_shift: Literal[0, 1] = 0,
        activation: Literal["silu", "gelu"] = "silu",
    ) -> None:
        super().__init__()
        self.width, self.freq_shift = width, freq_shift
        act = nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), act, nn.Linear(hidden_size, hidden_size))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D). The sinusoids are computed in float32, then cast to `dtype`."""
        return self.mlp(timestep_embedding(values, self.width, self.freq_shift).to(dtype))


def micro_embedders(config: ModelConfig) -> dict[str, int]:
    """Names and widths of the micro-conditions' embedders."""
    width, _, _ = config.dimensions
    found = {f"{name}_embedder": width for name in config.micro_conditions if name != "size"}
    if "size" in config.micro_conditions:
        found |= {"csize_embedder": width // 3, "ar_embedder": width // 3}
    return found


# --------------------------------------------------------------------------------- class and text


class ConditionEmbedding(NamedTuple):
    """Class and text, embedded. `vector` (B or 1, D) is added to the timestep embedding; `text` (B or 1, L, D) and its
    `mask` (B, 1, 1, L) bool, None where all tokens are valid."""

    vector: Tensor | None
    text: Tensor | None
    mask: Tensor | None


class ConditionEmbedder(nn.Module):
    """Class labels and captions, with null embeddings for classifier-free guidance (Ho & Salimans 2022).

    * `embedding_table` (classes + 1, D): the last row is the null class.
    * `y_embedding` (max_text_tokens, E): the null caption. null_text "token": its first row, as one token (the other
      rows are there for weights that have them). "sequence": its first L rows, under the mask of the caption of L
      tokens that it replaces. "empty": there is none.
    * `y_proj`: text features to width D. `pooled_proj`: their mean over tokens, or a pooled vector, to a vector of
      width D; for the mean its last layer starts at 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, _, _ = config.dimensions
        self.num_classes, self.null_class, self.null_text = config.num_classes, config.null_class, config.null_text
        self.pooled_text = config.pooled_text
        self.embedding_table = None
        if config.num_classes is not None:
            self.embedding_table = nn.Embedding(config.num_classes + config.null_class, width)
        self.y_embedding = None
        self.y_proj = None
        if config.text_dim is not None:
            if config.null_text != "empty":
                self.y_embedding = nn.Parameter(
                    torch.randn(config.max_text_tokens, config.text_dim) / config.text_dim**0.5
                )
            self.y_proj = (
                Mlp(config.text_dim, width, width, config.gelu)
                if config.text_projection == "mlp"
                else nn.Linear(config.text_dim, width)
            )
        pooled = config.text_dim if config.pooled_text else config.pooled_dim
        self.pooled_proj, self.pooled_width = None, pooled or 0
        if pooled is not None:
            self.pooled_proj = nn.Sequential(nn.Linear(pooled, width), nn.SiLU(), nn.Linear(width, width))

    def forward(
        self,
        class_labels: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
        pooled: Tensor | None,
        drop: Tensor | None,
        dtype: torch.dtype,
    ) -> ConditionEmbedding:
        """class_labels (B,), -1 for null; text (B, L, E), None for null; mask (B, L) bool; pooled (B, P), None for 0;
        drop (B,) bool: null for all of them. Columns that are padding in the whole batch are trimmed first."""
        vector = self._embed_labels(class_labels, drop)
        if self.y_proj is not None:
            # Trimming by a mask on a GPU would synchronise: batches are trimmed before they are sent there.
            if (
                text is not None
                and mask is not None
                and mask.device.type == "cpu"
                and not torch.compiler.is_compiling()
            ):
                text, mask = trim_padding(text, mask)
            text, mask = self._with_nulls(text, mask, drop, dtype)
        if self.pooled_proj is not None:
            if self.pooled_text:
                assert text is not None
                pooled = F.layer_norm(_mean_over_tokens(text, mask), text.shape[-1:])
            elif pooled is None:
                pooled = torch.zeros(1, self.pooled_width, device=next(self.pooled_proj.parameters()).device)
            elif drop is not None:
                pooled = pooled.masked_fill(drop[:, None], 0)
            projected = self.pooled_proj(pooled.to(dtype))
            vector = projected if vector is None else vector + projected
        if self.y_proj is None:
            return ConditionEmbedding(vector, None, None)
        if mask is not None:
            mask = None if _is_all_true(mask) else mask[:, None, None]
        assert text is not None
        return ConditionEmbedding(vector, self.y_proj(text), mask)

    def _embed_labels(self, labels: Tensor | None, drop: Tensor | None) -> Tensor | None:
        if self.embedding_table is None or self.num_classes is None:
            return None
        if labels is None:
            labels = torch.full((1,), -1, device=self.embedding_table.weight.device)
        null = labels < 0 if drop is None else (labels < 0) | drop
        if self.null_class:
            return self.embedding_table(torch.where(null, self.num_classes, labels))
        return self.embedding_table(labels.clamp(min=0)).masked_fill(null[:, None], 0)

    def _with_nulls(
        self, text: Tensor | None, mask: Tensor | None, drop: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Text and mask with the null caption where `drop` says so or the mask is all False."""
        if self.y_embedding is None:
            assert text is not None
            return text.to(dtype), mask
        null = self.y_embedding.to(dtype)
        if self.null_text == "token":
            null = null[:1]
        if text is None:
            return null[None], None
        if mask is not None:
            empty = ~mask.any(1)  # softmax over no keys is 0/0
            drop = empty if drop is None else drop | empty
        text = text.to(dtype)
        if drop is None:
            return text, mask
        text = torch.where(drop[:, None, None], null[: text.shape[1]], text)
        later = torch.arange(text.shape[1], device=text.device) > 0
        if self.null_text == "token":
            valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
            return text, torch.where(drop[:, None], ~later, valid)
        return text, None if mask is None else torch.where(mask.any(1)[:, None], mask, ~later)


def trim_padding(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, L, E) and mask (B, L) without trailing columns that are padding in every row; at least one column stays.
    Synchronises with the mask's device."""
    valid = mask.bool().any(0).nonzero()
    longest = int(valid[-1]) + 1 if len(valid) else 1
    return text[:, :longest], mask[:, :longest]


def _mean_over_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, E), (B, L) bool -> (B, E) float32: the mean over unmasked tokens."""
    if mask is None:
        return text.float().mean(1)
    weights = mask[:, None].float()
    return (weights @ text.float()).squeeze(1) / weights.sum(-1)


def _is_all_true(mask: Tensor) -> bool:
    """Whether no token is masked; False where finding out would synchronise with a GPU or break a compiled graph."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())
