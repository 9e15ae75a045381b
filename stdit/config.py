"""Every setting of stdit: frozen pydantic models, loaded from YAML.

An unknown key, a wrong type, a missing file or sizes that do not divide are errors that name the
file, the key and the numbers. Nothing here imports torch, so a config can be checked anywhere.

    config = load("configs/debug.yaml", Config, ["train.steps=100", "run_dir=runs/x"])
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stdit.dataconfig import (
    MOST_TEXT_ENCODERS,
    Bucket,
    ByteT5Config,
    DataConfig,
    ExtractBucket,
    ExtractConfig,
    TextEncoderConfig,
    TrainBucket,
    VideoEncoderConfig,
    Where,
    latent_shape,
    token_grid,
    tokens,
)
from stdit.loading import ConfigError, apply_override, dump, load, merge, parse_yaml, read_extended, read_yaml, validate
from stdit.modelconfig import SIZES, Frozen, ModelConfig, NonNegative, Positive, Share

# Reading settings belongs to settings: one place to import all of them from.
__all__ = [
    "MOST_TEXT_ENCODERS",
    "SIZES",
    "Bucket",
    "ByteT5Config",
    "ConfigError",
    "DataConfig",
    "ExtractBucket",
    "ExtractConfig",
    "ModelConfig",
    "TextEncoderConfig",
    "TrainBucket",
    "VideoEncoderConfig",
    "Where",
    "apply_override",
    "dump",
    "latent_shape",
    "load",
    "merge",
    "parse_yaml",
    "read_extended",
    "read_yaml",
    "token_grid",
    "tokens",
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
    # flow matching (Esser et al. 2024); what is predicted: Open-Sora 1.2 has the opposite sign
    velocity: Literal["noise_minus_data", "data_minus_noise"] = "noise_minus_data"
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


class LoRAConfig(Frozen):
    """Low-rank adapters, trained in place of the weights of `init.source`, which stay as they are."""

    rank: Positive
    # Names of linear layers, or their ends: attn.qkv, cross_attn.q_linear, mlp.fc1, … None: all attention projections.
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    # What they add is times alpha / rank; None: 1.
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)


class ControlConfig(Frozen):
    """A control branch, trained beside the model of `init.source`, which stays as it is (stdit/models/control.py)."""

    # How many of the model's first blocks it copies; None: half.
    blocks: Positive | None = None
    # Where a training clip's condition comes from. paired: another clip, extracted with it (control_column of
    # ExtractConfig). Made of its own latents: first_frame (image-to-video); low_resolution, averaged over squares of
    # `factor` latents a side (super-resolution).
    condition: Literal["paired", "first_frame", "low_resolution"] = "paired"
    factor: Annotated[int, Field(ge=2)] = 4
    # The share of samples whose condition is zeros, so that it can be left out.
    dropout: Share = 0.0


class DynamicConfig(Frozen):
    """How a dynamic model (model.dynamic_width, model.dynamic_tokens) learns to compute less (Zhao et al. 2025, DyDiT):

    loss + weight ((C - target)² + least_tokens_weight Σ over blocks max(0, least_tokens - tokens)), where C is the mean
    share of the multiply-adds of attention and MLP, over a rank's micro-batch, and tokens the share that the MLP reads.
    """

    target: float = Field(gt=0, le=1)
    weight: float = Field(default=1.0, ge=0)
    # Steps over which the target falls from 1 to what it is.
    target_steps: NonNegative = 0
    least_tokens: Share = 0.1
    least_tokens_weight: float = Field(default=1.0, ge=0)
    # The share of samples that go through the complete model, every head, channel, token and block (exit_depths or not),
    # so that it stays one (the paper: all of them, once more).
    complete: Share = 0.0


class TrainConfig(Frozen):
    steps: Positive
    # None of both: all weights are trained.
    lora: LoRAConfig | None = None
    control: ControlConfig | None = None
    dynamic: DynamicConfig | None = None
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
    # Latent channels that are guided, from the first. None: all (diffusers, Latte); 3 of 4 is DiT's and PixArt's own way.
    guidance_channels: Positive | None = None


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


class SampleGridConfig(Frozen):
    """A grid of samples during training, for captions of the validation split."""

    every: Positive | None = None
    count: Positive = 8
    # Shape in pixels; None: the first bucket's.
    bucket: Bucket | None = None
    sampler: SamplerConfig = SamplerConfig()


# Changes of architecture that weights can go through (stdit/models/transition.py says what each does).
Transition = Literal[
    "class_to_text",
    "add_temporal",
    "rescale_positions",
    "new_text_projection",
    "add_micro_conditions",
    "add_dynamic",
    "adaln_to_single",
]


class InitConfig(Frozen):
    """Weights that a new run starts from (a transition, not a resume): optimizer, sampler and random states start afresh."""

    # A run directory, or a folder with diffusers' config.json and safetensors.
    source: Path
    weights: Literal["ema", "model"] = "ema"
    # Changes that the source's architecture goes through; any other difference is an error.
    allow: tuple[Transition, ...] = ()


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
    def _has_base(self) -> Config:
        """Adapters and control branches need weights that they belong to."""
        lora, control = self.train.lora, self.train.control
        if lora is not None and control is not None:
            raise ValueError("train.lora and train.control: a run trains one of them; the other can come after it")
        for name, value in (("train.lora", lora), ("train.control", control)):
            if value is not None and self.init is None:
                raise ValueError(f"{name} needs init.source, the weights that it belongs to")
        if control is not None and self.train.dynamic is not None:
            raise ValueError("train.control and train.dynamic: the model beside a control branch is frozen")
        depth = self.model.dimensions[1]
        if control is not None and (control.blocks or 0) > depth:
            raise ValueError(f"train.control.blocks is {control.blocks}, but the model has {depth} blocks")
        short = [b.key for b in self.data.buckets if b.frames == 1]
        if control is not None and control.condition == "first_frame" and short:
            raise ValueError(
                f"train.control.condition first_frame: of an image (bucket {short[0]}) the first frame is all of it"
            )
        return self

    @model_validator(mode="after")
    def _has_routers(self) -> Config:
        """A target for what is computed needs parts that can be left out, and routers that are trained."""
        wanted, train = self.train.dynamic, self.train
        if wanted is not None and not self.model.dynamic:
            raise ValueError(
                f"train.dynamic has target {wanted.target}, but the model is static: model.dynamic_width and model.dynamic_tokens are both false"
            )
        if wanted is not None and train.lora is not None:
            raise ValueError("train.lora and train.dynamic: adapters leave the model's routers as they are")
        return self

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
        steps = self.diffusion.num_train_timesteps
        if self.model.exit_depths and self.diffusion.objective == "ddpm" and steps != 1000:
            raise ValueError(
                f"model.exit_depths goes by times on 0 to 1000, but diffusion.num_train_timesteps is {steps}: make it 1000"
            )
        guided = self.samples.sampler.guidance_channels
        if guided is not None and guided > self.model.in_channels:
            raise ValueError(
                f"samples.sampler.guidance_channels {guided} is more than the {self.model.in_channels} latent channels (model.in_channels)"
            )
        return self
