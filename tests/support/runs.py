"""Run directories made in milliseconds, as training leaves them: tiny models whose weights are drawn, not trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from stdit.config import (
    ByteT5Config,
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    TextEncoderConfig,
    TrainBucket,
    TrainConfig,
)
from stdit.encoders.text_loading import load_text_encoder
from stdit.encoders.video import PixelAutoencoder, VideoEncoder
from stdit.models.stdit import STDiT
from stdit.training import checkpoint

TEXT = {"text_dim": 32, "max_text_tokens": 24}
CLASSES = {"num_classes": 3}
NAMES = ["zero", "one", "a/b"]


def model_config(**changes: Any) -> ModelConfig:
    """32 wide, two layers, on RGB pixels; no condition unless asked."""
    return ModelConfig(**{"hidden_size": 32, "depth": 2, "num_heads": 2, "in_channels": 3, **changes})


def lively(model: STDiT, seed: int) -> STDiT:
    """`model` with weights that make its output depend on all that it is given; fresh ones give zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.15)
    return model.eval()


def make_run(
    run: Path,
    model: ModelConfig,
    diffusion: DiffusionConfig | None = None,
    step: int = 20,
    text: TextEncoderConfig | None = None,
    frame_rates: dict[str, int] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    **config: Any,
) -> Path:
    """A run directory with one whole checkpoint. EMA weights differ from the model's. text: what read its captions."""
    diffusion = diffusion or DiffusionConfig()
    settings = Config(
        run_dir=run,
        model=model,
        diffusion=diffusion,
        data=DataConfig(
            features="synthetic",
            buckets=(
                TrainBucket(frames=1, height=16, width=16, batch_size=1),
                TrainBucket(frames=4, height=16, width=16, batch_size=1),
            ),
        ),
        train=TrainConfig(steps=step, precision=precision),
        **config,
    )
    folder = run / checkpoint.FOLDER / checkpoint.folder_of_step(step)
    transformer = STDiT.from_settings(model)
    for weights, name in checkpoint.TRANSFORMER.items():
        lively(transformer, step + (weights == "ema")).save_pretrained(folder / name)
    text = text or TextEncoderConfig(byte_t5=ByteT5Config(width=32, depth=1), max_text_tokens=24)
    data = {
        "video_encoder": VideoEncoder(PixelAutoencoder(3)).identity,
        "text_encoder": load_text_encoder(text).identity,
        "classes": NAMES,
        "features": "none",
        "frame_rates": frame_rates or {},
    }
    identity = checkpoint.make_identity(
        settings,
        architecture={k: v for k, v in transformer.config.items() if not k.startswith("_")},
        data=data,
        step=step,
        samples_seen=step * 8,
        data_position={},
        world_size=1,
    )
    (folder / checkpoint.IDENTITY).write_text(json.dumps(identity))
    checkpoint.write_manifest(folder)
    return run
