"""A training step's loss by noise level and by bucket, as validation's is logged (stdit.training.validation)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stdit.config import DataConfig
from stdit.data.loader import Step

# Equal parts of t in [0, 1]; 1 is noise.
TIME_BINS = 4


class LossGroups:
    """Names the groups of a run: `loss/t=0-0.25` …, `loss/4x16x16` …"""

    def __init__(self, data: DataConfig) -> None:
        self._buckets = [b.key for b in data.buckets]
        bins = [f"t={i / TIME_BINS:g}-{(i + 1) / TIME_BINS:g}" for i in range(TIME_BINS)]
        self._names = [f"loss/{name}" for name in (*bins, *self._buckets)]

    def sums(self, data_step: Step, times: Sequence[Tensor], losses: Sequence[Tensor]) -> list[float]:
        """This rank's sums for `metrics`, to be added up over the ranks: each group's loss, then each group's samples.
        times, losses: (B,) of each micro-batch. A loss that is not finite is left out: `bad_samples` names it."""
        each, t = torch.cat(list(losses)).double(), torch.cat(list(times))
        finite = each.isfinite()
        keys = [self._buckets.index(part.bucket.key) for part in data_step.parts for _ in range(len(part))]
        bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
        total = torch.zeros(2, len(self._names), dtype=torch.float64, device=each.device)
        for group in (bins, TIME_BINS + torch.tensor(keys, device=each.device)):
            total[0].index_add_(0, group, each.where(finite, 0))
            total[1].index_add_(0, group, finite.double())
        return total.flatten().tolist()

    def metrics(self, sums: Sequence[float]) -> dict[str, float]:
        """Mean loss of each group that the step has samples of."""
        groups = len(self._names)
        return {name: total / n for name, total, n in zip(self._names, sums[:groups], sums[groups:], strict=True) if n}
