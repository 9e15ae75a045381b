"""Resuming a run: TrainState, checks of a changed config, loading of checkpoints.

They are written by stdit.training.saving; what makes a folder complete is in stdit.training.checkpoint, the run's other
files are in stdit.training.run_dir.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from stdit.config import Config, ConfigError, validate
from stdit.config.diff import TRAINING_RUNTIME_KEYS, changes, global_batch_sizes, matches
from stdit.console import echo
from stdit.errors import CheckpointError
from stdit.models.alignment import Aligned
from stdit.models.control import Controlled
from stdit.models.fine_tuning import add_trainable
from stdit.models.stdit import STDiT
from stdit.training import adapters, checkpoint, ema_snapshots
from stdit.training.adapters import Base
from stdit.training.checkpoint import TRANSFORMER
from stdit.training.data import TrainData
from stdit.training.deferred import DeferredTensors, freed_memory_returned
from stdit.training.distributed import Ranks
from stdit.training.ema import EMA
from stdit.training.engine import Engine, unreadable_shard
from stdit.training.mup import scale_init
from stdit.training.optimizer import last_stable_step
from stdit.training.out_of_memory import is_out_of_memory
from stdit.training.universal import convert, open_states

# Universal copy of a checkpoint, for another number of ranks or ZeRO stage; removed once loaded.
UNIVERSAL = ".universal"
# Changes that a resumed run may have: all that leave the weights alone, and the length of the run.
RESUME_KEYS = (
    *TRAINING_RUNTIME_KEYS,
    "train.steps",
    "train.on_spike",
    "train.spike_threshold",
    "train.max_rewinds",
)
# What shapes wsd's decay, which a run may choose until it begins.
DECAY_KEYS = ("train.steps", "train.optimizer.decay_share", "train.optimizer.min_lr_ratio")
# Keys that may change where the samples of a step stay the same.
_SIZES = (
    ".batch_size", ".global_batch", ".tokens", ".gradient_accumulation",
    ".tokens_per_step", ".tokens_per_micro_batch", ".samples_multiple_of",
)  # fmt: skip


@dataclass
class TrainState:
    """Progress of a run, and the checkpoint it resumes from."""

    step: int = 0
    samples_seen: int = 0
    data_position: dict[str, int] = field(default_factory=dict)
    checkpoint: Path | None = None
    # Number of ranks that wrote the checkpoint, and their ZeRO stage.
    world_size: int = 1
    zero_stage: int = 0
    # For the log: config changes since the checkpoint, and what was loaded from elsewhere.
    notes: list[str] = field(default_factory=list)
    report: list[str] = field(default_factory=list)
    # Frozen weights of adapters or a control branch.
    base: Base | None = None
    # Checkpoints that this run has written or verified.
    intact: set[Path] = field(default_factory=set)
    # Of the last step, if it had one; the last losses of each bucket; and the counts of
    # stdit.training.divergence.SkippedSteps.
    validation_loss: float | None = None
    recent_losses: dict[str, list[float]] = field(default_factory=dict)
    skipped_steps: dict[str, Any] | None = None

    def advance(self, samples: int, data_position: dict[str, int]) -> None:
        """Counts one step of `samples` samples."""
        self.step += 1
        self.samples_seen += samples
        self.data_position = data_position

    def has_other_ranks(self, zero_stage: int, world_size: int) -> bool:
        """Whether the checkpoint's shards are of this ZeRO stage, but partitioned for another number of ranks."""
        return self.checkpoint is not None and self.zero_stage == zero_stage > 0 and self.world_size != world_size


# ----------------------------------------------------------------------------------------- resuming


def is_finished(config: Config, data: TrainData, world_size: int) -> bool:
    """Whether done.json says that the run is complete, and its checkpoint is intact. ConfigError: run_dir holds another
    run."""
    folder = checkpoint.find_final(config.run_dir, config.train.steps)
    if folder is None:
        return False
    check_resumable(checkpoint.load_identity(folder), config, world_size, data.fingerprint)
    if os.environ.get("RANK", "0") == "0":
        step = checkpoint.step_of(folder)
        echo(f"{config.run_dir}: done already, at step {step} of {config.train.steps}", file=sys.stderr)
    return True


def restore(
    config: Config, data: TrainData, ranks: Ranks, prepare: Callable[[nn.Module], nn.Module]
) -> tuple[TrainState, Engine, EMA]:
    """State, engine and EMA of the newest checkpoint that can be loaded, else of a new run; collective.

    A checkpoint that is intact and yet cannot be loaded is reported, and the one before it taken; it is set aside once
    that one has been loaded. prepare: applies the run's settings to the model. ConfigError: the checkpoint is of a run
    with other settings. CheckpointError: none of those there can be used.
    """
    unusable: dict[Path, str] = {}
    while True:
        state = ranks.broadcast(lambda: find_resume_state(config, data, ranks.size, unusable))
        try:
            init, stage = find_init(config, state, ranks), config.train.zero_stage
            if init is not None and state.checkpoint is None:
                state.report += ranks.broadcast(partial(encoder_notes, init, data))
            universal = state.has_other_ranks(stage, ranks.size)
            deferred = DeferredTensors() if stage == 3 else None
            with freed_memory_returned() if deferred else nullcontext():
                with deferred or nullcontext():
                    model = build_model(config, state, init)
                engine = Engine(prepare(model), config, ranks, universal, deferred)
            # Copies the masters, which hold a checkpoint's EMA until load_checkpoint.
            ema = EMA(engine.masters, config.train.ema)
            load_profiles(ema, engine, state)
            load_checkpoint(engine, state, ranks)
            loaded, reason = (engine, ema), None
        except Exception as error:  # whatever torch, DeepSpeed and safetensors raise for files that they can't use
            if isinstance(error, ConfigError) or state.checkpoint is None or is_out_of_memory(error):
                raise
            loaded, reason = None, f"it cannot be loaded ({type(error).__name__}: {first_line(error)})"
        reasons = [found for found in ranks.gather(reason) if found]
        if loaded is not None and not reasons:
            ranks.broadcast(partial(clean_up, config, state))
            return state, *loaded
        assert state.checkpoint is not None
        unusable[state.checkpoint] = reasons[0]


def find_resume_state(
    config: Config, data: TrainData, world_size: int, unusable: Mapping[Path, str] = MappingProxyType({})
) -> TrainState:
    """State of the newest intact checkpoint in `config.run_dir`, else of a new run. Reports skipped checkpoints.

    unusable: checkpoints that could not be loaded, with the reason. ConfigError: the checkpoint is of a run with other
    settings. CheckpointError: all completed ones are damaged.
    """

    def reason(folder: Path) -> str | None:
        try:
            return unusable.get(folder) or checkpoint.verify(folder) or unreadable_shard(folder)
        except ConfigError as error:  # of identity.json, intact as it is: written by another version, say
            return first_line(error)

    latest = checkpoint.find_latest(config.run_dir, reason)
    checkpoint.check_in_the_way(config.run_dir, latest)
    if latest is None:
        return TrainState()
    identity = checkpoint.load_identity(latest)
    return TrainState(
        step=identity["step"],
        samples_seen=identity["samples_seen"],
        data_position=identity["data_position"],
        checkpoint=latest,
        world_size=identity["world_size"],
        zero_stage=identity["config"]["train"]["zero_stage"],
        notes=check_resumable(identity, config, world_size, data.fingerprint),
        base=Base(**identity["base"]) if identity.get("base") else None,
        intact={latest},
        recent_losses=identity["recent_losses"],
        skipped_steps=identity["skipped_steps"],
    )


def clean_up(config: Config, state: TrainState) -> None:
    """Removes what interrupted saves have left, and sets damaged checkpoints and snapshots newer than `state` aside."""
    checkpoint.remove_partials(config.run_dir)
    ema_snapshots.prepare(config.run_dir, state.step)
    if state.checkpoint is not None:
        checkpoint.set_aside_damaged(config.run_dir, state.checkpoint)


# Where an encoder lies and how it computes, of what identifies it.
NOT_FEATURES = ("path", "subfolder", "dtype", "frames_at_once")


def check_resumable(identity: dict[str, Any], config: Config, world_size: int, features_fingerprint: str) -> list[str]:
    """Lists the config's permitted changes since the checkpoint of `identity`.

    ConfigError lists every change that would make it another run: architecture, data, optimizer. Batch sizes and
    accumulation may change with the number of ranks if the global batch stays the same; the number of ranks alone may
    change the global batch, which is listed. init.source may change where the base is recorded (adapters, control
    branches): its fingerprint is compared when it is loaded.
    """
    old = validate(identity["config"], Config, "the checkpoint's config")
    before, now = global_batch_sizes(old, identity["world_size"]), global_batch_sizes(config, world_size)
    wrong, notes, wsd = [], [], config.train.optimizer.lr_schedule == "wsd"
    stable = min(last_stable_step(c.train.optimizer, c.train.steps) for c in (old, config))
    for change in changes(old.model_dump(mode="json"), config.model_dump(mode="json")):
        allowed = matches(change.key, RESUME_KEYS)
        if before == now and change.key.endswith(_SIZES):
            allowed = True
        if change.key == "init.source" and identity.get("base"):
            allowed = True
        if wsd and change.key in DECAY_KEYS:
            allowed = identity["step"] <= stable
            if not allowed:
                wrong.append(
                    f"{change} (wsd: the decay began after step {stable}; lengthen a checkpoint up to that one)"
                )
                continue
        (notes if allowed else wrong).append(str(change))
    if identity["features"] != features_fingerprint:
        wrong.append(
            f"data.features: not the features of the checkpoint (fingerprint {identity['features'][:12]}… -> {features_fingerprint[:12]}…)"
        )
    if wrong:
        lines = "\n  ".join(wrong)
        raise ConfigError(
            f"{config.run_dir} holds a run with other settings (step {identity['step']}, checkpoint -> now):\n  {lines}\n"
            "Resume with the old ones, take another run_dir, or start from its weights with init.source"
        )
    if before != now:
        notes.append(f"global batch: {before} on {identity['world_size']} ranks -> {now} on {world_size} ranks")
    elif identity["world_size"] != world_size:
        notes.append(f"ranks: {identity['world_size']} -> {world_size}; the global batch is the same")
    return notes


def init_folder(config: Config) -> Path:
    """Weights folder of `init.source`. ConfigError: there is none."""
    assert config.init is not None
    try:
        return adapters.resolve_weights(config.init.source, config.init.weights)
    except (ConfigError, CheckpointError) as error:
        raise ConfigError(f"init.source: {error}") from error


def find_init(config: Config, state: TrainState, ranks: Ranks) -> Path | None:
    """Folder of the weights of init.source, if the model begins with them; of frozen ones also sets `state.base`.
    Collective."""
    fine_tunes = config.train.lora is not None or config.train.control is not None
    if config.init is None or (state.checkpoint is not None and not fine_tunes):
        return None
    # On rank 0 alone: it hashes every byte.
    if state.base is not None:
        recorded = state.base
        folder = ranks.broadcast(lambda: adapters.find_base(recorded, config))
        state.base = Base(str(folder.resolve()), recorded.fingerprint)  # it may have moved
    else:
        folder = ranks.broadcast(lambda: init_folder(config))
        state.base = ranks.broadcast(lambda: adapters.make_base(folder)) if fine_tunes else None
    return folder


def encoder_notes(init: Path, data: TrainData) -> list[str]:
    """What differs between the autoencoder and text encoder of the run that the weights `init` come from, and today's:
    weights of the same shape load, and have to learn the new inputs. Empty: nothing, or not known (a diffusers
    folder)."""
    if not (init.parent / checkpoint.IDENTITY).is_file():
        return []
    identity, found = checkpoint.identity_beside(init), []
    for key, now in (("video_encoder", data.video_encoder), ("text_encoder", data.text_encoder)):
        then = identity[key]
        if key == "text_encoder" and identity["architecture"].get("text_dim") is None:
            continue
        if then is None or now is None or "synthetic" in (then.get("kind"), then["class"]):
            continue
        differing = [str(change) for change in changes(then, now) if change.key not in NOT_FEATURES]
        if differing:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            found.append(f"note: init.source was trained with another {key}: {', '.join(differing[:3])}{more}")
    return found


def build_model(config: Config, state: TrainState, init: Path | None) -> STDiT | Controlled | Aligned:
    """Model for the engine; what was loaded goes to `state.report`. Of a checkpoint it holds the EMA weights, which
    stdit.training.ema copies before the weights themselves are loaded; with init (`find_init`) those of another run;
    else new ones. Frozen weights need no gradient."""
    if init is None and state.checkpoint is not None:
        model = add_trainable(STDiT.from_pretrained(state.checkpoint / TRANSFORMER["ema"]), config.train)
        if isinstance(model, Aligned):
            adapters.load_head(model, state.checkpoint)
        return model
    if init is None:
        model = add_trainable(STDiT.from_settings(config.model, config.seed), config.train, config.seed)
        if (mup := config.train.optimizer.mup) is not None:
            scale_init(model, mup.base_width, config.seed)
        return model
    base, report = adapters.load_base(init, config)
    state.report.append(report)
    if state.checkpoint is None:
        model = add_trainable(base, config.train, config.seed)
    else:
        weights = checkpoint.weights_folder(checkpoint.config_kind(config.train), "ema")
        model = adapters.load_trainable(base, state.checkpoint / weights, config)
    if config.train.lora is not None or config.train.control is not None:
        trainable, frozen = (
            sum(p.numel() for p in model.parameters() if p.requires_grad is flag) for flag in (True, False)
        )
        state.report.append(f"{trainable:,} trainable parameters, {frozen:,} frozen")
    return model


def load_profiles(ema: EMA, engine: Engine, state: TrainState) -> None:
    """Sets the EMA's profiles to those of `state.checkpoint`, if any; a weight at a time."""
    if state.checkpoint is None:
        return
    for sigma_rel, average in ema.profiles.items():
        with ema_snapshots.open_profile(state.checkpoint, ema_snapshots.profile_name(sigma_rel)) as read:
            engine.set_from_full(average, read)


def load_checkpoint(engine: Engine, state: TrainState, ranks: Ranks) -> None:
    """Loads weights and optimizer state of `state.checkpoint`, if any, converted for this number of ranks and ZeRO
    stage."""
    if state.checkpoint is None:
        return
    source, folder = state.checkpoint, state.checkpoint.parent
    other_stage = state.zero_stage != engine.stage
    if state.has_other_ranks(engine.stage, ranks.size) or (other_stage and state.zero_stage > 0):
        folder = folder / UNIVERSAL

        def convert_on_main() -> None:
            checkpoint.start_partial(folder)
            convert(source, folder / source.name)

        ranks.broadcast(convert_on_main)
    if other_stage:
        # DeepSpeed loads a universal checkpoint of stage 3 at stage 3 alone, and without ZeRO none.
        converted = folder / source.name if state.zero_stage else None
        engine.load_states(open_states(source, converted, engine.optimizer_names))
    else:
        engine.load(folder, source.name)


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
