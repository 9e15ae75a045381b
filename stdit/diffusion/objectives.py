"""Training objectives: flow matching's velocity, or DDPM's noise with or without learned variance.

B batch, C channels, T H W latent grid. Latents are (B, C, T, H, W), times (B,) with t = 0 data and t = 1 noise.
Both have the same methods; the model comes as a function `predict(x_t, timestep)`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from stdit.config import DiffusionConfig
from stdit.diffusion.denoiser import Conditions, Denoiser, StepModel
from stdit.diffusion.frame_conditioning import insert_frames
from stdit.diffusion.timesteps import TIMESTEPS, sample_times

Predict = Callable[[Tensor, Tensor], Tensor]


def make_objective(config: DiffusionConfig, learned_variance: bool) -> FlowMatching | DDPM:
    """The objective that `config` names."""
    return DDPM(config, learned_variance) if config.objective == "ddpm" else FlowMatching(config, learned_variance)


def _per_sample(values: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, …), to multiply `x`."""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 1))


def _mean(x: Tensor, conditioning_frames: Tensor | None = None) -> Tensor:
    """Mean over all but the batch, (B, C, T, H, W) -> (B,), over the frames that are not conditioning_frames (B, T)."""
    if conditioning_frames is None:
        return x.flatten(1).mean(1)
    noised = (~conditioning_frames).to(x.dtype)
    return (x.mean((1, 3, 4)) * noised).sum(1) / noised.sum(1).clamp(min=1)


def _check_prediction(prediction: Tensor, channels: int, x: Tensor) -> None:
    expected = (x.shape[0], channels, *x.shape[2:])
    if tuple(prediction.shape) != expected:
        raise ValueError(
            f"the model's prediction has shape {tuple(prediction.shape)}, this objective needs {expected} "
            f"(model.learned_variance doubles the channels)"
        )


class Objective(ABC):
    """What both have in common."""

    @abstractmethod
    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t at times t (B,)."""

    @abstractmethod
    def timestep(self, t: Tensor) -> Tensor:
        """t (B,) on the model's scale."""

    @abstractmethod
    def prediction_loss(
        self,
        prediction: Tensor,
        x_t: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning_frames: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What is differentiated, and `loss`, of the model's prediction for x_t, (B,) each, in float32.
        conditioning_frames (B, T) bool: frames that stay clean and out of the loss."""

    def model_inputs(
        self, x0: Tensor, noise: Tensor, t: Tensor, conditioning_frames: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x_t and timestep, which the model predicts from."""
        return insert_frames(self.add_noise(x0, noise, t), x0, conditioning_frames), self.timestep(t)

    def training_loss(
        self,
        predict: Predict,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning_frames: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`prediction_loss` of the model's own prediction."""
        x_t, timestep = self.model_inputs(x0, noise, t, conditioning_frames)
        return self.prediction_loss(predict(x_t, timestep), x_t, x0, noise, t, conditioning_frames, negatives)

    def loss(
        self, predict: Predict, x0: Tensor, noise: Tensor, t: Tensor, conditioning_frames: Tensor | None = None
    ) -> Tensor:
        """The objective without any switch, (B,): what is logged, validated and compared."""
        return self.training_loss(predict, x0, noise, t, conditioning_frames)[1]


class FlowMatching(Objective):
    """Straight paths x_t = (1 - t) x0 + t noise and their velocity noise - x0 (Lipman et al. 2023; the sign of
    diffusers, SD3 and Open-Sora 2), or with `velocity: data_minus_noise` its opposite (Open-Sora 1.2).

    learned_variance: the model gives 2C channels, as Open-Sora 1.2's, of which the second half is not looked at.
    """

    def __init__(self, config: DiffusionConfig, learned_variance: bool = False) -> None:
        self.config, self.learned_variance = config, learned_variance

    def times(self, u: Tensor, latent: tuple[int, int, int]) -> Tensor:
        """Times (B,) from uniform u (B,), for latents (T, H, W)."""
        return sample_times(self.config, u, latent)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t at times t (B,): x0 at 0, noise at 1, both to the last bit."""
        t = _per_sample(t, x0)
        return (1 - t) * x0 + t * noise

    def timestep(self, t: Tensor) -> Tensor:
        """t on the model's scale, 0 to 1000."""
        return t * TIMESTEPS

    def prediction_loss(
        self,
        prediction: Tensor,
        x_t: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning_frames: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`loss` is the mean squared error of the velocity. negatives (B,): for each sample the index of another one;
        what is differentiated is then loss - contrastive_weight x the mean squared distance to that one's velocity
        (Stoica et al. 2025, contrastive flow matching, equation 5)."""
        channels = x0.shape[1]
        _check_prediction(prediction, 2 * channels if self.learned_variance else channels, x0)
        velocity = noise - x0 if self.config.velocity == "noise_minus_data" else x0 - noise
        prediction, velocity = prediction[:, :channels].float(), velocity.float()
        loss = _mean((prediction - velocity).square(), conditioning_frames)
        if negatives is None:
            return loss, loss
        distance = _mean((prediction - velocity[negatives]).square(), conditioning_frames)
        return loss - self.config.contrastive_weight * distance, loss


class DDPM(Objective):
    """Noise prediction on diffusers' discrete schedule (Ho et al. 2020), with learned variance by the hybrid bound
    of Nichol & Dhariwal 2021, equations 15 and 16, as DiT trains it.

    Step k of N (`num_train_timesteps`) stands at t = (k + 1) / N, so that t = 1 is the noisiest step.
    """

    def __init__(self, config: DiffusionConfig, learned_variance: bool) -> None:
        self.steps = config.num_train_timesteps
        self.min_snr_gamma = config.min_snr_gamma
        self.learned_variance = learned_variance
        # diffusers' betas, then in float64: 1 - alphas_cumprod loses three digits in float32 at the first step.
        betas = DDPMScheduler(num_train_timesteps=self.steps, beta_schedule=config.noise_schedule).betas.double()
        alphas = 1 - betas
        total = alphas.cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), total[:-1]])
        self.signal = total.sqrt()
        self.noise = (1 - total).sqrt()
        # q(x_{k-1} | x_k, x0), equations 6 and 7 of Ho et al. 2020. Its variance is 0 at step 0, where step 1's stands
        # in.
        posterior = betas * (1 - before) / (1 - total)
        self.log_smallest = torch.cat([posterior[1:2], posterior[1:]]).log()
        self.log_largest = betas.log()
        self.mean_of_x0 = betas * before.sqrt() / (1 - total)
        self.mean_of_xt = (1 - before) * alphas.sqrt() / (1 - total)

    def _at(self, table: Tensor, step: Tensor, x: Tensor) -> Tensor:
        return _per_sample(table.to(step.device)[step].float(), x)

    def times(self, u: Tensor, latent: tuple[int, int, int]) -> Tensor:
        """Times (B,) from uniform u (B,) in [0, 1): every step is equally likely. The latent's size plays no part."""
        return ((u * self.steps).floor() + 1).clamp(max=self.steps) / self.steps

    def timestep(self, t: Tensor) -> Tensor:
        """diffusers' step 0 … N - 1 (int64) of t; t = 0 counts as step 0, the cleanest there is."""
        return ((t * self.steps).round().long() - 1).clamp(0, self.steps - 1)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(alphas_cumprod) x0 + sqrt(1 - alphas_cumprod) noise at times t (B,)."""
        step = self.timestep(t)
        return self._at(self.signal, step, x0) * x0 + self._at(self.noise, step, x0) * noise

    def prediction_loss(
        self,
        prediction: Tensor,
        x_t: Tensor,
        x0: Tensor,
        noise: Tensor,
        t: Tensor,
        conditioning_frames: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`loss` is the mean squared error of the noise, with learned variance plus 0.001 N times the bound's term, in
        bits per dimension, from which the noise channels get no gradient. What is differentiated has the noise's error
        weighted by `min_snr_weight`, the bound's term by 1. negatives: for flow matching alone."""
        step, channels = self.timestep(t), x0.shape[1]
        _check_prediction(prediction, 2 * channels if self.learned_variance else channels, x0)
        prediction, x_t, x0 = prediction.float(), x_t.float(), x0.float()
        error = _mean((prediction[:, :channels] - noise.float()).square(), conditioning_frames)
        trained = error if self.min_snr_gamma is None else self.min_snr_weight(step) * error
        if not self.learned_variance:
            return trained, error
        predicted_noise, fraction = prediction.split(channels, dim=1)
        bound = self.variational_bound(predicted_noise.detach(), fraction, x0, x_t, step, conditioning_frames)
        return trained + self.steps / 1000 * bound, error + self.steps / 1000 * bound

    def min_snr_weight(self, step: Tensor) -> Tensor:
        """min(SNR, gamma) / SNR at steps (B,), float32, SNR being alphas_cumprod / (1 - alphas_cumprod) (Hang et al.
        2023, section 3.4, for noise prediction)."""
        assert self.min_snr_gamma is not None
        snr = (self.signal / self.noise).square()
        return (snr.clamp(max=self.min_snr_gamma) / snr).to(step.device)[step].float()

    def variational_bound(
        self,
        noise: Tensor,
        fraction: Tensor,
        x0: Tensor,
        x_t: Tensor,
        step: Tensor,
        conditioning_frames: Tensor | None = None,
    ) -> Tensor:
        """Term of the variational bound at `step` (B,), in bits per dimension, (B,).

        `fraction` (B, C, T, H, W), -1 to 1, interpolates the log variance between the posterior's and beta.
        At step 0 it is DiT's decoder term: the likelihood of x0 in bins of 1/255 of its range of -1 to 1.
        """
        share = (fraction + 1) / 2
        log_smallest, log_largest = self._at(self.log_smallest, step, x_t), self._at(self.log_largest, step, x_t)
        log_variance = share * log_largest + (1 - share) * log_smallest
        x0_predicted = (x_t - self._at(self.noise, step, x_t) * noise) / self._at(self.signal, step, x_t)
        of_x0, of_xt = self._at(self.mean_of_x0, step, x_t), self._at(self.mean_of_xt, step, x_t)
        mean = of_x0 * x0_predicted + of_xt * x_t
        truth = of_x0 * x0 + of_xt * x_t
        divergence = normal_kl(truth, log_smallest, mean, log_variance)
        decoder = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return torch.where(
            step == 0, _mean(decoder, conditioning_frames), _mean(divergence, conditioning_frames)
        ) / math.log(2)


def with_scheduler_sign(model: Denoiser, config: DiffusionConfig) -> Denoiser:
    """`model` with the sign of velocity that diffusers' schedulers expect, noise - x0."""
    if config.objective == "ddpm" or config.velocity == "noise_minus_data":
        return model
    return _Negated(model)


@dataclass(frozen=True)
class _Negated:
    model: Denoiser

    def bind(self, cond: Conditions, times: Tensor) -> StepModel:
        step_model = self.model.bind(cond, times)
        return lambda x, i: -step_model(x, i)


def normal_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of normal distributions, element by element, in nats."""
    ratio = (log_variance1 - log_variance2).exp()
    return 0.5 * (log_variance2 - log_variance1 + ratio + (mean1 - mean2).square() * (-log_variance2).exp() - 1)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log likelihood, in nats, of x (-1 to 1 in 256 levels) under a normal distribution over its bins; the outermost
    bins reach to infinity (Ho et al. 2020, equation 13)."""
    scale = (-log_std).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * scale)
    lower = torch.special.ndtr((x - mean - 1 / 255) * scale)
    inside = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return inside.clamp(min=1e-12).log()
