"""Times of flow matching: t = 0 is data, t = 1 is noise. How training draws them, and the shift that training and
sampling share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stdit.config import DiffusionConfig

# The scale on which diffusers' flow schedulers hand times to a model, and on which ours takes them.
TIMESTEPS = 1000


def shift_for(config: DiffusionConfig, latent: tuple[int, int, int]) -> float:
    """The shift r of a latent (T, H, W): `flow_shift` times sqrt(area ratio) times sqrt(frames ratio) to `shift_base`.

    A larger latent repeats more of its content, so that the same noise hides less of it and more time must be spent
    near t = 1 (Esser et al. 2024, section 5.3.2; with frames as in Open-Sora 1.2). Smaller latents are shifted less.
    """
    if config.shift_base is None:
        return config.flow_shift
    assert config.shift_base != "auto", "stdit.training.derive resolves it"
    frames, height, width = latent
    base_frames, base_height, base_width = config.shift_base
    return config.flow_shift * math.sqrt(height * width / (base_height * base_width)) * math.sqrt(frames / base_frames)


def shift_times(t: Tensor, r: float) -> Tensor:
    """t' = r t / (1 + (r - 1) t), which keeps 0 and 1 and moves what is between towards noise for r > 1.

    Esser et al. 2024, equation 23; the sigmas of diffusers' flow schedulers go through the same.
    """
    return r * t / (1 + (r - 1) * t)


def sample_times(config: DiffusionConfig, u: Tensor, latent: tuple[int, int, int]) -> Tensor:
    """Training times t (B,) from uniform u (B,) in [0, 1), for latents (T, H, W): the quantile function of
    `time_sampling` (logit-normal: Esser et al. 2024, section 3.1), then the latent's shift."""
    if config.time_sampling == "logit_normal":
        # The quantile is infinite at 0 and 1, where u in float32 can come to lie.
        quantile = torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7))
        t = torch.sigmoid(config.logit_mean + config.logit_std * quantile).to(u.dtype)
    else:
        t = u
    return shift_times(t, shift_for(config, latent))
