"""One training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from stdit.config.base import Count, Frozen, NonNegative, Positive, Precision, Samples, Seconds, Share, Steps, Width
from stdit.config.buckets import Bucket, MicroBatches, TrainBucket
from stdit.config.data import DataConfig
from stdit.config.diffusion import DiffusionConfig, FrameConditioningConfig, SamplerConfig
from stdit.config.load import ConfigError
from stdit.config.location import LocalPath, StoreUrl
from stdit.config.model import ModelConfig
from stdit.config.token_budget import (
    MAX_IMBALANCE,
    PackingBudget,
    StepSize,
    check_packing_budget,
    imbalance,
    step_sizes,
)

Beta = Annotated[float, Field(ge=0, lt=1)]


class MuPConfig(Frozen):
    """Learning rate and initial weights that hold at every width (Yang et al. 2022, Tensor Programs V; Zheng et al.
    2025 for diffusion transformers): what is found on a small model serves a wide one with heads of the same width."""

    base_width: Width
    """`hidden_size` of the model at which `learning_rate` and `weight_decay` were found, a multiple of the heads'
    width; there nothing changes."""


class OptimizerConfig(Frozen):
    """Optimizer and the learning rate schedule, which ends at `train.steps`."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of attention and MLPs, AdamW for all other weights; learning rate and weight decay
    are AdamW's for both."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's betas."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's epsilon."""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Muon's momentum."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay, of matrices and convolution kernels; not of biases, norms and embedding tables."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up from 0."""
    lr_schedule: Literal["constant", "linear", "cosine", "wsd"] = "constant"
    """Learning rate after the warm-up. wsd (warmup-stable-decay, Hu et al. 2024): the peak, then 1 - sqrt over the last
    steps (Hägele et al. 2024); a run may be lengthened from any checkpoint before the decay, and is as if planned
    so."""
    decay_share: Share = 0.2
    """wsd: share of `train.steps` over which the learning rate decays; 0: a stable phase without end."""
    min_lr_ratio: Share = 0.0
    """Learning rate at the last step, as a share of the peak (linear, cosine, wsd)."""
    mup: MuPConfig | None = None
    """Scale learning rates and initial weights by width. null: they are what they are at every width."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradients are clipped to this norm, over all weights; 0: no clipping."""


# Relative widths of power-function averages: those above have no exponent, those below are the weights of the last
# steps.
MIN_SIGMA_REL, MAX_SIGMA_REL = 0.001, 0.28
SigmaRel = Annotated[float, Field(ge=MIN_SIGMA_REL, le=MAX_SIGMA_REL)]


class EMAProfilesConfig(Frozen):
    """Power-function averages of the weights (Karras et al. 2024, section 3) beside the run's own EMA, and snapshots of
    them, from which `stdit ema` computes the average of any other width afterwards. Each takes the memory of another
    EMA."""

    sigma_rel: tuple[SigmaRel, ...] = Field(default=(0.05, 0.1), min_length=1)
    """Relative widths: the standard deviation of the time that an average is over, as a share of the training so
    far."""
    every: Positive
    """Steps between snapshots in RUN_DIR/ema_snapshots, a multiple of `checkpoint_every`, as they are written with
    checkpoints; the last step has one too. All are kept, at 2 bytes a parameter and width (float16)."""

    @field_validator("sigma_rel", mode="after")
    @classmethod
    def _once_each(cls, widths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(widths)) < len(widths):
            raise ValueError(f"expected different widths, found {', '.join(f'{width:g}' for width in widths)}")
        return widths


class EMAConfig(Frozen):
    """Exponential moving average of the weights; the decay at step s is min(decay, (1 + s) / (10 + s))."""

    decay: float = Field(default=0.9999, ge=0, lt=1)
    """Decay per step, once the warm-up of the average is over."""
    every: Positive = 1
    """Steps between updates; the decay is raised to this power, so that it stays per step."""
    profiles: EMAProfilesConfig | None = None
    """Averages of other widths for `stdit ema`. null: none."""

    @property
    def widths(self) -> tuple[float, ...]:
        """sigma_rel of the profiles."""
        return self.profiles.sigma_rel if self.profiles else ()

    @model_validator(mode="after")
    def _updates_before_snapshots(self) -> EMAConfig:
        if self.profiles and self.profiles.every % self.every:
            raise ValueError(f"profiles.every is {self.profiles.every}, no multiple of every, {self.every}")
        return self


class LoRAConfig(Frozen):
    """Low-rank adapters on frozen weights, those of `init.source` (Hu et al. 2021)."""

    rank: Width
    """Rank of the update."""
    targets: tuple[str, ...] | None = Field(default=None, min_length=1)
    """Names of linear layers, or their last parts: attn.qkv, cross_attn.q_linear, mlp.fc1. null: all attention
    projections."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / rank; null: by 1."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' inputs."""


class ControlConfig(Frozen):
    """A control branch (ControlNet) beside the frozen model of `init.source`."""

    blocks: Positive | None = None
    """Number of the model's first blocks that the branch copies; null: half of them."""
    condition: Literal["paired", "first_frame", "low_resolution"] = "paired"
    """Source of the condition. paired: a second clip, extracted with the first (`control_column` of the extraction).
    Computed from the clip's own latents: first_frame (image-to-video); low_resolution (super-resolution)."""
    factor: Annotated[int, Field(ge=2)] = 4
    """low_resolution: latents are averaged over squares of this side."""
    dropout: Share = 0.0
    """Share of samples whose condition is zeros, so that the model also works without one."""


class DynamicConfig(Frozen):
    """Compute loss of a dynamic model (`model.dynamic_width`, `model.dynamic_tokens`; Zhao et al. 2025, DyDiT).

    loss + weight ((C - target)² + min_token_weight Σ over blocks max(0, min_token_ratio - tokens)), where C is the mean
    share of the FLOPs of attention and MLP over a rank's micro-batch, and tokens the share of tokens that enter the
    MLP.
    """

    target_flops_ratio: float = Field(gt=0, le=1)
    """Target share of the full model's FLOPs."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of the compute loss."""
    warmup_steps: NonNegative = 0
    """Steps over which the target falls linearly from 1 to `target_flops_ratio`."""
    min_token_ratio: Share = 0.1
    """Blocks whose MLP sees a smaller share of the tokens than this are penalised."""
    min_token_weight: float = Field(default=1.0, ge=0)
    """Weight of that penalty within the compute loss."""
    full_model_prob: Share = 0.0
    """Share of samples that run the full model (every head, channel, token and block, whatever `model.exit_depths`),
    which keeps it trained. The paper runs all of them through it, in a second forward pass."""


class TokenRoutingConfig(Frozen):
    """Token routing (Krause et al. 2025, TREAD): in training a share of the patches bypasses some blocks and is put
    back after them, which saves their FLOPs; drawn for each sample, the same in all its frames. Sampling runs all
    tokens."""

    share: float = Field(default=0.5, ge=0, lt=1)
    """Share of the patches that bypass the blocks."""
    start: NonNegative = 2
    """First block that they bypass, from 0."""
    end: Positive
    """First block after it that they enter again; the paper: depth - 4."""
    path_drop: Share = 0.0
    """With `model.sparse_dense`: share of the samples whose fusion sees the mask token in place of the sparse blocks'
    output, which path-drop guidance needs. Both numbers above are then those of `model.sparse_dense`."""
    dense_finish: Share = 0.0
    """Share of the steps, at the end of training, in which all tokens run."""


class AlignmentConfig(Frozen):
    """Alignment of an early block's tokens in training: a small head maps each token to a target, and loss + weight
    (1 - cosine similarity) is trained. Exported weights have no head."""

    target: Literal["latents", "features"] = "latents"
    """latents: the token's patch of the clean latents (Wang et al. 2026, SRA 2); needs no network but the autoencoder.
    features: those of a vision encoder at the token's place (Yu et al. 2025, REPA), extracted with `vision_encoder`."""

    block: NonNegative
    """Block whose output is aligned, from 0; about the end of the first third."""
    weight: float = Field(default=0.5, gt=0)
    """Weight of the alignment loss."""
    features_dim: Width | None = None
    """Target features: their width. null: that of data.features."""
    projector_dim: Width = 2048
    """Target features: inner width of the head, an MLP of three layers."""
    irepa: bool = False
    """Target features: iREPA (Singh et al. 2025). The head is one 3×3 convolution over a frame's tokens, and the
    features of a frame are normalised: less `irepa_gamma` times their mean over its places, over their standard
    deviation over them."""
    irepa_gamma: Share = 0.6
    """iREPA: share of the mean that is taken away."""

    @model_validator(mode="after")
    def _check_target(self) -> AlignmentConfig:
        own = ("features_dim", "projector_dim", "irepa", "irepa_gamma")
        stray = [name for name in own if getattr(self, name) != type(self).model_fields[name].default]
        if self.target == "latents" and stray:
            raise ValueError(f"{stray[0]} {getattr(self, stray[0])} belongs to target features; target is latents")
        return self


class ProfileConfig(Frozen):
    """A torch profiler trace of a few steps, one file a rank in RUN_DIR/profile; ui.perfetto.dev opens it."""

    start: Positive = 10
    """First step of the trace."""
    steps: Positive = 3
    """Number of steps."""


class TrainConfig(Frozen):
    """Training loop, optimizer, precision, parallelism, checkpoints and logging."""

    steps: Steps
    """Optimizer steps."""
    lora: LoRAConfig | None = None
    """Train LoRA adapters. null here and in `control`: all weights are trained."""
    control: ControlConfig | None = None
    """Train a control branch."""
    dynamic: DynamicConfig | None = None
    """Train the routers of a dynamic model towards a compute target."""
    token_routing: TokenRoutingConfig | None = None
    """Some tokens bypass some blocks in training. null: all run everywhere."""
    alignment: AlignmentConfig | None = None
    """An early block's tokens are trained to tell the clean latents, or a vision encoder's features, too. null:
    none."""
    gradient_accumulation: Positive = 1
    """Micro-batches per optimizer step, on each rank. Left out where a global_batch (data.buckets) or `tokens_per_step`
    says it."""
    tokens_per_step: Positive | None = None
    """Video tokens of an optimizer step over all ranks, whatever their number: a step has as many samples of its bucket
    as fit. In place of batch_size and global_batch."""
    tokens_per_micro_batch: Positive | None = None
    """With `tokens_per_step`: video tokens of a rank's micro-batch at most; null: a rank takes its share of a step at
    once."""
    samples_multiple_of: Positive | None = None
    """With `tokens_per_step`: steps have a multiple of this many samples. Give the number of data-parallel ranks, or a
    multiple of all that there may be: ranks more than 10 % from equal work are an error. null: 8 or the largest divisor
    of it that loses nothing in the bucket with the most tokens."""
    packing: bool = False
    """Packed sequences: a step takes samples of all buckets, by their shares, as many as fit into `tokens_per_step`; a
    micro-batch is one sequence of them, of `tokens_per_micro_batch` video tokens at most, in which each attends to
    itself alone. Gradients are those of the same samples unpacked. false: a step has samples of one bucket."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and learning rate."""
    ema: EMAConfig = EMAConfig()
    """Moving average of the weights."""
    precision: Precision = "fp32"
    """bf16: forward and backward in bfloat16; master weights, optimizer and EMA stay float32. auto: bf16 on GPUs that
    compute in it and on CPUs with instructions for it (AVX512-BF16, AMX), else fp32; a run keeps what it began with."""
    matmul_precision: Literal["highest", "high", "medium"] = "highest"
    """float32 matrix products (torch.set_float32_matmul_precision). high: TF32 on CUDA; medium: bfloat16 products where
    the processor has faster ones."""
    cpu_matmul_backend: Literal["auto", "onednn", "torch"] = "auto"
    """Library of float32 linear layers on a CPU. auto: oneDNN on AMD processors with AVX-512, where torch's own (MKL)
    is slower; else torch."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage: 1 shards the optimizer state, 2 gradients too, 3 weights too. A resumed run may have
    another one."""
    sequence_parallel: Positive = 1
    """Ranks that share the tokens of one clip; must divide the number of ranks, and the rest is data parallel
    (docs/cluster.md)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    attention_backend: str | None = None
    """diffusers' attention backend (native, flash, …); null: torch's choice."""
    compile: bool = False
    """torch.compile of the blocks."""
    deepspeed: Path | dict[str, Any] | None = None
    """DeepSpeed's own JSON, merged over the generated one: a file, or the settings themselves."""
    log_every: Positive = 1
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Positive | None = None
    """Steps between checkpoints; the last step always has one. null: that one alone."""
    checkpoint_in_background: bool = True
    """Training waits only until its state is copied to the host's memory, and goes on while that is written; one
    checkpoint at a time. Files are equal bit for bit. The copy takes 12 to 20 bytes of host memory a parameter, divided
    by the ranks under ZeRO but for the model's own weights (four more for each of `ema.profiles`), and rank 0 four more
    while it joins full weights from several ranks' (the forecast says it). A run's last checkpoint is written at
    once."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints that are kept."""
    keep_every: Positive | None = None
    """Checkpoints whose step is a multiple of this are kept, too."""
    keep_best: NonNegative = 0
    """So many checkpoints with the lowest validation loss are kept, too; needs a validation at each of them."""
    max_failed_saves: NonNegative = 3
    """Consecutive checkpoints that may fail to be written (a full disk, a lost share) while training goes on; one more
    ends the run. One that fails at the last step, or when the run is to stop, always does."""
    upload_to: StoreUrl | None = None
    """URL of the run's mirror: finished checkpoints that run_dir keeps, metrics.jsonl and config.yaml are uploaded in
    the background. Where the mirror has a newer checkpoint than run_dir when the run starts, that is fetched first. In
    a plan's `overrides`, a stage's name is added."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project."""
    profile: ProfileConfig | None = None
    """Trace a few steps with torch's profiler."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Peak TFLOP/s of one device, for MFU. null: the maker's figure of a known GPU, else measured at the first log."""
    max_bad_steps: NonNegative = 10
    """Consecutive steps that may be skipped for a gradient that is not finite, or by `on_spike`; one more ends the
    run."""
    max_bad_share: Share = 0.2
    """Share of the last 100 steps, of the run and of each bucket, that may be skipped so; counts beyond `max_bad_steps`
    of them, and at the run's end."""
    on_spike: Literal["warn", "skip", "rewind"] = "warn"
    """A loss far above the last ones of its bucket. warn: it is marked in metrics.jsonl and the log; skip: its gradient
    is dropped, too;
    rewind: training goes back to the newest checkpoint and leaves that step's samples out."""
    spike_threshold: float = Field(default=10.0, gt=0)
    """Robust standard deviations (1.4826 median absolute deviations) above the median of a bucket's last 100 losses
    from which one is a spike; the first 20 are none."""
    max_rewinds: NonNegative = 3
    """Rewinds of one run; one more ends it."""
    start_timeout_s: Seconds = 1800
    """Seconds that a rank may take from its start to its first step, with verifying and loading its checkpoint: one
    that takes longer hangs, or waits for one that does, names the phase, prints its stack and ends the run with exit
    code 75."""
    step_timeout_s: Seconds = 1800
    """Seconds that a step may take, with its validation, and a save without any of its files changing: a rank that
    takes longer hangs, prints its stack and ends the run with exit code 75."""

    def step_sizes(self, tokens: Mapping[str, int]) -> dict[str, StepSize]:
        """Samples by bucket under `tokens_per_step`. tokens: of a sample. ConfigError: one does not fit."""
        assert self.tokens_per_step is not None
        return step_sizes(tokens, self.tokens_per_step, self.samples_multiple_of, self.tokens_per_micro_batch)

    @property
    def packing_budget(self) -> PackingBudget | None:
        """The tokens of packed sequences; None without `packing`."""
        if not self.packing or self.tokens_per_step is None:
            return None
        return PackingBudget(self.tokens_per_step, self.tokens_per_micro_batch)

    def data_ranks(self, ranks: int) -> int:
        """Ranks that read different samples, of `ranks`. ConfigError: sequence_parallel does not divide them."""
        if ranks % self.sequence_parallel:
            raise ConfigError(
                f"train.sequence_parallel is {self.sequence_parallel}, which does not divide the number of ranks, {ranks}"
            )
        return ranks // self.sequence_parallel


class ValidationConfig(Frozen):
    """Loss on the validation split, with EMA weights and the same clips, noise and timesteps each time."""

    every: Positive | None = None
    """Steps between validations; null: none."""
    samples: Samples = 64
    """Number of clips."""
    times: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    """Timesteps, in (0, 1), at which each clip's loss is taken; losses are also logged by timestep and by bucket."""
    raw: bool = False
    """Also with the model's own weights, not averaged (`raw_validation_loss`)."""
    inference_check: bool = True
    """At each checkpoint, compares the loss of a fixed batch of validation clips through the model's forward and
    through the sampler's (`inference_gap`), and says so where they differ by more than precision explains."""


class SampleGridConfig(Frozen):
    """Samples drawn during training for captions of the validation split, saved as one image."""

    every: Positive | None = None
    """Steps between sample grids; null: none."""
    count: Count = 8
    """Number of clips."""
    bucket: Bucket | None = None
    """Shape of the clips in pixels; null: the first bucket's."""
    sampler: SamplerConfig = SamplerConfig()
    """Scheduler, steps and guidance."""


# Changes of architecture that weights can go through (stdit/weights/transfer.py says what each does).
Transition = Literal[
    "class_to_text",
    "add_temporal",
    "rescale_positions",
    "new_text_projection",
    "add_micro_conditions",
    "add_dynamic",
    "add_sparse_dense",
    "adaln_to_single",
]


class InitConfig(Frozen):
    """Initial weights of a new run, from another one: a new stage, not a resume; optimizer and data start afresh."""

    source: Path
    """A run directory, or a folder with diffusers' config.json and safetensors."""
    weights: Literal["ema", "model"] = "ema"
    """Which weights of a run."""
    allow: tuple[Transition, ...] = ()
    """Differences of architecture to convert; any other is an error."""


class Config(Frozen):
    """One training run (`deepspeed stdit/train.py --config …`)."""

    name: str = "run"
    """Name in logs, progress bar and W&B."""
    run_dir: LocalPath
    """Folder for checkpoints, metrics and samples; the same one again resumes the run."""
    seed: NonNegative = 0
    """Seed of initialisation, data order, noise and timesteps."""
    model: ModelConfig
    """Architecture."""
    diffusion: DiffusionConfig = DiffusionConfig()
    """Objective, timestep distribution and condition dropout."""
    data: DataConfig
    """Features, buckets and splits."""
    train: TrainConfig
    """Steps, optimizer, precision and parallelism."""
    validation: ValidationConfig = ValidationConfig()
    """Validation loss."""
    samples: SampleGridConfig = SampleGridConfig()
    """Sample grids."""
    init: InitConfig | None = None
    """Initial weights; null: a new model."""

    @model_validator(mode="after")
    def _has_base(self) -> Config:
        """Adapters and control branches need weights that they belong to."""
        lora, control = self.train.lora, self.train.control
        if lora is not None and control is not None:
            raise ValueError("train.lora and train.control: a run trains one of them; the other can come after it")
        if lora is not None and self.train.optimizer.name == "muon":
            raise ValueError("train.optimizer.name: muon, but train.lora trains no whole matrices; use adamw")
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
    def _can_be_divided(self) -> Config:
        try:
            self.model.check_sequence_parallel(self.train.sequence_parallel)
        except ValueError as error:
            raise ValueError(f"train.{error}") from error
        return self

    @model_validator(mode="after")
    def _accumulates(self) -> Config:
        accumulation, data = self.train.gradient_accumulation, self.data
        stated = [b.global_batch for b in data.buckets] + [data.global_batch]
        if accumulation != 1 and (sizes := [size for size in stated if size is not None]):
            raise ValueError(
                f"train.gradient_accumulation is {accumulation}, which follows from the ranks where a global_batch ({sizes[0]}) is "
                "given; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _sizes_steps(self) -> Config:
        """Steps are sized by the buckets or by tokens, not by both."""
        data, train = self.data, self.train
        if train.tokens_per_step is None:
            for name in ("tokens_per_micro_batch", "samples_multiple_of"):
                if (value := getattr(train, name)) is not None:
                    raise ValueError(f"train.{name} is {value}, which needs train.tokens_per_step")
            for bucket in data.buckets:
                if not bucket.is_sized:
                    raise ValueError(
                        f"data.buckets: bucket {bucket.key} states neither batch_size nor global_batch, nor is there train.tokens_per_step"
                    )
                if bucket.tokens is not None:
                    raise ValueError(
                        f"data.buckets: bucket {bucket.key} states tokens, but there is no train.tokens_per_step"
                    )
            return self
        sized = [(f"data.buckets {b.key}", b) for b in data.buckets if b.tokens is None]
        for where, owner in [("data", data), *sized]:
            for name in ("batch_size", "global_batch"):
                if (value := getattr(owner, name)) is not None:
                    raise ValueError(
                        f"train.tokens_per_step is {train.tokens_per_step} and {where}: {name} {value}; one of them sizes a step, leave the other out"
                    )
        if train.gradient_accumulation != 1:
            raise ValueError(
                f"train.gradient_accumulation is {train.gradient_accumulation}, which follows from train.tokens_per_step and "
                "train.tokens_per_micro_batch; leave it out"
            )
        tokens = {b.key: b.tokens for b in data.buckets if b.tokens is not None}
        if tokens and len(tokens) == len(data.buckets):
            sizes = self.train.step_sizes(tokens)
            for bucket in data.buckets:
                if (bucket.global_batch, bucket.batch_size) != sizes[bucket.key]:
                    raise ValueError(
                        f"data.buckets {bucket.key}: global_batch {bucket.global_batch} and batch_size {bucket.batch_size} of {bucket.tokens} tokens "
                        f"are not what train.tokens_per_step {train.tokens_per_step} makes, {tuple(sizes[bucket.key])}; leave tokens and sizes out"
                    )
        return self

    @model_validator(mode="after")
    def _finds_best(self) -> Config:
        """The best checkpoints are known where each of them has a validation loss."""
        train, validated = self.train, self.validation.every
        if not train.keep_best:
            return self
        if validated is None:
            raise ValueError(f"train.keep_best is {train.keep_best}, which needs validation.every")
        if train.checkpoint_every is not None and train.checkpoint_every % validated:
            raise ValueError(
                f"train.keep_best is {train.keep_best}, but checkpoints have no validation loss: train.checkpoint_every is "
                f"{train.checkpoint_every}, no multiple of validation.every, {validated}"
            )
        return self

    @model_validator(mode="after")
    def _snapshots_at_checkpoints(self) -> Config:
        """Snapshots of the EMA's profiles are written with checkpoints."""
        profiles, every = self.train.ema.profiles, self.train.checkpoint_every
        if profiles and (every is None or profiles.every % every):
            raise ValueError(
                f"train.ema.profiles.every is {profiles.every}, but its snapshots are written with checkpoints, and train.checkpoint_every is "
                f"{'null' if every is None else every}, which does not divide it"
            )
        return self

    def micro_batches(self, ranks: int) -> dict[str, MicroBatches]:
        """One rank's micro-batches in a step of each bucket whose size is known, by its key, on `ranks` ranks.
        ConfigError: train.sequence_parallel does not divide them, or a global_batch is too small for them; with
        train.tokens_per_step also where their work would not be equal."""
        data_ranks, accumulation = self.train.data_ranks(ranks), self.train.gradient_accumulation
        sized = [b for b in self.data.buckets if b.is_sized]
        if self.train.packing_budget is not None:
            return self._packed_shares(self.train.packing_budget, data_ranks)
        if self.train.tokens_per_step is not None:
            for bucket in sized:
                self._check_balance(bucket, data_ranks)
        found = {b.key: b.micro_batches(data_ranks, accumulation) for b in sized}
        for key, (_, count, samples) in found.items():
            if self.diffusion.contrastive_weight and samples // (data_ranks * count) == 1:
                raise ConfigError(
                    f"diffusion.contrastive_weight compares each sample with another one of its micro-batch, but on {ranks} ranks "
                    f"micro-batches of bucket {key} have one sample (global_batch {samples})"
                )
        return found

    def _packed_shares(self, budget: PackingBudget, data_ranks: int) -> dict[str, MicroBatches]:
        """What a rank would take of packed steps if all their samples were of one bucket."""
        tokens = {b.key: b.tokens for b in self.data.buckets if b.tokens is not None}
        if tokens:
            check_packing_budget(tokens, budget, data_ranks)
        found = {}
        for key, each in tokens.items():
            samples = budget.tokens_per_step // each
            size = min(-(-samples // data_ranks), (budget.tokens_per_micro_batch or budget.tokens_per_step) // each)
            found[key] = MicroBatches(size, -(-samples // (data_ranks * size)), samples)
        return found

    def _check_balance(self, bucket: TrainBucket, data_ranks: int) -> None:
        assert bucket.global_batch is not None
        assert bucket.tokens is not None
        samples, budget = bucket.global_batch, self.train.tokens_per_step
        if (found := imbalance(samples, data_ranks)) > MAX_IMBALANCE:
            enough = max(b.tokens or 0 for b in self.data.buckets) * data_ranks
            raise ConfigError(
                f"data.buckets {bucket.key}: a step of train.tokens_per_step {budget} has {samples} samples of {bucket.tokens} tokens, "
                f"{samples // data_ranks} to {-(-samples // data_ranks)} for each of {data_ranks} data-parallel ranks, which is {found:.0%} from "
                f"equal work ({MAX_IMBALANCE:.0%} at most); set train.samples_multiple_of: {data_ranks}"
                + (f" and a tokens_per_step of {enough} or more" if enough > (budget or 0) else "")
            )

    @model_validator(mode="after")
    def _has_routers(self) -> Config:
        """A target for what is computed needs parts that can be left out, and routers that are trained."""
        wanted, train = self.train.dynamic, self.train
        if wanted is not None and not self.model.dynamic:
            raise ValueError(
                f"train.dynamic has target_flops_ratio {wanted.target_flops_ratio}, but the model is static: model.dynamic_width and model.dynamic_tokens are both false"
            )
        if wanted is not None and train.lora is not None:
            raise ValueError("train.lora and train.dynamic: adapters leave the model's routers as they are")
        return self

    @model_validator(mode="after")
    def _fuses_tokens(self) -> Config:
        if self.model.sparse_dense is not None and self.train.control is not None:
            raise ValueError(
                "train.control and model.sparse_dense: a branch's residuals would be lost where the sparse blocks are dropped"
            )
        return self

    @model_validator(mode="after")
    def _routes_tokens(self) -> Config:
        routing, train = self.train.token_routing, self.train
        if routing is None:
            return self
        if train.control is not None:
            raise ValueError("train.control and train.token_routing: the branch's residuals are of all tokens")
        if train.sequence_parallel > 1:
            raise ValueError(
                f"train.token_routing with train.sequence_parallel {train.sequence_parallel}: the kept tokens of a frame are "
                "not spread evenly over the ranks that share it"
            )
        if routing.path_drop and self.model.sparse_dense is None:
            raise ValueError(
                f"train.token_routing.path_drop {routing.path_drop:g} needs model.sparse_dense, whose fusion has the mask token"
            )
        try:
            self.model.check_token_routing(routing.start, routing.end)
        except ValueError as error:
            raise ValueError(f"train.{error}") from error
        return self

    @model_validator(mode="after")
    def _aligns_tokens(self) -> Config:
        alignment, train = self.train.alignment, self.train
        if alignment is None:
            return self
        for name, value in (("lora", train.lora), ("control", train.control)):
            if value is not None:
                raise ValueError(f"train.{name} and train.alignment: the aligned blocks are frozen")
        try:
            self.model.check_alignment(alignment.block, alignment.target)
        except ValueError as error:
            raise ValueError(f"train.{error}") from error
        return self

    @model_validator(mode="after")
    def _scales_with_width(self) -> Config:
        mup, train = self.train.optimizer.mup, self.train
        if mup is None:
            return self
        for name, value in (("lora", train.lora), ("control", train.control)):
            if value is not None:
                raise ValueError(f"train.{name} and train.optimizer.mup: it scales a model that is trained as a whole")
        try:
            self.model.at_width(mup.base_width)
        except ValueError as error:
            raise ValueError(f"train.optimizer.mup.base_width {mup.base_width}: {error}") from error
        return self

    @model_validator(mode="after")
    def _packs(self) -> Config:
        train = self.train
        if not train.packing:
            return self
        if train.tokens_per_step is None:
            raise ValueError("train.packing needs train.tokens_per_step, the video tokens of a step")
        reasons = {
            "zero_stage": (train.zero_stage == 3, "ranks gather the embeddings' weights together, once for each shape, whose number differs between them"),
            "samples_multiple_of": (train.samples_multiple_of is not None, "a step is filled with samples of several buckets, by their tokens"),
            "sequence_parallel": (train.sequence_parallel > 1, "the tokens of a packed sequence are not divided over ranks"),
            "control": (train.control is not None, "a control branch's residuals belong to one grid of patches"),
            "dynamic": (train.dynamic is not None, "routers choose by sample what runs"),
            "alignment": (train.alignment is not None, "its head compares the tokens of one grid of patches"),
            "token_routing": (train.token_routing is not None, "kept tokens are as many in each sample of one bucket"),
            "compile": (train.compile, "blocks would be compiled anew for each composition of a micro-batch"),
            "on_spike": (train.on_spike == "rewind", "a rewind leaves samples of one bucket out"),
        }  # fmt: skip
        for name, (given, reason) in reasons.items():
            if given:
                raise ValueError(f"train.packing does not go with train.{name} {getattr(train, name)}: {reason}")
        if self.diffusion.contrastive_weight:
            raise ValueError(
                f"train.packing does not go with diffusion.contrastive_weight {self.diffusion.contrastive_weight:g}: it compares samples of "
                "one shape"
            )
        try:
            self.model.check_packing()
        except ValueError as error:
            raise ValueError(f"train.packing: {error}") from error
        return self

    @model_validator(mode="after")
    def _has_negatives(self) -> Config:
        alone = [b.key for b in self.data.buckets if b.batch_size == 1]
        if self.diffusion.contrastive_weight and alone:
            raise ValueError(
                f"diffusion.contrastive_weight {self.diffusion.contrastive_weight:g} compares each sample with another one of its "
                f"micro-batch, but data.buckets {alone[0]} has batch_size 1"
            )
        return self

    @model_validator(mode="after")
    def _agree(self) -> Config:
        if self.samples.sampler.path_drop and self.model.sparse_dense is None:
            raise ValueError(
                "samples.sampler.path_drop: true needs model.sparse_dense, whose sparse blocks it leaves out"
            )
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
                "diffusion.frame_conditioning: model.conditioning cross_attention has one timestep for all frames; choose another"
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
