"""What a run records: metrics.jsonl always, TensorBoard and W&B if wanted, and a progress bar. Rank 0 alone."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from typing import Any

from tqdm import tqdm

from stdit.config import Config, ConfigError
from stdit.files import atomic_write
from stdit.metrics_log import MetricsLog


def check_trackers(config: Config) -> None:
    """ConfigError: W&B is wanted and not installed. Before a run starts."""
    if config.train.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb_project: {config.train.wandb_project!r}, but wandb is not installed (pip install stdit[wandb])"
        )


class Tracker:
    """Records of one run, beginning after `step`. On ranks other than the first (`active` False) it does nothing."""

    def __init__(self, config: Config, step: int, active: bool) -> None:
        self.active = active
        self.run_dir = config.run_dir
        self._log: MetricsLog | None = None
        self._board: Any = None
        self._wandb: Any = None
        # In a file or a pipe one line every ten seconds, not ten a second.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=config.train.steps, initial=step, desc=config.name, unit="step", disable=not active,
            mininterval=interval, maxinterval=max(interval, 10.0), dynamic_ncols=True,
        )  # fmt: skip
        if not active:
            return
        self._log = MetricsLog(self.run_dir, step)
        if config.train.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(
                str(self.run_dir / "tensorboard"), purge_step=step + 1 if step else None, flush_secs=30
            )
        if config.train.wandb_project:
            import wandb  # pyright: ignore[reportMissingImports]

            # The same id again continues the same W&B run.
            name = hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=config.train.wandb_project, name=config.name, id=name, resume="allow",
                dir=str(self.run_dir), config=config.model_dump(mode="json"),
            )  # fmt: skip

    def log(self, entry: dict[str, Any]) -> None:
        """One line of metrics.jsonl, which must have "step"; numbers also go to TensorBoard and W&B."""
        if not self.active:
            return
        assert self._log is not None
        self._log.write(entry)
        numbers = {k: v for k, v in entry.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        if self._board:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, entry["step"])
        if self._wandb:
            self._wandb.log(numbers, step=entry["step"])

    def picture(self, name: str, image: Any, step: int) -> None:
        """A PIL image, as samples/step-*.png and in TensorBoard."""
        if not self.active:
            return
        import io

        import numpy as np

        held = io.BytesIO()
        image.save(held, format="PNG")
        atomic_write(self.run_dir / "samples" / f"step-{step:08d}.png", held.getvalue())
        if self._board:
            self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def advance(self, **shown: str) -> None:
        """One step further on the progress bar, with `shown` behind it."""
        if self.active:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def say(self, line: str) -> None:
        """A line for people, above the progress bar."""
        if self.active:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        for held in (self._log, self._board):
            if held:
                held.close()
        if self._wandb:
            self._wandb.finish()
