"""Steps that go wrong: gradients that are not finite, and loss spikes. What is logged of them, kept, and done."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from stdit.config import Config
from stdit.data.loader import Step
from stdit.errors import SaveError
from stdit.training.distributed import Ranks
from stdit.training.divergence import Diverged, SkippedSteps, find_bad_samples, keep_bad_batches
from stdit.training.resume import TrainState
from stdit.training.saving import Saver
from stdit.training.spikes import LossSpikes, Rewound, read_rewinds, rewind


class BadSteps:
    """Watches the steps of one run. Every method is collective."""

    def __init__(self, config: Config, ranks: Ranks, state: TrainState) -> None:
        self.config, self.ranks = config, ranks
        self.skipped = SkippedSteps(config.train, state.skipped_steps)
        self.spikes = LossSpikes(config.train, ranks, state.recent_losses)
        self.rewinds = ranks.broadcast(lambda: read_rewinds(config.run_dir))
        self._spike: float | None = None

    def metrics(
        self, step: int, data_step: Step, losses: Sequence[Tensor], mean_loss: float, finite: bool
    ) -> dict[str, Any]:
        """What is logged of a step. losses: of its samples, (B,) of each micro-batch. finite: its gradient, else its
        batches are kept (stdit.training.divergence)."""
        key = data_step.key
        logged: dict[str, Any] = {"rewinds": len(self.rewinds)} if self.rewinds else {}
        self.skipped.add(key, not finite)
        self._spike = self.spikes.add(key, mean_loss)
        if self._spike is not None:
            logged["spike"] = self._spike
        if finite:
            return logged
        logged["bad_steps"] = self.skipped.in_a_row
        batches = data_step.parts
        losses = torch.cat(list(losses)).split([len(part) for part in batches])
        if self._spike is None or self.config.train.on_spike != "skip":
            logged["bad_samples"], largest = find_bad_samples(batches, losses, self.ranks)
            if largest:
                logged["largest_losses"] = largest
            keep_bad_batches(self.config.run_dir, step, batches, losses, self.ranks)
        return logged

    def keep(self, state: TrainState) -> None:
        """Has the next checkpoint hold what is counted."""
        state.recent_losses, state.skipped_steps = self.spikes.recent, self.skipped.counts()

    def check(self, step: int, data_step: Step, mean_loss: float, saver: Saver) -> None:
        """After `metrics`. Diverged: too many steps were skipped, or spikes rewound. Rewound: this one is a spike, with
        `train.on_spike: rewind`; the engine is closed. Both on every rank, so that the checkpoint on its way is written
        before."""
        rewinds = self._spike is not None and self.config.train.on_spike == "rewind"
        try:
            self.skipped.check(step, last=step == self.config.train.steps)
            if rewinds:
                rewind(self.config.run_dir, self.config.train, step, mean_loss, data_step, self.ranks)
        except Diverged:
            with suppress(SaveError):
                saver.finish()
            raise
        if rewinds:
            saver.finish()
            saver.engine.close()
            raise Rewound(f"step {step}: back to the newest checkpoint, without the samples of this step")
