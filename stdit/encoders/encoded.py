"""What text encoders make of captions, and how the features of several are put together.

B captions · L tokens, the most that one of them has · D width of a token's features · P width of the pooled vector
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


class Encoded(tuple[Tensor, Tensor]):
    """(features (B, L, D) float32, mask (B, L) bool), with `.pooled`, (B, P) float32 or None where there are no vectors.

    Features are zero where the mask is False, which is behind a caption's last token.
    """

    pooled: Tensor | None

    def __new__(cls, features: Tensor, mask: Tensor, pooled: Tensor | None = None) -> Self:
        made = super().__new__(cls, (features, mask))
        made.pooled = pooled
        return made

    def __getnewargs__(self) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self[0], self[1], self.pooled)

    @property
    def features(self) -> Tensor:
        return self[0]

    @property
    def mask(self) -> Tensor:
        return self[1]


def along_tokens(parts: Sequence[Encoded]) -> Encoded:
    """One after another: (B, L1 + L2 + …, max D), the narrower filled with zeros (Esser et al. 2024); no gaps between them."""
    width = max(part.features.shape[2] for part in parts)
    features = torch.cat([widened(part.features, width) for part in parts], dim=1)
    mask = torch.cat([part.mask for part in parts], dim=1)
    return Encoded(*_closed(features, mask), _pooled(parts))


def along_channels(parts: Sequence[Encoded], captions: Sequence[str]) -> Encoded:
    """Side by side: (B, L, D1 + D2 + …). ValueError: a caption of which they make different numbers of tokens."""
    counts = torch.stack([part.mask.sum(1) for part in parts])
    if (differs := (counts != counts[0]).any(0)).any():
        wrong = int(differs.nonzero()[0])
        found = " and ".join(str(int(count)) for count in counts[:, wrong])
        raise ValueError(
            f"text_encoder.channels: caption {captions[wrong][:60]!r} has {found} tokens; side by side they must be as many "
            "(keep_padding: true makes them so)"
        )
    return Encoded(torch.cat([part.features for part in parts], dim=2), parts[0].mask, _pooled(parts))


def widened(features: Tensor, width: int) -> Tensor:
    """(B, L, D) -> (B, L, width), filled with zeros."""
    return F.pad(features, (0, width - features.shape[2]))


def _pooled(parts: Sequence[Encoded]) -> Tensor | None:
    vectors = [part.pooled for part in parts if part.pooled is not None]
    return torch.cat(vectors, dim=1) if vectors else None


def _closed(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each caption's tokens moved to the front, in their order; as many columns as the longest needs."""
    if mask.all():
        return features, mask
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    longest = int(mask.sum(1).max())
    order = order[:, :longest]
    return features.gather(1, order[..., None].expand(-1, -1, features.shape[2])), mask.gather(1, order)
