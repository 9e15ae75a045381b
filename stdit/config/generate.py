"""Batch generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from stdit.config.base import Fps, Frames, Frozen, Positive, Precision, Samples, Threads, Width, Workers
from stdit.config.location import LocalPath, Location


class LoRASource(Frozen):
    """A LoRA adapter; several are added up."""

    path: Path
    """Folder of its safetensors, or the run (or checkpoint) that trained it."""
    scale: float = 1.0
    """Factor on what the adapter adds."""


class GenerateConfig(Frozen):
    """Videos for a file of prompts (`python -m stdit.generate --run … --prompts … --out …`)."""

    run: Location
    """A run directory, one of its checkpoints, or a folder that STDiTPipeline.save_pretrained wrote; or the URL of a
    run's mirror (`train.upload_to`) or of a checkpoint in it, of which identity and weights are fetched into the user's
    cache."""
    weights: Literal["ema", "model"] = "ema"
    """Weights of a run: the exponential moving average, or those of the last step."""
    lora: tuple[LoRASource, ...] = ()
    """LoRA adapters to load."""
    base: Path | None = None
    """Base weights of a LoRA or control run, if they were moved (a folder of weights, a checkpoint or a run). null:
    where they were in training."""
    prompts: Path
    """Text (.txt), one prompt per line; or JSONL with prompt, class, seed, name, sizes, image (docs/data.md)."""
    out: LocalPath
    """Folder for the videos, the manifest and the contact sheet."""
    frames: Frames | None = None
    """Number of frames; 1 makes images. null: of the largest video bucket that the run was trained on, or of the
    largest image bucket where it has none."""
    height: Width | None = None
    """Height in pixels. null: as `frames`."""
    width: Width | None = None
    """Width in pixels. null: as `frames`."""
    scheduler: Literal["flow_euler", "ddim", "ddpm", "dpm_solver", "unipc"] | None = None
    """null: the run's `samples.sampler`, as for the next four."""
    steps: Annotated[int, Field(gt=0, le=100_000)] | None = None
    """Number of sampling steps."""
    guidance_scale: float | None = Field(default=None, ge=0, le=10_000)
    """Classifier-free guidance scale; 1 is no guidance."""
    guidance_channels: Positive | None = None
    """Number of latent channels that are guided, from the first."""
    path_drop: bool | None = None
    """Path-drop guidance, for models with `sparse_dense`: the unconditional prediction leaves the sparse blocks out."""
    videos_per_prompt: Samples = 1
    """Videos for each prompt, from consecutive seeds."""
    fps: Fps | None = None
    """Frames per second: of the files, and the condition of models with an fps micro-condition. null: that of most
    videos that the run was trained on; 8 where that is not known."""
    batch_size: Samples = 8
    """Videos sampled at a time. Batches are cut from the file of prompts, so the same settings give the same videos."""
    workers: Workers = 1
    """Pipelines that sample in parallel (under Ray)."""
    threads: Threads = 1
    """CPU threads of each worker."""
    device: Literal["cpu", "cuda"] | None = None
    """null: cuda where there is one."""
    precision: Precision = "auto"
    """Of the transformer. `auto`: bf16 for a run that was trained in it, where the GPU, or this CPU, multiplies it
    natively."""
    overwrite: bool = False
    """Removes videos that other settings left in `out`, which is an error otherwise."""
