"""Objective, noise schedule, timestep sampling, and the sampler."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stdit.config.base import Frozen, Positive, Share


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


class SamplerConfig(Frozen):
    """How videos are drawn from a model; diffusers' schedulers do the steps."""

    # flow_euler is flow matching's; ddim and ddpm (ancestral) are DDPM's; dpm_solver and unipc draw from both.
    scheduler: Literal["flow_euler", "ddim", "ddpm", "dpm_solver", "unipc"] = "flow_euler"
    steps: Positive = 50
    guidance_scale: float = Field(default=4.0, ge=0)
    # Latent channels that are guided, from the first. None: all (diffusers, Latte); 3 of 4 is DiT's and PixArt's own way.
    guidance_channels: Positive | None = None
