"""What the tokens are told: the time, a class, a caption, the clip's rate and size.

B batch · T frames · L text tokens · E width of the text features · D hidden size

Everything but the caption's tokens is summed into one code (B, D), or (1, D) where the batch shares it; (B, T, D) where
some frames are given and stand at another time than the rest.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.config.model import ModelConfig
from stdit.models.embeddings import timestep_code
from stdit.models.mlp import Mlp


class TimestepEmbedder(nn.Module):
    """A scalar's code, through a small network; serves the timestep and the micro-conditions."""

    def __init__(
        self,
        hidden_size: int,
        width: int = 256,
        shift: Literal[0, 1] = 0,
        activation: Literal["silu", "gelu"] = "silu",
    ) -> None:
        super().__init__()
        self.width, self.shift = width, shift
        act = nn.SiLU() if activation == "silu" else nn.GELU(approximate="tanh")
        self.mlp = nn.Sequential(nn.Linear(width, hidden_size), act, nn.Linear(hidden_size, hidden_size))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D). The code is made in float32 and then cast to `dtype`."""
        return self.mlp(timestep_code(values, self.width, self.shift).to(dtype))


class Told(NamedTuple):
    """What a caption and a class come to. code: (B or 1, D), added to the time's, or None. text: (B or 1, L, D) or None.
    mask: (B, 1, 1, L) bool, or None where every token is seen."""

    code: Tensor | None
    text: Tensor | None
    mask: Tensor | None


class ConditionEmbedder(nn.Module):
    """Class labels and captions, and their nulls for classifier-free guidance (Ho & Salimans 2022).

    * `embedding_table` (classes + 1, D): the last row is the null class.
    * `y_embedding` (max_text_tokens, E): what stands for no caption. null_text "token": its first row, one token, whatever
      the length of the caption it stands in for (the other rows are there for weights that have them). "sequence": its
      first L rows, under the mask of the caption of L tokens that they stand in for. "empty": there is none.
    * `y_proj`: text features to width D. `pooled_proj`: their mean over tokens, or a vector that comes with them, into
      the code; where the mean is used its last layer starts at 0.
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
    ) -> Told:
        """class_labels (B,), -1 for null; text (B, L, E), None for null; mask (B, L) bool; pooled (B, P), None for 0;
        drop (B,) bool: null for all of them. Padding that no caption of the batch reaches is cut off first."""
        code = self._label_code(class_labels, drop)
        if self.y_proj is not None:
            # Of a mask on a device, trimming would wait for it: who sends a batch there trims it before.
            if (
                text is not None
                and mask is not None
                and mask.device.type == "cpu"
                and not torch.compiler.is_compiling()
            ):
                text, mask = trimmed(text, mask)
            text, mask = self._with_nulls(text, mask, drop, dtype)
        if self.pooled_proj is not None:
            if self.pooled_text:
                assert text is not None
                pooled = F.layer_norm(_mean_over_tokens(text, mask), text.shape[-1:])
            elif pooled is None:
                pooled = torch.zeros(1, self.pooled_width, device=next(self.pooled_proj.parameters()).device)
            elif drop is not None:
                pooled = pooled.masked_fill(drop[:, None], 0)
            told = self.pooled_proj(pooled.to(dtype))
            code = told if code is None else code + told
        if self.y_proj is None:
            return Told(code, None, None)
        if mask is not None:
            mask = None if _is_full(mask) else mask[:, None, None]
        assert text is not None
        return Told(code, self.y_proj(text), mask)

    def _label_code(self, labels: Tensor | None, drop: Tensor | None) -> Tensor | None:
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
        """Text and mask with the null caption where it is dropped, or where it has no token at all."""
        if self.y_embedding is None:
            assert text is not None
            return text.to(dtype), mask
        null = self.y_embedding.to(dtype)
        if self.null_text == "token":
            null = null[:1]
        if text is None:
            return null[None], None
        if mask is not None:
            empty = ~mask.any(1)  # a row with nothing to attend to would be 0/0
            drop = empty if drop is None else drop | empty
        text = text.to(dtype)
        if drop is None:
            return text, mask
        text = torch.where(drop[:, None, None], null[: text.shape[1]], text)
        later = torch.arange(text.shape[1], device=text.device) > 0
        if self.null_text == "token":
            seen = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
            return text, torch.where(drop[:, None], ~later, seen)
        return text, None if mask is None else torch.where(mask.any(1)[:, None], mask, ~later)


def trimmed(text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Text (B, L, E) and mask (B, L) without the last columns, as far as they are padding in every row: no matrix product
    sees them. One column stays where there is no token at all. Waits for the device that the mask is on."""
    seen = mask.bool().any(0).nonzero()
    longest = int(seen[-1]) + 1 if len(seen) else 1
    return text[:, :longest], mask[:, :longest]


def _mean_over_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, E), (B, L) bool -> (B, E) float32: the mean over the tokens that are seen."""
    if mask is None:
        return text.float().mean(1)
    weights = mask[:, None].float()
    return (weights @ text.float()).squeeze(1) / weights.sum(-1)


def _is_full(mask: Tensor) -> bool:
    """Whether no token is masked, as far as that can be told without waiting for a GPU (or breaking a compiled graph)."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def micro_embedders(config: ModelConfig) -> dict[str, int]:
    """Names and widths of the networks of the micro-conditions."""
    width, _, _ = config.dimensions
    found = {f"{name}_embedder": width for name in config.micro_conditions if name != "size"}
    if "size" in config.micro_conditions:
        found |= {"csize_embedder": width // 3, "ar_embedder": width // 3}
    return found
