"""One training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from stdit.config.base import Frozen, NonNegative, Positive, Share
from stdit.config.data import Bucket, DataConfig
from stdit.config.diffusion import DiffusionConfig, FrameConditioningConfig, SamplerConfig
from stdit.config.model import ModelConfig


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


class SampleGridConfig(Frozen):
    """A grid of samples during training, for captions of the validation split."""

    every: Positive | None = None
    count: Positive = 8
    # Shape in pixels; None: the first bucket's.
    bucket: Bucket | None = None
    sampler: SamplerConfig = SamplerConfig()


# Changes of architecture that weights can go through (stdit/weights/transfer.py says what each does).
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
        if (
            self.model.conditioning == "cross_attention"
            and self.diffusion.frame_conditioning != FrameConditioningConfig()
        ):
            raise ValueError(
                "diffusion.frame_conditioning: model.conditioning cross_attention tells all frames one time; choose another"
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
