"""Evaluation of generated clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stdit.config.base import Frozen, NonNegative, Positive, Share


class EvaluationConfig(Frozen):
    """How generated clips are scored against a manifest's held-out clips (stdit/evaluation/). Columns are the manifest's own."""

    train_split: str = "train"
    validation_split: str = "validation"
    # The column that the reader learns to tell from the pixels; None, or absent in the manifest: no class is read, so
    # there is neither an accuracy nor a Fréchet distance.
    class_column: str | None = "class"
    # What reports call it: `digit` gives digit_accuracy.
    class_name: str = Field(default="class", pattern=r"^[a-z][a-z0-9_]*$")
    # The column holding left, right, up or down; None, or absent: no direction is looked for.
    direction_column: str | None = "direction"
    # A centroid that travels less than this share of the shorter side has direction `none`.
    min_motion: Share = 0.05
    # What the reader sees: `foreground`, what stands out from the border's colour, centred and scaled; `frame`, all of it.
    crop: Literal["foreground", "frame"] = "foreground"
    # Held-out clips (at most) that generated ones are compared with.
    real_clips: Positive = 512
    # Frames of the train split (at most) that the reader learns from, its optimizer steps, and its seed.
    reader_frames: Positive = 4096
    reader_steps: Positive = 400
    reader_seed: NonNegative = 0
    # Side, in pixels, that crops are scaled to.
    reader_size: Annotated[int, Field(ge=8, multiple_of=4)] = 16
