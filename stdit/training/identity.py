"""identity.json of a checkpoint: what it is, and what it was trained on. Its schema and its reader."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from stdit.config import Config, DiffusionConfig, FileSchema, NonNegative, Positive, read_json
from stdit.config.identity import FrameSampling, TextIdentity, VideoIdentity
from stdit.integrity import IDENTITY

# What a run trains: all weights, LoRA adapters, or a control branch.
Trained = Literal["transformer", "lora", "control"]


class Architecture(FileSchema):
    """The diffusers config of the model; further keys are STDiT's own."""

    model_config = ConfigDict(extra="allow")

    in_channels: Positive
    patch_size: tuple[Positive, Positive, Positive]


class BaseIdentity(FileSchema):
    """Frozen weights of a fine-tuning run."""

    folder: str
    fingerprint: str


# A letter a step, the last one last: x where no weights were updated.
LastSteps = Annotated[str, Field(pattern=r"^[.x]*$")]


class BucketSteps(FileSchema):
    """Steps of one bucket: how many of how many had no finite gradient, and which of the last ones."""

    skipped: NonNegative
    steps: NonNegative
    last: LastSteps


class SkippedStepCounts(FileSchema):
    """Of a run and of each bucket (stdit.training.divergence)."""

    in_a_row: NonNegative
    last: LastSteps
    buckets: dict[str, BucketSteps]


class Identity(FileSchema):
    """identity.json. `features`: the fingerprint of the features. The file is vouched for by manifest.json."""

    version: str
    architecture: Architecture
    trained: Trained
    base: BaseIdentity | None
    diffusion: DiffusionConfig
    video_encoder: VideoIdentity
    text_encoder: TextIdentity | None
    classes: tuple[str, ...]
    features: str
    frame_rates: dict[str, NonNegative]
    # None: synthetic clips, or sets of which frames were taken differently.
    frame_sampling: FrameSampling | None = None
    step: NonNegative
    samples_seen: NonNegative
    data_position: dict[str, NonNegative]
    world_size: Positive
    git_revision: str | None
    config: Config
    # Validation loss at this step, if there was one; last losses of each bucket (stdit.training.spikes).
    validation_loss: float | None
    recent_losses: dict[str, tuple[float, ...]]
    # Steps whose gradient was not finite; null: none yet.
    skipped_steps: SkippedStepCounts | None
    # Relative width of the EMA weights, where `stdit ema` has computed them from snapshots.
    ema_sigma_rel: float | None = None


def load_identity(checkpoint: Path) -> dict[str, Any]:
    """identity.json of a checkpoint folder. ConfigError: unreadable, or a key that is missing, unknown or of another
    kind."""
    return read_json(checkpoint / IDENTITY, Identity)
