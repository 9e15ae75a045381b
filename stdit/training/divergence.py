"""Losses, gradients and weights that are not finite: which samples, how many steps may be skipped, what is never
saved."""

from __future__ import annotations

import contextlib
import json
import math
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from stdit.config import TrainConfig
from stdit.data.loader import Batch
from stdit.files import apply_umask
from stdit.training.distributed import Ranks

if TYPE_CHECKING:
    from stdit.training.ema import EMA
    from stdit.training.engine import Engine

# Shares of skipped steps are taken over this many steps. In a checkpoint each is a letter, this one if it was skipped.
WINDOW, SKIPPED = 100, "x"
# Samples named of a skipped step; skipped steps whose batches are kept.
MAX_NAMED, MAX_KEPT = 8, 8
# What a batch holds of its samples.
BATCH_TENSORS = (
    "mean",
    "std",
    "text",
    "text_mask",
    "class_labels",
    "fps",
    "height",
    "width",
    "control",
    "pooled",
    "vision",
)


class Diverged(RuntimeError):
    """Too many steps had a gradient that is not finite, or the weights are not. Raised on every rank."""

    shared = True


class SkippedSteps:
    """Counts steps whose gradient was not finite, so that no weights were updated.

    `check` raises Diverged after `train.max_bad_steps` in a row; also if, of the last 100 steps of the run or of one
    bucket, more than `max_bad_steps` and more than a share of `train.max_bad_share` were skipped. At a run's last step
    the share alone counts, from two steps on: a short run of nothing but NaN is no finished one.

    counts: `counts()` of the steps before, in a checkpoint; None: there were none.
    """

    def __init__(self, train: TrainConfig, counts: Mapping[str, Any] | None = None) -> None:
        self.limit, self.max_share = train.max_bad_steps, train.max_bad_share
        # Whether each of the last steps was skipped, of the run (None) and by bucket key; and totals.
        self._last: dict[str | None, deque[bool]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        counts = counts or {"in_a_row": 0, "last": "", "buckets": {}}
        self.in_a_row = int(counts["in_a_row"])
        for key, last in ((None, counts["last"]), *((key, each["last"]) for key, each in counts["buckets"].items())):
            self._last[key].extend(each == SKIPPED for each in last)
        for key, each in counts["buckets"].items():
            self._totals[key] = [each["skipped"], each["steps"]]

    def add(self, bucket: str, skipped: bool) -> None:
        """Counts one step of a bucket."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        for key in (None, bucket):
            self._last[key].append(skipped)
        self._totals[bucket][0] += skipped
        self._totals[bucket][1] += 1

    def counts(self) -> dict[str, Any]:
        """Content of identity.json's `skipped_steps`."""
        last = {key: "".join(SKIPPED if each else "." for each in recent) for key, recent in self._last.items()}
        buckets = {
            key: {"skipped": skipped, "steps": steps, "last": last[key]}
            for key, (skipped, steps) in self._totals.items()
        }
        return {"in_a_row": self.in_a_row, "last": last[None], "buckets": buckets}

    def check(self, step: int, last: bool = False) -> None:
        """Raises Diverged if too many steps were skipped. last: `step` is the run's last one."""
        if self.in_a_row > self.limit:
            raise Diverged(
                f"step {step}: {self.in_a_row} consecutive steps had a gradient that is not finite; train.max_bad_steps is {self.limit}"
            )
        limit = min(self.limit, 1) if last else self.limit
        for key, recent in sorted(self._last.items(), key=lambda item: item[0] is None):
            if (bad := sum(recent)) > limit and bad > self.max_share * len(recent):
                of = "" if key is None else f" of bucket {key}"
                raise Diverged(
                    f"step {step}: {bad} of the last {len(recent)} steps{of} had a gradient that is not finite, more than "
                    f"train.max_bad_share {self.max_share:g}"
                )

    def summary(self) -> str | None:
        """One line on all skipped steps by bucket; None if there were none."""
        parts = [f"{bad} of {all_} of bucket {key}" for key, (bad, all_) in self._totals.items() if bad]
        return f"skipped steps, whose gradient was not finite: {', '.join(parts)}" if parts else None


def find_bad_samples(batches: Sequence[Batch], losses: Sequence[Tensor], ranks: Ranks) -> tuple[list[str], list[str]]:
    """Samples of a step, of all ranks: id, bucket, source file and caption of those whose loss is not finite; if there
    are none (the gradient overflowed), also of the MAX_NAMED with the largest losses; collective.

    losses: of each sample of each batch, (B,).
    """
    found: list[tuple[float, str]] = []
    for batch, loss in zip(batches, losses, strict=True):
        for i, value in enumerate(loss.tolist()):
            file = f", {batch.paths[i]}" if batch.paths[i] else ""
            name = f"sample {batch.ids[i]} (bucket {batch.bucket.key}{file}, {batch.captions[i][:80]!r})"
            found.append((value, name))
    bad = [name for value, name in found if not math.isfinite(value)]
    largest = sorted(((value, name) for value, name in found if math.isfinite(value)), reverse=True)[:MAX_NAMED]
    gathered = ranks.gather((bad, largest))
    # Ranks that share a clip's tokens find the same ones.
    if names := list(dict.fromkeys(name for theirs, _ in gathered for name in theirs)):
        return names, []
    every = sorted({each for _, theirs in gathered for each in theirs}, reverse=True)
    return [], [f"{name}, loss {value:.4g}" for value, name in every[:MAX_NAMED]]


def keep_bad_batches(
    run_dir: Path, step: int, batches: Sequence[Batch], losses: Sequence[Tensor], ranks: Ranks
) -> None:
    """Writes this rank's micro-batches with a loss that is not finite, or if there are none on any rank all of them, to
    RUN_DIR/bad_batches/step-STEP-rank-RANK-N.safetensors, of the first MAX_KEPT bad steps; collective.

    Metadata: step, bucket; ids, positions, losses, captions and source files of the samples as JSON. What cannot be
    written is lost.
    """
    folder = run_dir / "bad_batches"
    bad = [not bool(loss.isfinite().all()) for loss in losses]
    any_bad, kept = (
        any(ranks.gather(any(bad))),
        ranks.broadcast(lambda: len({p.name[:13] for p in folder.glob("step-*")})),
    )
    if ranks.sequence_rank or kept >= MAX_KEPT:
        return
    for number, (batch, loss) in enumerate(zip(batches, losses, strict=True)):
        if any_bad and not bad[number]:
            continue
        tensors = {name: value for name in BATCH_TENSORS if (value := getattr(batch, name)) is not None}
        facts = {
            "ids": batch.ids, "positions": batch.positions, "losses": [str(each) for each in loss.tolist()],
            "captions": batch.captions, "paths": batch.paths,
        }  # fmt: skip
        metadata = {"step": str(step), "bucket": batch.bucket.key, "samples": json.dumps(facts)}
        path = folder / f"step-{step:08d}-rank-{ranks.rank}-{number}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):
            folder.mkdir(exist_ok=True)
            save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
            apply_umask(folder)


def describe_bad_samples(bad: Sequence[str], largest: Sequence[str]) -> str:
    """What `find_bad_samples` has found, in one line."""
    if not bad:
        return f"every sample's loss is finite: the gradient overflowed; the largest losses: {'; '.join(largest)}"
    more = f" and {len(bad) - MAX_NAMED} more" if len(bad) > MAX_NAMED else ""
    return f"loss not finite: {'; '.join(bad[:MAX_NAMED])}{more}"


def check_finite(engine: Engine, ema: EMA, step: int, ranks: Ranks) -> None:
    """Diverged, on all ranks, if master weights, optimizer state or EMA hold NaN or infinity on any of them;
    collective."""
    weights, average = (float(not all(map(_is_finite, each))) for each in (engine.state_tensors(), ema.averages()))
    bad = ranks.all_reduce(weights, average)
    names = [name for name, count in zip(("weights or optimizer state", "EMA weights"), bad, strict=True) if count]
    if names:
        raise Diverged(
            f"step {step}: the {' and the '.join(names)} are not finite, and are not saved. Earlier checkpoints are kept; "
            "a lower learning rate or train.optimizer.max_grad_norm may help"
        )


def _is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite. Those make the sum so, which takes one pass and no memory; a sum may also
    overflow."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
