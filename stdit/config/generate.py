"""Batch generation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from stdit.config.base import Frozen, Positive


class LoRASource(Frozen):
    """An adapter: the folder of its safetensors, or the run that trained it. Several are added up."""

    path: Path
    scale: float = 1.0


class GenerateConfig(Frozen):
    """Videos for a file of prompts (`python -m pipelines.generate_videos --run … --prompts … --out …`)."""

    # A run directory, one of its checkpoints, or a folder that STDiTPipeline.save_pretrained wrote.
    run: Path
    weights: Literal["ema", "model"] = "ema"
    lora: tuple[LoRASource, ...] = ()
    # Of a run of adapters or a control branch: where the weights that it belongs to lie now, if they were moved (a folder of
    # weights, a checkpoint or a run). None: where they lay in training, or where the run's init.source says.
    base: Path | None = None
    # Text, a prompt a line; or JSONL (stdit/inference/prompts.py).
    prompts: Path
    out: Path
    # Pixels; None: of the largest bucket that the run was trained on.
    frames: Positive | None = None
    height: Positive | None = None
    width: Positive | None = None
    # None: as the run's own samples were drawn (its samples.sampler).
    scheduler: Literal["flow_euler", "ddim", "ddpm", "dpm_solver", "unipc"] | None = None
    steps: Positive | None = None
    guidance_scale: float | None = Field(default=None, ge=0)
    guidance_channels: Positive | None = None
    # Videos for each prompt, each from a seed of its own.
    seeds: Positive = 1
    fps: float = Field(default=8.0, gt=0, le=1000)
    # Videos drawn at a time. Groups are cut from the file of prompts, so the same settings give the same videos.
    batch_size: Positive = 8
    workers: Positive = 1
    # CPU threads of each worker.
    threads: Positive = 1
    # None: cuda where there is one.
    device: Literal["cpu", "cuda"] | None = None
    # Removes what another request left in `out`, which is else an error.
    overwrite: bool = False
