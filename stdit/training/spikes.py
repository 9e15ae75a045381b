"""Loss spikes: a step whose loss is far above the last ones of its bucket; what is done about it (train.on_spike).

warn: it is marked in metrics.jsonl and the log. skip: its gradient is dropped too. rewind: training goes back to the
newest checkpoint and leaves out that step's samples; RUN_DIR/rewinds.json lists them, so that a resumed run leaves them
out as well.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit.config import FileSchema, NonNegative, Positive, TrainConfig, read_json
from stdit.data.loader import Step
from stdit.files import atomic_write
from stdit.training.distributed import Ranks
from stdit.training.divergence import Diverged

# Losses of a bucket that the next one is compared with, at most and at least.
WINDOW, LEAST = 100, 20
# Median absolute deviation of a normal distribution -> its standard deviation.
SCALE = 1.4826
REWINDS = "rewinds.json"


class Rewound(Exception):
    """The run goes back to its newest checkpoint."""


class LossSpikes:
    """Watches the losses of one run. recent: last losses by bucket key, of the checkpoint that it resumes from."""

    def __init__(self, train: TrainConfig, ranks: Ranks, recent: Mapping[str, Sequence[float]]) -> None:
        self.action, self.threshold, self.ranks = train.on_spike, train.spike_threshold, ranks
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        for bucket, losses in recent.items():
            self._recent[bucket].extend(losses)

    @property
    def recent(self) -> dict[str, list[float]]:
        """Last losses by bucket key, for a checkpoint."""
        return {bucket: list(losses) for bucket, losses in self._recent.items()}

    def excess(self, bucket: str, loss: float) -> float | None:
        """Robust standard deviations by which `loss` is above the median of the bucket's last losses, if it is a spike:
        more than `spike_threshold`. None: it is not, or there are too few to tell."""
        last = self._recent[bucket]
        if len(last) < LEAST or not math.isfinite(loss):
            return None
        median = statistics.median(last)
        deviation = SCALE * statistics.median(abs(each - median) for each in last)
        found = (loss - median) / max(deviation, 1e-3 * abs(median), 1e-12)
        return found if found > self.threshold else None

    def veto(self, total: Tensor, sums: Tensor, step: Step, micro_batch: int) -> Tensor:
        """The loss to be differentiated: `total`, or NaN with on_spike `skip` at the last micro-batch of a spike.

        Every gradient is NaN then, and no rank updates anything. Collective. sums[0]: of the step's losses so far.
        """
        if self.action != "skip" or micro_batch < len(step.batches) - 1:
            return total
        (loss,) = self.ranks.all_reduce(sums[0].item() / len(step.batches) / self.ranks.size)
        return total if self.excess(step.key, loss) is None else total * torch.nan

    def add(self, bucket: str, loss: float) -> float | None:
        """Counts the loss of a step; returns its `excess`."""
        found = self.excess(bucket, loss)
        if math.isfinite(loss):
            self._recent[bucket].append(loss)
        return found


# ---------------------------------------------------------------------------------------- rewinding


class LeftOut(FileSchema):
    """Samples that a rewind leaves out: of a bucket's stream, from `position` on."""

    step: Positive
    loss: float
    bucket: str
    position: NonNegative
    samples: Positive


class Rewinds(FileSchema):
    """rewinds.json: what each rewind leaves out."""

    rewinds: tuple[LeftOut, ...]


def read_rewinds(run_dir: Path) -> list[dict[str, Any]]:
    """What earlier rewinds of the run leave out. ConfigError: rewinds.json is damaged."""
    path = run_dir / REWINDS
    return list(read_json(path, Rewinds)["rewinds"]) if path.is_file() else []


def positions_left_out(rewinds: Sequence[Mapping[str, Any]]) -> dict[str, list[range]]:
    """Positions of each bucket's stream, by its key, that the loader leaves out."""
    found: dict[str, list[range]] = defaultdict(list)
    for each in rewinds:
        found[each["bucket"]].append(range(each["position"], each["position"] + each["samples"]))
    return dict(found)


def rewind(run_dir: Path, train: TrainConfig, step: int, loss: float, data_step: Step, ranks: Ranks) -> None:
    """Writes down that the samples of `data_step` are left out from now on; collective. Diverged: for the
    (max_rewinds + 1)th time."""
    key = data_step.key

    def write() -> int:
        done = read_rewinds(run_dir)
        if len(done) < train.max_rewinds:
            left_out = {
                "step": step, "loss": loss, "bucket": key, "position": data_step.position[key] - data_step.samples,
                "samples": data_step.samples,
            }  # fmt: skip
            atomic_write(run_dir / REWINDS, json.dumps({"rewinds": [*done, left_out]}, indent=1))
        return len(done)

    if (done := ranks.broadcast(write)) >= train.max_rewinds:
        raise Diverged(
            f"step {step}: the loss is {loss:.4g}, a spike, after {done} rewinds; train.max_rewinds is {train.max_rewinds}. A lower "
            "learning rate or train.optimizer.max_grad_norm may help"
        )
