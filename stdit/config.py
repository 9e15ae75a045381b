"""Every setting of stdit: frozen pydantic models, loaded from YAML.

An unknown key, a wrong type, a missing file or sizes that do not divide are errors that name the
file, the key and the numbers. Nothing here imports torch, so a config can be checked anywhere.

    config = load("configs/debug.yaml", Config, ["train.steps=100", "run_dir=runs/x"])
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stdit.loading import ConfigError, apply_override, dump, load, merge, parse_yaml, read_extended, read_yaml, validate
from stdit.modelconfig import SIZES, Frozen, ModelConfig, NonNegative, Positive, Share

# Reading settings belongs to settings: one place to import all of them from.
__all__ = [
    "SIZES",
    "ConfigError",
    "ModelConfig",
    "apply_override",
    "dump",
    "load",
    "merge",
    "parse_yaml",
    "read_extended",
    "read_yaml",
    "validate",
]

# -------------------------------------------------------------------------------------- diffusion


class GivenFramesConfig(Frozen):
    """Shares of the training clips of which some frames are given: kept as they are, told time 0, out of the loss.

    first: the first one (image-to-video). head, tail: some at the beginning or the end (extension). ends: the first and
    the last (looping, in-betweening). random: any. Images give none.
    """

    first: Share = 0.0
    head: Share = 0.0
    tail: Share = 0.0
    ends: Share = 0.0
    random: Share = 0.0

    @model_validator(mode="after")
    def _sum(self) -> GivenFramesConfig:
        total = self.first + self.head + self.tail + self.ends + self.random
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of given_frames sum to {total:g}, which is more than 1")
        return self


class DiffusionConfig(Frozen):
    """What the model is asked to predict, at which times. t = 0 is data, t = 1 is noise."""

    objective: Literal["flow", "ddpm"] = "flow"
    # flow matching (Esser et al. 2024)
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = Field(default=1.0, gt=0)
    shift: float = Field(default=1.0, gt=0)
    # Latent (frames, height, width) at which the shift is `shift`; larger latents are shifted
    # further, by sqrt(area ratio) * sqrt(frames ratio). None: the same shift everywhere.
    shift_base: tuple[Positive, Positive, Positive] | None = None
    # DDPM
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    num_train_timesteps: Positive = 1000
    # Both: the share of samples whose condition is dropped, for classifier-free guidance.
    label_dropout: Share = 0.1
    caption_dropout: Share = 0.1
    given_frames: GivenFramesConfig = GivenFramesConfig()


# ------------------------------------------------------------------------------------------- data


class Bucket(Frozen):
    """A shape, in pixels, that clips are cut to; batches hold one bucket only."""

    frames: Positive
    height: Positive
    width: Positive

    @property
    def key(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


class ExtractBucket(Bucket):
    """The share `keep_probability` of the clips that fit stays here; the rest goes on to the next fitting bucket."""

    keep_probability: Share = 1.0


class TrainBucket(Bucket):
    """`batch_size`: samples of this shape per rank and micro-batch. `weight`: how often, against the others, per sample held."""

    batch_size: Positive
    weight: float = Field(default=1.0, gt=0)


class Where(Frozen):
    """A condition on one manifest column."""

    column: str
    at_least: float | None = None
    at_most: float | None = None
    one_of: tuple[str | int | float, ...] | None = None

    @model_validator(mode="after")
    def _some(self) -> Where:
        if self.at_least is None and self.at_most is None and self.one_of is None:
            raise ValueError(f"the condition on column {self.column!r} states none of at_least, at_most, one_of")
        return self


class VideoEncoderConfig(Frozen):
    """The autoencoder. `pixels`: none, the clip itself; `image`: a diffusers image autoencoder, per frame;
    `video`: a diffusers video autoencoder. `path`: a local folder or hub id."""

    kind: Literal["pixels", "image", "video"] = "pixels"
    path: str | None = None
    subfolder: str | None = None
    # `pixels` only: 1 (luma) or 3 (RGB).
    channels: Literal[1, 3] = 3
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # `image` only: frames encoded or decoded at a time.
    frames_at_once: Positive = 16

    @model_validator(mode="after")
    def _path(self) -> VideoEncoderConfig:
        if (self.kind == "pixels") != (self.path is None):
            raise ValueError(
                f"kind {self.kind!r} {'takes no path' if self.path else 'needs a path (folder or hub id)'}"
            )
        return self


class ByteT5Config(Frozen):
    """A frozen T5 encoder over bytes (ByT5's tokens), drawn from `seed`: text features with nothing to download."""

    width: Positive = 64
    depth: Positive = 2
    num_heads: Positive = 4
    seed: NonNegative = 0
    # T5Config.initializer_factor: how far the random weights reach.
    initializer_factor: float = Field(default=1.0, gt=0)


class TextEncoderConfig(Frozen):
    """A T5, mT5, UMT5 or ByT5 encoder by `path` (folder or hub id), or a random `byte_t5`."""

    path: str | None = None
    subfolder: str | None = None
    tokenizer_subfolder: str | None = None
    byte_t5: ByteT5Config | None = None
    max_tokens: Positive = 120
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    @model_validator(mode="after")
    def _one(self) -> TextEncoderConfig:
        if (self.path is None) == (self.byte_t5 is None):
            raise ValueError("give exactly one of path and byte_t5")
        return self


class ExtractConfig(Frozen):
    """Clips and captions in, feature shards out (`python -m pipelines.extract_features --config …`)."""

    manifest: Path
    out: Path
    # Tried from large to small area, then from long to short.
    buckets: tuple[ExtractBucket, ...] = Field(min_length=1)
    # A bucket whose area is below this share of the largest bucket that the clip covers is not tried.
    min_area_ratio: Share = 0.0
    where: tuple[Where, ...] = ()
    video_encoder: VideoEncoderConfig = VideoEncoderConfig()
    # None: no text features (class-conditional or unconditional training).
    text_encoder: TextEncoderConfig | None = None
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    decode_timeout_s: float = Field(default=60.0, gt=0)
    # Frames taken from a clip longer than its bucket, and every how manieth.
    window: Literal["first", "center"] = "first"
    frame_stride: Positive = 1
    clips_per_shard: Positive = 512
    batch_size: Positive = 16
    # More undecodable clips than this share of those that `where` leaves is an error.
    max_bad_share: Share = 0.05
    workers: Positive = 1
    seed: NonNegative = 0

    @model_validator(mode="after")
    def _unique(self) -> ExtractConfig:
        keys = [b.key for b in self.buckets]
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise ValueError(f"buckets listed twice: {', '.join(twice)}")
        return self


class DataConfig(Frozen):
    """Which extracted features a training run reads."""

    # The `out` of an extraction; or `synthetic`: data made on the spot, to show that a launch works.
    features: Path | Literal["synthetic"]
    buckets: tuple[TrainBucket, ...] = Field(min_length=1)
    where: tuple[Where, ...] = ()
    train_split: str = "train"
    validation_split: str = "validation"
    workers: NonNegative = 0

    @model_validator(mode="after")
    def _unique(self) -> DataConfig:
        keys = [b.key for b in self.buckets]
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise ValueError(f"buckets listed twice: {', '.join(twice)}")
        return self


# ---------------------------------------------------------------------------------------- training


class OptimizerConfig(Frozen):
    """AdamW with linear warm-up and a decay that ends at `steps`."""

    learning_rate: float = Field(default=1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: NonNegative = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    final_ratio: Share = 0.0
    gradient_clip: float = Field(default=1.0, ge=0)


class EMAConfig(Frozen):
    """Exponential moving average of the weights; the decay at step s is min(decay, (1 + s) / (10 + s))."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    every: Positive = 1


class TrainConfig(Frozen):
    steps: Positive
    gradient_accumulation: Positive = 1
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    precision: Literal["fp32", "bf16"] = "fp32"
    # Products of float32 matrices (torch.set_float32_matmul_precision): high is TF32 on CUDA; medium takes bfloat16's
    # mantissa where the processor multiplies it faster, which some CPUs do.
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    zero_stage: Literal[0, 1, 2, 3] = 2
    activation_checkpointing: bool = False
    attention_backend: str | None = None
    compile: bool = False
    # Raw DeepSpeed JSON merged over what this config makes: a file, or the settings themselves.
    deepspeed: Path | dict[str, Any] | None = None
    log_every: Positive = 1
    checkpoint_every: Positive | None = None
    keep_checkpoints: Positive = 2
    tensorboard: bool = True
    wandb_project: str | None = None
    # Steps in a row that a not-a-number gradient may be skipped before the run stops.
    max_bad_steps: NonNegative = 10


class ValidationConfig(Frozen):
    """Loss on the validation split: the same clips, noise and times at every call."""

    every: Positive | None = None
    samples: Positive = 64
    times: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.3, 0.5, 0.7, 0.9)


class SamplerConfig(Frozen):
    """How videos are drawn from a model; diffusers' schedulers do the steps."""

    # flow_euler is flow matching's; ddim and ddpm (ancestral) are DDPM's; dpm_solver and unipc draw from both.
    scheduler: Literal["flow_euler", "ddim", "ddpm", "dpm_solver", "unipc"] = "flow_euler"
    steps: Positive = 50
    guidance_scale: float = Field(default=4.0, ge=0)


class GenerateConfig(Frozen):
    """Videos for a file of prompts (`python -m pipelines.generate_videos --run … --prompts … --out …`)."""

    # A run directory, one of its checkpoints, or a folder that STDiTPipeline.save_pretrained wrote.
    run: Path
    weights: Literal["ema", "model"] = "ema"
    # Text, a prompt a line; or JSONL (stdit/prompts.py).
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


class SampleGridConfig(Frozen):
    """A grid of samples during training, for captions of the validation split."""

    every: Positive | None = None
    count: Positive = 8
    # Shape in pixels; None: the first bucket's.
    bucket: Bucket | None = None
    sampler: SamplerConfig = SamplerConfig()


class InitConfig(Frozen):
    """Weights that a new run starts from (a transition, not a resume): optimizer, sampler and random states start afresh."""

    # A run directory, or a folder with diffusers' config.json and safetensors.
    source: Path
    weights: Literal["ema", "model"] = "ema"
    # Changes that the source's architecture goes through; any other difference is an error.
    allow: tuple[Literal["class_to_text", "add_temporal", "rescale_positions", "new_text_projection"], ...] = ()


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


class Config(Frozen):
    """One training run (`deepspeed stdit/train.py --config …`)."""

    name: str = "run"
    run_dir: Path
    seed: NonNegative = 0
    model: ModelConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    data: DataConfig
    train: TrainConfig
    validation: ValidationConfig = ValidationConfig()
    samples: SampleGridConfig = SampleGridConfig()
    init: InitConfig | None = None

    @model_validator(mode="after")
    def _agree(self) -> Config:
        flow_sampler = self.samples.sampler.scheduler == "flow_euler"
        if self.diffusion.objective == "ddpm" and flow_sampler and self.samples.every:
            raise ValueError(
                "samples.sampler.scheduler flow_euler draws from objective flow; this run's diffusion.objective is ddpm"
            )
        sampler = self.samples.sampler.scheduler
        if self.diffusion.objective == "flow" and sampler in ("ddim", "ddpm") and self.samples.every:
            raise ValueError(
                f"samples.sampler.scheduler {sampler} draws from objective ddpm; this run's diffusion.objective is flow"
            )
        if self.model.conditioning == "cross_attention" and self.diffusion.given_frames != GivenFramesConfig():
            raise ValueError(
                "diffusion.given_frames: model.conditioning cross_attention tells all frames one time; choose another"
            )
        if self.diffusion.objective == "flow" and self.model.learned_variance:
            raise ValueError(
                "model.learned_variance belongs to diffusion.objective ddpm; flow matching has no variance to learn"
            )
        return self


# -------------------------------------------------------------------------- checks across sections


def latent_shape(bucket: Bucket, compression: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latent (T, H, W) of a clip of `bucket`'s size. `compression`: pixels per latent (t, h, w).

    Video autoencoders compress causally: T = 1 + (frames - 1) / t. ConfigError where sizes don't divide.
    """
    t, h, w = compression
    if (bucket.frames - 1) % t:
        raise ConfigError(
            f"bucket {bucket.key}: frames - 1 = {bucket.frames - 1} is not divisible by the autoencoder's temporal compression {t}"
        )
    for name, size, factor in (("height", bucket.height, h), ("width", bucket.width, w)):
        if size % factor:
            raise ConfigError(
                f"bucket {bucket.key}: {name} {size} is not divisible by the autoencoder's compression {factor}"
            )
    return (1 + (bucket.frames - 1) // t, bucket.height // h, bucket.width // w)


def token_grid(latent: tuple[int, int, int], patch: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """Grid (T, H, W) of patches of a latent; ConfigError with both numbers where they don't divide."""
    for axis, size, p in zip(("frames", "height", "width"), latent, patch, strict=True):
        if size % p:
            raise ConfigError(f"{name}: latent {axis} {size} is not divisible by model.patch_size {p}")
    return (latent[0] // patch[0], latent[1] // patch[1], latent[2] // patch[2])


def tokens(latent: tuple[int, int, int], patch: tuple[int, int, int], name: str) -> int:
    """Number of patches of a latent."""
    return math.prod(token_grid(latent, patch, name))
