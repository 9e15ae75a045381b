"""Flow matching and DDPM: the paths, the targets, and the variational bound of learned variance."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from stdit.config import ConfigError, DiffusionConfig, validate
from stdit.diffusion.denoiser import FunctionDenoiser
from stdit.diffusion.objectives import DDPM, FlowMatching, make_objective, normal_kl, with_scheduler_sign
from stdit.diffusion.randomness import normal, uniform

SHAPE = (2, 3, 4, 4)  # C, T, H, W
LATENT = (3, 4, 4)
DATA = normal(SHAPE, 0, "data", 0, range(5))
NOISE = normal(SHAPE, 0, "noise", 0, range(5))
TIMES = uniform(0, "time", 0, range(5))
FLOW = DiffusionConfig()
SCHEDULES = [DiffusionConfig(objective="ddpm"), DiffusionConfig(objective="ddpm", noise_schedule="squaredcos_cap_v2")]


def velocity(x: Tensor, timestep: Tensor) -> Tensor:
    return NOISE - DATA


def test_the_flow_path_at_zero_is_data_and_at_one_noise() -> None:
    flow = make_objective(FLOW, learned_variance=False)
    assert torch.equal(flow.add_noise(DATA, NOISE, torch.zeros(5)), DATA)
    assert torch.equal(flow.add_noise(DATA, NOISE, torch.ones(5)), NOISE)


def test_one_euler_step_with_the_exact_velocity_recovers_the_data() -> None:
    flow = make_objective(FLOW, learned_variance=False)
    x_t = flow.add_noise(DATA, NOISE, TIMES)
    recovered = x_t - TIMES.view(-1, 1, 1, 1, 1) * velocity(x_t, flow.timestep(TIMES))
    assert torch.allclose(recovered, DATA, atol=1e-6)


def test_the_exact_velocity_has_no_loss_and_a_constant_error_its_square() -> None:
    flow = make_objective(FLOW, learned_variance=False)
    assert torch.equal(flow.loss(velocity, DATA, NOISE, TIMES), torch.zeros(5))
    loss = flow.loss(lambda x, t: velocity(x, t) + 0.5, DATA, NOISE, TIMES)
    assert torch.allclose(loss, torch.full((5,), 0.25))


def test_a_loss_is_per_sample() -> None:
    for objective in (make_objective(FLOW, False), make_objective(SCHEDULES[0], False)):
        whole = objective.loss(lambda x, t: 0.3 * x, DATA, NOISE, TIMES)
        each = [
            objective.loss(lambda x, t: 0.3 * x, DATA[i : i + 1], NOISE[i : i + 1], TIMES[i : i + 1]) for i in range(5)
        ]
        assert whole.shape == (5,)
        assert torch.allclose(whole, torch.cat(each))


def test_flow_times_are_handed_over_on_a_scale_of_a_thousand() -> None:
    seen = []
    make_objective(FLOW, False).loss(lambda x, t: seen.append(t) or x, DATA, NOISE, TIMES)
    assert torch.equal(seen[0], 1000 * TIMES)


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: c.noise_schedule)
def test_ddpm_noises_as_diffusers_does(config: DiffusionConfig) -> None:
    objective = make_objective(config, False)
    scheduler = DDPMScheduler(beta_schedule=config.noise_schedule)
    steps = torch.tensor([0, 1, 10, 500, 999])
    ours = objective.add_noise(DATA, NOISE, (steps + 1) / 1000)
    theirs = scheduler.add_noise(DATA, NOISE, steps)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_ddpm_times_cover_every_step_evenly() -> None:
    objective = make_objective(DiffusionConfig(objective="ddpm", num_train_timesteps=50), False)
    u = torch.arange(5000) / 5000
    steps = objective.timestep(objective.times(u, LATENT))
    assert steps.dtype == torch.int64
    assert torch.equal(steps.bincount(), torch.full((50,), 100))
    assert objective.timestep(torch.tensor([0.0, 1.0])).tolist() == [0, 49]


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: c.noise_schedule)
@pytest.mark.parametrize("learned", [False, True])
def test_the_exact_noise_has_no_error(config: DiffusionConfig, learned: bool) -> None:
    objective = DDPM(config, learned)
    # -1 is the posterior's own variance: with the exact noise the predicted step is the true one, and the bound is 0.
    prediction = torch.cat([NOISE, -torch.ones_like(NOISE)], dim=1) if learned else NOISE
    t = torch.tensor([0.003, 0.1, 0.5, 0.9, 1.0])
    loss = objective.loss(lambda x, step: prediction, DATA, NOISE, t)
    assert torch.allclose(loss, torch.zeros(5), atol=1e-5)


def test_the_bound_does_not_teach_the_noise() -> None:
    objective = DDPM(SCHEDULES[0], learned_variance=True)
    prediction = torch.cat([NOISE + 0.1, torch.zeros_like(NOISE)], dim=1).requires_grad_()
    objective.loss(lambda x, step: prediction, DATA, NOISE, TIMES).sum().backward()
    assert prediction.grad is not None
    of_noise, of_variance = prediction.grad.split(2, dim=1)
    assert torch.allclose(of_noise, torch.full_like(NOISE, 2 * 0.1 / NOISE[0].numel()))
    assert (of_variance != 0).any()


def test_the_bound_is_the_divergence_of_the_true_step_from_the_predicted() -> None:
    """Against equations 6, 7 and 10 of Ho et al. 2020, written out with numbers."""
    step, fraction, error = 300, 0.25, 0.2
    scheduler = DDPMScheduler()
    beta = scheduler.betas[step].double()
    total, before = scheduler.alphas_cumprod[step].double(), scheduler.alphas_cumprod[step - 1].double()
    variance = beta * (1 - before) / (1 - total)
    log_variance = (1 + fraction) / 2 * beta.log() + (1 - fraction) / 2 * variance.log()
    shift = error * beta / ((1 - total).sqrt() * (1 - beta).sqrt())  # of the mean, for an error in the noise
    kl = (
        0.5
        * (log_variance - variance.log() + variance / log_variance.exp() + shift**2 / log_variance.exp() - 1)
        / math.log(2)
    )
    prediction = torch.cat([NOISE + error, torch.full_like(NOISE, fraction)], dim=1)
    t = torch.full((5,), (step + 1) / 1000)
    loss = DDPM(SCHEDULES[0], learned_variance=True).loss(lambda x, s: prediction, DATA, NOISE, t)
    assert torch.allclose(loss, torch.full((5,), error**2 + kl.item()), rtol=1e-3)


def test_the_decoder_prefers_a_mean_at_the_data() -> None:
    objective = DDPM(SCHEDULES[0], learned_variance=True)
    data = DATA.clamp(-1, 1)
    first = torch.full((5,), 0.001)
    losses = [
        objective.loss(lambda x, s, e=e: torch.cat([NOISE + e, 0 * NOISE], 1), data, NOISE, first) - e**2
        for e in (0.0, 0.5, 2.0)
    ]
    assert all(loss.isfinite().all() for loss in losses)
    assert (losses[0] < losses[1]).all()
    assert (losses[1] < losses[2]).all()


@pytest.mark.parametrize("config", SCHEDULES, ids=lambda c: c.noise_schedule)
@pytest.mark.parametrize("learned", [False, True])
def test_min_snr_weighs_the_error_of_the_noise_alone(config: DiffusionConfig, learned: bool) -> None:
    """Hang et al. 2023, section 3.4: w = min(SNR, gamma) / SNR for predicted noise; against diffusers'
    alphas_cumprod."""
    weighed = DDPM(config.model_copy(update={"min_snr_gamma": 5.0}), learned)
    prediction = torch.cat([NOISE + 0.3, 0 * NOISE], dim=1) if learned else NOISE + 0.3
    steps = torch.tensor([0, 10, 200, 500, 999])
    trained, loss = weighed.training_loss(lambda x, s: prediction, DATA, NOISE, (steps + 1) / 1000)
    plain_trained, plain = DDPM(config, learned).training_loss(lambda x, s: prediction, DATA, NOISE, (steps + 1) / 1000)
    total = DDPMScheduler(beta_schedule=config.noise_schedule).alphas_cumprod[steps].double()
    snr = total / (1 - total)
    weights = torch.minimum(snr, torch.tensor(5.0)) / snr
    assert weights[0] < 0.01
    assert weights[-1] == 1
    torch.testing.assert_close(weighed.min_snr_weight(steps), weights.float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(trained, loss - 0.09 * (1 - weights).float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(loss, plain)
    assert torch.equal(plain_trained, plain)


def test_contrastive_flow_matching_moves_away_from_another_samples_velocity() -> None:
    """Stoica et al. 2025: |v - u|² - w |v - u'|²; without it, and in validation, the loss is flow matching's."""
    config = DiffusionConfig(contrastive_weight=0.05)
    flow, others = make_objective(config, False), torch.tensor([3, 0, 4, 1, 2])
    target = (NOISE - DATA).requires_grad_()
    prediction = (0.3 * NOISE).requires_grad_()
    trained, loss = flow.training_loss(lambda x, t: prediction, DATA, NOISE, TIMES, negatives=others)
    expected = ((prediction - target) ** 2).flatten(1).mean(1)
    distance = ((prediction - target[others]) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(trained, expected - 0.05 * distance)
    (gradient,) = torch.autograd.grad(trained.sum(), prediction)
    direction = 2 * ((1 - 0.05) * prediction - target + 0.05 * target[others]) / prediction[0].numel()
    torch.testing.assert_close(gradient, direction)
    plain = flow.training_loss(lambda x, t: prediction, DATA, NOISE, TIMES)
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(flow.loss(lambda x, t: prediction, DATA, NOISE, TIMES), loss)


def test_clean_frames_are_out_of_the_contrast_too() -> None:
    flow, others = make_objective(DiffusionConfig(contrastive_weight=0.5), False), torch.tensor([1, 2, 3, 4, 0])
    frames = torch.tensor([[True, False, False]]).expand(5, -1)
    spoiled = 0.3 * NOISE + 100 * frames[:, None, :, None, None]
    found, expected = (
        flow.training_loss(lambda x, t, p=p: p, DATA, NOISE, TIMES, frames, others) for p in (spoiled, 0.3 * NOISE)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"min_snr_gamma": 5.0}, "predicts velocity"),
        ({"objective": "ddpm", "contrastive_weight": 0.05}, "objective flow"),
    ],
)
def test_weights_of_the_other_objective_are_refused(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        validate(settings, DiffusionConfig, "test")


def test_divergence_of_a_distribution_from_itself_is_zero() -> None:
    assert torch.equal(normal_kl(DATA, NOISE, DATA, NOISE), torch.zeros_like(DATA))


def test_flow_matching_ignores_the_second_half_of_the_channels() -> None:
    """Open-Sora 1.2 predicts 2C channels and takes the first C."""
    flow = make_objective(FLOW, learned_variance=True)
    loss = flow.loss(lambda x, t: torch.cat([velocity(x, t) + 0.5, 9 * x], 1), DATA, NOISE, TIMES)
    assert torch.allclose(loss, torch.full((5,), 0.25))


def test_open_soras_velocity_is_the_opposite() -> None:
    config = DiffusionConfig(velocity="data_minus_noise")
    flow = make_objective(config, learned_variance=False)
    assert torch.equal(flow.loss(lambda x, t: -velocity(x, t), DATA, NOISE, TIMES), torch.zeros(5))
    model = FunctionDenoiser(lambda x, t, cond: -velocity(x, t))
    step_model = with_scheduler_sign(model, config).bind({}, TIMES)
    assert torch.equal(step_model(DATA, 2), velocity(DATA, TIMES[2].expand(5)))
    assert with_scheduler_sign(model, FLOW) is model


@pytest.mark.parametrize("objective", [FlowMatching(FLOW), DDPM(SCHEDULES[0], True)])
def test_a_prediction_of_the_wrong_shape_names_both(objective: FlowMatching | DDPM) -> None:
    with pytest.raises(ValueError, match=r"\(5, 3, 3, 4, 4\).*\(5, [24], 3, 4, 4\)"):
        objective.loss(lambda x, t: torch.zeros(5, 3, 3, 4, 4), DATA, NOISE, TIMES)
