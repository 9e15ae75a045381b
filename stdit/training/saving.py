"""Saving a run's checkpoints, in the background where train.checkpoint_in_background says so: training waits for a copy
of this rank's weights and optimizer state in host memory, and goes on while a thread writes it.

    saver.save(last=False)      every rank copies its state; its thread writes the rank's files and then a mark of their
                                hashes rank 0's thread waits for all marks, joins the partitions to full weights, and
                                completes the checkpoint (stdit.training.checkpoint)
    saver.finish()              what became of it, on all ranks

Threads never communicate: other ranks' parts are read from the folder. One checkpoint at a time is on its way; until it
is complete it counts for nothing. DeepSpeed's own background writers are not used: `decoupled` has hung for ever
(DeepSpeed #7741), and all of them stop training until the files are written.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stdit.config import Config
from stdit.errors import CheckpointError, SaveError
from stdit.files import atomic_write
from stdit.models.fine_tuning import submodels
from stdit.training import adapters, checkpoint, ema_snapshots
from stdit.training.checkpoint import FOLDER, IDENTITY, Weights, folder_of_step
from stdit.training.data import TrainData
from stdit.training.distributed import Ranks
from stdit.training.divergence import check_finite
from stdit.training.ema import EMA
from stdit.training.ema_snapshots import profile_name
from stdit.training.engine import Engine, ShardWriter
from stdit.training.out_of_memory import is_out_of_memory
from stdit.training.resume import TrainState, first_line
from stdit.training.snapshot import HostCopies, MasterLayout, full_weights

# Rank 0's thread looks for the other ranks' marks so often.
POLL_S = 0.05
# Where the run ends by an error, rank 0 waits for the other ranks' files as long as they change at least so often.
ORPHAN_S = 20.0


class NotWritten(SaveError):
    """A checkpoint that could not be written, raised on every rank."""

    shared = True


class Saver:
    """Saves the checkpoints of one run. `save` and `finish` are collective. Use as a context manager, or `close` it.

    A checkpoint that cannot be written (a full disk, a lost share) is said and left out, `train.max_failed_saves` times
    in a row; earlier ones are intact. NotWritten, on all ranks: one time too many, or the run's last one. Diverged, on
    all ranks and before anything is written: weights, EMA or optimizer state are not finite.
    """

    def __init__(
        self,
        engine: Engine,
        ema: EMA,
        config: Config,
        data: TrainData,
        state: TrainState,
        ranks: Ranks,
        say: Callable[[str], None],
        watched: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """watched: `Watchdog.saving`, under which all is waited for."""
        self.engine, self.ema, self.config, self.data, self.state, self.ranks = engine, ema, config, data, state, ranks
        self.say, self._watched = say, watched
        self.failed_in_a_row = 0
        # Seconds that this rank's threads have written while training went on.
        self.background_seconds = 0.0
        self._copies = HostCopies(pinned=ranks.device.type == "cuda")
        self._layout: MasterLayout | None = None
        self._write: Write | None = None

    @property
    def status(self) -> tuple[float, float]:
        """(1 while this rank writes, 1 if it has failed): to be summed over the ranks at each step, for `is_over`."""
        write = self._write
        return float(write is not None and write.is_alive()), float(write is not None and write.error is not None)

    def is_over(self, writing: float, failed: float) -> bool:
        """Whether the ranks' `status`, summed, says that the checkpoint on its way is complete or lost: `finish` has
        not to wait."""
        return self._write is not None and (not writing or failed > 0)

    def save(self, last: bool) -> Path | None:
        """Saves a checkpoint of this step, or begins to. last: the run ends here, so that it must be written at once.
        Returns the newest checkpoint that was completed meanwhile, if any: this one, or the one before it."""
        before = self.finish()
        background = self.config.train.checkpoint_in_background and not last

        def write() -> Path | None:
            self._begin(background)
            return None if background else self._finish()

        return self._attempt(write, last) or before

    def finish(self) -> Path | None:
        """Waits for the checkpoint on its way, if any; returns it if it was written."""
        return self._attempt(self._finish, last=False)

    def close(self) -> None:
        """Where the run ends by an error, without `finish`: waits for a checkpoint that is being written."""
        if self._write is not None:
            with self._watched():
                self._write.outlive()
            if self._write.error is not None:
                self.say(f"{self._write.folder}: the checkpoint was not written ({first_line(self._write.error)})")
            self._write = None

    def _attempt(self, write: Callable[[], Path | None], last: bool) -> Path | None:
        """The checkpoint that `write` completes, None if there is none. NotWritten: it failed and must not, or one time
        too many."""
        try:
            with self._watched():
                saved = write()
        except NotWritten as error:
            self.failed_in_a_row += 1
            limit = self.config.train.max_failed_saves
            if last or self.failed_in_a_row > limit:
                raise
            self.say(
                f"WARNING: {error}. Training goes on without it ({self.failed_in_a_row} in a row; train.max_failed_saves is {limit})"
            )
            return None
        if saved is not None:
            self.failed_in_a_row = 0
        return saved

    def _begin(self, background: bool) -> None:
        """Collects what is to be written, copied if training goes on, and starts to write it."""
        check_finite(self.engine, self.ema, self.state.step, self.ranks)
        folder = self.config.run_dir / FOLDER / folder_of_step(self.state.step)
        partial = checkpoint.partial_folder(folder)
        self._agree(folder, lambda: self.ranks.is_main and checkpoint.start_partial(partial))
        if self._layout is None:
            self._layout = self.engine.master_layout()
        self._copies.begin()
        keep: Callable[[Any], Any] = self._copies.copy if background else lambda state: state
        try:
            shards = self.engine.save(partial.parent, partial.name, keep)
        except RuntimeError as error:  # in a collective: it cannot go on
            raise SaveError(_message(folder, _cause(error, folder.parent))) from error
        write = Write(self, folder, self._layout, shards, background)

        def collect() -> None:
            try:
                if shards.error is not None:
                    raise shards.error
                write.collect(keep)
            finally:
                self._copies.end()

        self._agree(folder, collect, partial)
        self._write = write
        write.start()

    def _finish(self) -> Path | None:
        """As `finish`, which says what is what. NotWritten, on all ranks: a file could not be written on one of
        them."""
        if self._write is None:
            return None
        write, self._write = self._write, None
        write.written.wait()
        partial = checkpoint.partial_folder(write.folder)
        try:
            self._agree(write.folder, write.raise_error)
        except NotWritten:
            write.abandon()
            self._remove(partial)
            raise
        write.join()
        if write.background:
            self.background_seconds += write.seconds
        self._agree(write.folder, write.raise_error, partial)
        if write.remark:
            self.say(f"WARNING: {write.remark}")
        return write.folder

    def _agree(self, folder: Path, files: Callable[[], object], partial: Path | None = None) -> None:
        """Runs `files` on every rank. If one fails: NotWritten on all of them, without `partial`, what there is of the
        checkpoint."""
        reason = None
        try:
            files()
        except Exception as error:  # whatever torch, safetensors and diffusers raise where a file cannot be written
            reason = str(error) if isinstance(error, CheckpointError) else _cause(error, folder.parent)
        if failed := {rank: said for rank, said in enumerate(self.ranks.gather(reason)) if said is not None}:
            rank, said = next(iter(failed.items()))
            if partial is not None:
                self._remove(partial)
            raise NotWritten(_message(folder, said, f" on rank {rank}" if self.ranks.size > 1 else ""))

    def _remove(self, partial: Path) -> None:
        """Removes what there is of a checkpoint: it takes the room that the next one needs."""
        if self.ranks.is_main:
            with suppress(OSError, CheckpointError):
                checkpoint.remove_partial(partial)


class Write(threading.Thread):
    """Writes one rank's part of a checkpoint; on rank 0 also completes it, when every rank has written its part."""

    def __init__(self, saver: Saver, folder: Path, layout: MasterLayout, shards: ShardWriter, background: bool) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self.background = background
        self.folder, self.partial, self.layout, self.shards = folder, checkpoint.partial_folder(folder), layout, shards
        self.engine, self.config, self.state, self.ranks = saver.engine, saver.config, saver.state, saver.ranks
        self._saver = saver
        self._weights: dict[str, Any] = {}
        self._identity = ""
        # What this rank has to write is written, or could not be.
        self.written = threading.Event()
        self.error: Exception | None = None
        # What went wrong after the checkpoint was complete.
        self.remark = ""
        self.seconds = 0.0
        self._abandoned = threading.Event()

    def collect(self, keep: Callable[[Any], Any]) -> None:
        """Takes the weights, their average and the run's state by `keep`."""
        if self.ranks.is_main or self.layout.partitioned:
            ema = self._saver.ema
            model = [m.detach() for m in self.engine.masters()]
            profiles = {profile_name(sigma_rel): average for sigma_rel, average in ema.profiles.items()}
            self._weights = keep({"model": model, "ema": ema.average, **profiles, "buffers": self.engine.buffers()})
        if self.ranks.is_main:
            self._identity = json.dumps(
                make_identity(self.engine, self.config, self._saver.data, self.state, self.ranks.size),
                indent=1,
                allow_nan=False,
            )

    def run(self) -> None:
        start = time.perf_counter()
        try:
            self._write_part()
            self.written.set()
            if self.ranks.is_main and (files := self._files_of_all()) is not None:
                self._complete(files)
        except Exception as error:  # as in Saver._agree
            self.error = error
        finally:
            self._weights = {}
            self.seconds = time.perf_counter() - start
            self.written.set()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Ends waiting for the other ranks."""
        self._abandoned.set()
        self.join()

    def outlive(self) -> None:
        """Waits for the end; on rank 0, whose other ranks may be dead, as long as files of the checkpoint change."""
        files, since = set(), time.monotonic()
        while self.is_alive():
            if self.written.is_set() and (now := checkpoint.unfinished_files(self.config.run_dir)) != files:
                files, since = now, time.monotonic()
            if self.written.is_set() and time.monotonic() - since > ORPHAN_S:
                self.abandon()
            self.join(POLL_S)

    def _write_part(self) -> None:
        files = self.shards.write()
        if self.layout.partitioned and not self.ranks.is_main:
            torch.save(self._weights, checkpoint.rank_partition(self.partial, self.ranks.rank))
        checkpoint.write_rank_mark(self.partial, self.ranks.rank, files)

    def _files_of_all(self) -> dict[str, dict[str, Any]] | None:
        """Every rank's files, once they are written; None if that is abandoned."""
        while (files := checkpoint.read_rank_marks(self.partial, self.ranks.size)) is None:
            if self._abandoned.wait(POLL_S):
                raise CheckpointError(f"{self.folder}: other ranks have not written their part")
        return files

    def _complete(self, files: dict[str, dict[str, Any]]) -> None:
        """Adds full weights and identity, turns the partial folder into `folder`, and removes old checkpoints."""
        train = self.config.train
        for weights in ("model", "ema"):
            self._write_full(weights)
        self._write_profiles()
        checkpoint.remove_rank_marks(self.partial)
        atomic_write(self.partial / IDENTITY, self._identity)
        checkpoint.complete(self.partial, self.folder, files)
        self.state.intact.add(self.folder)
        try:
            checkpoint.prune(
                self.config.run_dir, train.keep_checkpoints, self.state.intact, train.keep_every, train.keep_best
            )
        except (OSError, ValueError) as error:  # this checkpoint is complete all the same
            self.remark = f"{self.folder} is written, but older checkpoints could not be removed ({first_line(error)})"

    def _write_full(self, weights: Weights) -> None:
        """Writes full weights, or their average."""
        folder = checkpoint.weights_folder(checkpoint.config_kind(self.config.train), weights)
        full = self._full(weights)
        adapters.save_trained(self.engine.module, full | self._buffers(), self.partial / folder)
        if weights == "ema" and self.config.train.alignment is not None:
            adapters.save_head(full, self.partial)

    def _write_profiles(self) -> None:
        """Writes the EMA's profiles, and their snapshot if it is due: before the checkpoint is complete, as what
        resumes from that does not come by this step again."""
        ema, step = self.config.train.ema, checkpoint.step_of(self.folder)
        due = ema_snapshots.is_due(ema, step, self.config.train.steps)
        with ema_snapshots.new_snapshot(self.config.run_dir, step) if due else nullcontext() as snapshot:
            for name in map(profile_name, ema.widths):
                self._write_profile(name, snapshot)
            if snapshot is not None:
                atomic_write(snapshot / IDENTITY, self._identity)

    def _write_profile(self, name: str, snapshot: Path | None) -> None:
        full = self._full(name)
        ema_snapshots.write_profile(self.partial, name, full)
        if snapshot is not None:
            adapters.save_trained(self.engine.module, ema_snapshots.half(full) | self._buffers(), snapshot / name)

    def _full(self, weights: str) -> dict[str, Tensor]:
        """Full weights, or an average of them, by name, from all ranks' parts. Those that one rank has whole are views
        of its file, mapped: none may be left when that is removed (`remove_rank_marks`), or NFS keeps it in the folder
        under another name."""
        parts: list[dict[str, Any]] = [self._weights]
        if self.layout.partitioned:
            others = (checkpoint.rank_partition(self.partial, rank) for rank in range(1, self.ranks.size))
            parts += [torch.load(path, map_location="cpu", mmap=True, weights_only=True) for path in others]
        full = full_weights(self.layout, [part[weights] for part in parts])
        return {name: tensor.cpu() for name, tensor in full.items()}

    def _buffers(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in self._weights["buffers"].items()}


def make_identity(engine: Engine, config: Config, data: TrainData, state: TrainState, ranks: int) -> dict[str, Any]:
    """identity.json of the checkpoint of `state`."""
    architecture = submodels(engine.module)[0].config
    return checkpoint.make_identity(
        config,
        architecture={k: v for k, v in architecture.items() if not k.startswith("_")},
        data={
            "video_encoder": data.video_encoder,
            "text_encoder": data.text_encoder,
            "classes": list(data.classes),
            "features": data.fingerprint,
            "frame_rates": data.frame_rates,
            "frame_sampling": data.frame_sampling and data.frame_sampling.model_dump(mode="json"),
        },
        step=state.step,
        samples_seen=state.samples_seen,
        data_position=state.data_position,
        world_size=ranks,
        base=state.base and asdict(state.base),
        validation_loss=state.validation_loss,
        recent_losses=state.recent_losses,
        skipped_steps=state.skipped_steps,
    )


def _message(folder: Path, reason: str, where: str = "") -> str:
    return (
        f"{folder}: the checkpoint could not be written{where} ({reason}). Earlier checkpoints are intact: the same command resumes "
        "from them"
    )


# torch and safetensors report a failed write without its cause; a file of this size, written there, tells.
_PROBE_BYTES = 2**20


def _cause(error: Exception, folder: Path) -> str:
    """Cause of a failed save: the file system's own error, if writing to `folder` fails; else what `error` says."""
    free = "its disk is gone"
    try:
        free = f"{shutil.disk_usage(folder.parent).free / 2**20:,.0f} MiB are free"
        atomic_write(folder / ".probe", bytes(_PROBE_BYTES))
        (folder / ".probe").unlink()
    except OSError as failed:
        full = failed.errno in (errno.ENOSPC, errno.EDQUOT)
        return f"{failed.strerror}; {free}: make room" if full else str(failed.strerror)
    text = f"{type(error).__name__}: {first_line(error)}"
    if is_out_of_memory(error):
        return f"{text}; train.checkpoint_in_background: false writes without a copy"
    if isinstance(error, OSError) or "writ" in text.lower():  # the file that did not fit may have been larger
        return f"{text}; {free}"
    if isinstance(error, dist.DistError) or "connection" in text.lower():
        return f"{text}; another rank has died, and its own message says why"
    return text
