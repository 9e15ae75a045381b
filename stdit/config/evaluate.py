"""Config of the evaluation of generated clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stdit.config.base import Frozen, NonNegative, Positive, Share


class EvaluationConfig(Frozen):
    """Metrics of generated clips against a manifest's held-out clips (stdit/evaluation/)."""

    train_split: str = Field(default="train", min_length=1)
    """Split of the manifest that the classifier is trained on."""
    validation_split: str = Field(default="validation", min_length=1)
    """Split of held-out clips: prompts and reference of the metrics."""
    class_column: str | None = "class"
    """Column with the class of a clip. null, or absent in the manifest: no class accuracy, no Fréchet distance."""
    class_name: str = Field(default="class", pattern=r"^[a-z][a-z0-9_]*$")
    """Name of the class in reports: `digit` gives digit_accuracy."""
    direction_column: str | None = "direction"
    """Column with the motion direction: left, right, up or down. null, or absent: no direction accuracy."""
    min_motion: Share = 0.05
    """Least displacement of the centroid, as a fraction of the shorter side; below it the direction is `none`."""
    crop: Literal["foreground", "frame"] = "foreground"
    """Input of the classifier: `foreground`, what differs from the border colour, centred and scaled; `frame`, all of it."""
    real_clips: Positive = 512
    """Largest number of held-out clips in the reference."""
    classifier_frames: Positive = 4096
    """Largest number of frames that the classifier is trained on, one of each clip."""
    classifier_steps: Positive = 400
    """Optimizer steps of the classifier."""
    classifier_seed: NonNegative = 0
    """Seed of the classifier's initialisation, batches and frames."""
    classifier_size: Annotated[int, Field(ge=8, multiple_of=4)] = 16
    """Input size of the classifier in pixels."""
