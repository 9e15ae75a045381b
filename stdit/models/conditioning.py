"""What the tokens are told: the time, a class, a caption, the clip's rate and size.

B batch · L text tokens · E width of the text features · D hidden size

Everything but the caption's tokens is summed into one code (B, D), or (1, D) where the batch shares it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.models.embeddings import timestep_code


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), with the names that published weights have."""

    def __init__(self, inputs: int, hidden: int, outputs: int, gelu: Literal["tanh", "erf"]) -> None:
        super().__init__()
        self.gelu = "none" if gelu == "erf" else gelu
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class TimestepEmbedder(nn.Module):
    """A scalar's code, through a small network; serves the timestep and the micro-conditions."""

    CODE_SIZE = 256

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.CODE_SIZE, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) -> (B, D). The code is made in float32 and then cast to `dtype`."""
        return self.mlp(timestep_code(values, self.CODE_SIZE).to(dtype))


class Condition(NamedTuple):
    """code: (B or 1, D), added to the time's, or None. text: (B or 1, L, D) or None. mask: (B, 1, 1, L) bool or None."""

    code: Tensor | None
    text: Tensor | None
    mask: Tensor | None


class ConditionEmbedder(nn.Module):
    """Class labels and captions, and their nulls for classifier-free guidance (Ho & Salimans 2022).

    * `embedding_table` (classes + 1, D): the last row is the null class.
    * `y_embedding` (text_tokens, E): its first row is the null caption, one token, whatever the length of the caption it
      stands in for. The other rows are there for published weights, which have one per token.
    * `y_proj`: text features to width D. `pooled_proj`: their mean over tokens, into the code; its last layer starts at 0.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int | None,
        text_dim: int | None,
        text_tokens: int,
        pooled_text: bool,
        gelu: Literal["tanh", "erf"],
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_table = None if num_classes is None else nn.Embedding(num_classes + 1, hidden_size)
        self.y_embedding = None
        self.y_proj = None
        self.pooled_proj = None
        if text_dim is not None:
            self.y_embedding = nn.Parameter(torch.randn(text_tokens, text_dim) / text_dim**0.5)
            self.y_proj = Mlp(text_dim, hidden_size, hidden_size, gelu)
            if pooled_text:
                self.pooled_proj = nn.Sequential(
                    nn.Linear(text_dim, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
                )

    def forward(
        self,
        class_labels: Tensor | None,
        text: Tensor | None,
        mask: Tensor | None,
        drop: Tensor | None,
        dtype: torch.dtype,
    ) -> Condition:
        """class_labels (B,) or (1,), -1 for null; text (B, L, E), None for null; mask (B, L) bool; drop (B,) bool: null for both."""
        code = self._label_code(class_labels, drop)
        if self.y_proj is None:
            return Condition(code, None, None)
        text, mask = self._with_nulls(text, mask, drop, dtype)
        if self.pooled_proj is not None:
            pooled = self.pooled_proj(F.layer_norm(_mean_over_tokens(text, mask), text.shape[-1:]).to(dtype))
            code = pooled if code is None else code + pooled
        if mask is not None:
            mask = None if _is_full(mask) else mask[:, None, None]
        return Condition(code, self.y_proj(text), mask)

    def _label_code(self, labels: Tensor | None, drop: Tensor | None) -> Tensor | None:
        if self.embedding_table is None or self.num_classes is None or labels is None:
            return None
        null = labels < 0 if drop is None else (labels < 0) | drop
        return self.embedding_table(torch.where(null, self.num_classes, labels))

    def _with_nulls(
        self, text: Tensor | None, mask: Tensor | None, drop: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Text and mask with the null caption where it is dropped, or where it has no token at all."""
        assert self.y_embedding is not None
        null = self.y_embedding[0].to(dtype)
        if text is None:
            return null[None, None], None
        if mask is not None:
            empty = ~mask.any(1)  # a row with nothing to attend to would be 0/0
            drop = empty if drop is None else drop | empty
        text = text.to(dtype)
        if drop is None:
            return text, mask
        text = torch.where(drop[:, None, None], null, text)
        seen = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask
        later = torch.arange(text.shape[1], device=text.device) > 0
        return text, torch.where(drop[:, None], ~later, seen)


def _mean_over_tokens(text: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, E), (B, L) bool -> (B, E) float32: the mean over the tokens that are seen."""
    if mask is None:
        return text.float().mean(1)
    weights = mask[:, None].float()
    return (weights @ text.float()).squeeze(1) / weights.sum(-1)


def _is_full(mask: Tensor) -> bool:
    """Whether no token is masked, as far as that can be told without waiting for a GPU (or breaking a compiled graph)."""
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())
