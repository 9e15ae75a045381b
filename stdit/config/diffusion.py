"""Objective, noise schedule, timestep sampling, and the sampler."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stdit.config.base import Frozen, Positive, Scale, Share


class FrameConditioningConfig(Frozen):
    """Shares of the training clips with conditioning frames, which stay clean, have timestep 0 and are out of the loss.

    The shares sum to at most 1; what is left of 1 trains without conditioning frames, as do images.
    """

    first: Share = 0.0
    """The first frame (image-to-video)."""
    head: Share = 0.0
    """Some frames at the beginning (forward extension)."""
    tail: Share = 0.0
    """Some frames at the end (backward extension)."""
    ends: Share = 0.0
    """The first and the last frame (interpolation, looping)."""
    random: Share = 0.0
    """Any frames (in-betweening)."""

    @model_validator(mode="after")
    def _sum(self) -> FrameConditioningConfig:
        total = self.first + self.head + self.tail + self.ends + self.random
        if total > 1 + 1e-9:
            raise ValueError(f"the shares of frame_conditioning sum to {total:g}, which is more than 1")
        return self


class DiffusionConfig(Frozen):
    """Training objective and timestep distribution. t = 0 is data, t = 1 is noise."""

    objective: Literal["flow", "ddpm"] = "flow"
    """flow: rectified flow / flow matching (Esser et al. 2024). ddpm: noise prediction on a discrete schedule, with the
    variance learned where `model.learned_variance` says so (Nichol & Dhariwal 2021)."""
    velocity: Literal["noise_minus_data", "data_minus_noise"] = "noise_minus_data"
    """Sign of the velocity that a flow model predicts: diffusers, SD3 and Open-Sora 2; Open-Sora 1.2 has the
    opposite."""
    time_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of training timesteps (flow)."""
    logit_mean: float = 0.0
    """Mean of the logit-normal distribution; above 0 favours noisier timesteps."""
    logit_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the logit-normal distribution."""
    flow_shift: Scale = 1.0
    """Timestep shift of training and sampling, t' = s t / (1 + (s - 1) t); above 1 spends more steps on noisy
    timesteps."""
    shift_base: tuple[Positive, Positive, Positive] | Literal["auto"] | None = None
    """Latent (frames, height, width) at which the shift is `flow_shift`; a larger latent is shifted further, by
    sqrt(area ratio) * sqrt(frames ratio). auto: the smallest latent of the features. null: the same shift at every
    size."""
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Beta schedule (ddpm), by diffusers' names."""
    num_train_timesteps: Annotated[int, Field(gt=0, le=1_000_000)] = 1000
    """Length of the noise schedule (ddpm)."""
    min_snr_gamma: Annotated[float, Field(gt=0)] | None = None
    """ddpm: the noise's error is weighted by min(SNR, gamma) / SNR in training (Hang et al. 2023; they take 5). null:
    by 1."""
    contrastive_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """flow: contrastive flow matching (Stoica et al. 2025; they take 0.05). This times the distance to the velocity of
    another sample of the micro-batch is subtracted from the training loss. 0: off."""
    label_dropout: Share = 0.1
    """Share of samples whose class label becomes the null class, for classifier-free guidance."""
    caption_dropout: Share = 0.1
    """Share of samples whose caption becomes the null caption (and label the null class), for classifier-free
    guidance."""
    frame_conditioning: FrameConditioningConfig = FrameConditioningConfig()
    """Training on clips with conditioning frames: image-to-video, extension, in-betweening."""

    @model_validator(mode="after")
    def _of_objective(self) -> DiffusionConfig:
        if self.objective == "flow" and self.min_snr_gamma is not None:
            raise ValueError(
                f"min_snr_gamma {self.min_snr_gamma:g} weighs the error of predicted noise; objective flow predicts velocity, whose "
                "timesteps time_sampling, logit_mean and flow_shift weigh"
            )
        if self.objective == "ddpm" and self.contrastive_weight:
            raise ValueError(
                f"contrastive_weight {self.contrastive_weight:g} belongs to objective flow; this objective is ddpm"
            )
        return self


class SamplerConfig(Frozen):
    """How videos are sampled; diffusers' schedulers take the steps."""

    scheduler: Literal["flow_euler", "ddim", "ddpm", "dpm_solver", "unipc"] = "flow_euler"
    """flow_euler samples flow models; ddim and ddpm (ancestral) DDPM models; dpm_solver and unipc both."""
    steps: Annotated[int, Field(gt=0, le=100_000)] = 50
    """Number of sampling steps."""
    guidance_scale: float = Field(default=4.0, ge=0, le=10_000)
    """Classifier-free guidance scale; 1 is no guidance, at half the cost."""
    guidance_channels: Positive | None = None
    """Number of latent channels that are guided, from the first. null: all (diffusers, Latte); 3 of 4 is what DiT's and
    PixArt's own code does."""
    path_drop: bool = False
    """Path-drop guidance, for models with `sparse_dense`: the unconditional prediction leaves the sparse blocks out."""
