"""Tracking of a run on rank 0: metrics.jsonl, TensorBoard, Weights & Biases, progress bar."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from stdit.config import Config, ConfigError
from stdit.console import echo, printable
from stdit.media import write_png
from stdit.metrics_log import MetricsLog
from stdit.training.divergence import describe_bad_samples

if TYPE_CHECKING:
    from stdit.training.performance import Performance


def check_trackers(config: Config) -> None:
    """ConfigError: wandb_project is set and wandb is not installed."""
    if config.train.wandb_project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"train.wandb_project: {config.train.wandb_project!r}, but wandb is not installed (pip install stdit[wandb])"
        )


class Tracker:
    """Records one run from after `step`. On ranks other than 0 (`active` False) it writes nothing.

    A full disk or a terminal that is gone must not cost the run: what cannot be written is said once, by its path, and
    lines of metrics.jsonl are kept until they can be.
    """

    def __init__(self, config: Config, step: int, active: bool) -> None:
        self.active = active
        self.config, self.run_dir = config, config.run_dir
        self._log: MetricsLog | None = None
        self._board: Any = None
        self._wandb: Any = None
        self._warned: set[str] = set()
        # In a file or a pipe: a line every ten seconds.
        interval = 0.2 if sys.stderr.isatty() else 10.0
        self._bar = tqdm(
            total=config.train.steps, initial=step, desc=printable(config.name), unit="step", disable=not active,
            mininterval=interval, maxinterval=max(interval, 10.0), dynamic_ncols=True, file=Console(),
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

            # The same id again resumes the same W&B run.
            id = hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:16]
            self._wandb = wandb.init(
                project=config.train.wandb_project, name=config.name, id=id, resume="allow",
                dir=str(self.run_dir), config=config.model_dump(mode="json"),
            )  # fmt: skip

    def step(self, metrics: dict[str, Any], performance: Performance) -> bool:
        """Advances the progress bar by a step; logs its metrics and performance every `train.log_every` steps, at the
        last step, with a validation loss or a comparison with inference, and where weights were not updated. Returns
        whether it logged, the same on every rank."""
        step, train = metrics["step"], self.config.train
        bad_steps = metrics.get("bad_steps", 0)
        if "spike" in metrics:
            action = {"warn": "", "skip": "; no weights were updated", "rewind": "; back to the newest checkpoint"}
            self.print(
                f"step {step}: loss {metrics['loss']:.4g} is a spike, {metrics['spike']:.3g} robust standard deviations above the median of "
                f"the last ones of bucket {metrics['bucket']}{action[train.on_spike]} (train.on_spike {train.on_spike})"
            )
        if bad_steps and "bad_samples" in metrics:
            samples = describe_bad_samples(metrics["bad_samples"], metrics.get("largest_losses", ()))
            self.print(f"step {step}: gradient not finite; no weights were updated ({bad_steps} in a row); {samples}")
        validated = any(key in metrics for key in ("validation_loss", "inference_gap"))
        logged = bool(bad_steps) or "spike" in metrics or validated or is_due(train.log_every, step, train.steps)
        if logged:
            measured = performance.metrics(step, metrics["samples_seen"])
            if "slow_rank" in measured:
                rank, seconds = measured["slow_rank"], measured["slow_rank_seconds"]
                self.print(f"step {step}: rank {rank:.0f} is slow: {seconds:.3g} s a step for data and forward")
            self.log({**metrics, **measured})
        if self.active:
            self._bar.set_postfix({"loss": f"{metrics['loss']:.4f}"}, refresh=False)
            self._bar.update()
        return logged

    def log(self, metrics: dict[str, Any]) -> None:
        """Writes a line of metrics.jsonl, which must have "step"; numbers also go to TensorBoard and W&B."""
        if not self.active:
            return
        assert self._log is not None
        with self._tolerant("metrics.jsonl"):
            self._log.write(metrics)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        if self._board:
            with self._tolerant("tensorboard"):
                for key, value in numbers.items():
                    self._board.add_scalar(key, value, metrics["step"])
        if self._wandb:
            self._wandb.log(numbers, step=metrics["step"])

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Writes an image to samples/step-*.png and TensorBoard."""
        if not self.active:
            return
        with self._tolerant("samples"):
            write_png(self.run_dir / "samples" / f"step-{step:08d}.png", image)
        if self._board:
            with self._tolerant("tensorboard"):
                self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    @contextmanager
    def _tolerant(self, what: str) -> Iterator[None]:
        """Turns a failed write into a line, once for each of `what`."""
        try:
            yield
        except OSError as error:
            if what not in self._warned:
                self._warned.add(what)
                path = error.filename or self.run_dir / what
                self.print(f"{path}: {error.strerror or error}; training goes on, and says so once")

    def print(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self.active:
            self._bar.write(printable(line), file=Console())

    def close(self) -> None:
        self._bar.close()
        if self._log and self._log.pending:
            echo(f"{self._log.path}: {self._log.pending} lines could not be written", file=Console())
        for writer in (self._log, self._board):
            if writer:
                with self._tolerant("tensorboard"):
                    writer.close()
        if self._wandb:
            self._wandb.finish()


class Console:
    """stderr; what is written to a terminal or pipe that is gone is lost."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


def is_due(every: int | None, step: int, steps: int) -> bool:
    """Whether something that happens `every` n steps, and at the last one, happens at `step`."""
    return every is not None and (step == steps or step % every == 0)
