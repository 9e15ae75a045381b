"""Each scheduler, given the exact prediction for normally distributed data, draws that distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from stdit.config import DiffusionConfig, SamplerConfig
from stdit.diffusion.denoiser import FunctionDenoiser, StepModel
from stdit.diffusion.frame_conditioning import FrameCondition
from stdit.diffusion.randomness import normal
from stdit.diffusion.sample import sample
from stdit.diffusion.schedulers import OBJECTIVES, is_ours, make_scheduler, set_steps, shifted
from stdit.diffusion.timesteps import shift_times

MEAN, STD = 1.5, 0.5
LATENT = (2, 8, 8)
FLOW = DiffusionConfig(objective="flow", flow_shift=1.5, shift_base=(1, 8, 8))
LINEAR = DiffusionConfig(objective="ddpm")
COSINE = DiffusionConfig(objective="ddpm", noise_schedule="squaredcos_cap_v2")
PAIRS = [
    (name, config) for name, of in OBJECTIVES.items() for config in (FLOW, LINEAR, COSINE) if config.objective in of
]
NAMES = [f"{name}-{c.objective}-{c.noise_schedule if c.objective == 'ddpm' else c.flow_shift}" for name, c in PAIRS]


def sampler(name: str, steps: int = 50) -> SamplerConfig:
    return SamplerConfig.model_validate({"scheduler": name, "steps": steps})


Predict = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]


def draw(predict: Predict, *args: Any, **kwargs: Any) -> Tensor:
    return sample(FunctionDenoiser(predict), *args, **kwargs)


def exact(config: DiffusionConfig) -> Predict:
    """What a perfect model of N(MEAN, STD^2) predicts: E[noise - x0 | x_t], or E[noise | x_t]."""
    totals = DDPMScheduler(beta_schedule=config.noise_schedule).alphas_cumprod.double()

    def predict(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        t, x = t.view(-1, 1, 1, 1, 1), x.double()
        flow = config.objective == "flow"
        alpha = 1 - t.double() / 1000 if flow else totals[t].sqrt()
        sigma = t.double() / 1000 if flow else (1 - totals[t]).sqrt()
        score = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return sigma * score - (MEAN + alpha * STD**2 * score) if flow else sigma * score

    return predict


def standard_noise() -> Tensor:
    noise = normal((1, *LATENT), 0, "noise", 0, range(64)).double()
    return (noise - noise.mean()) / noise.std()


@pytest.mark.parametrize(("name", "config"), PAIRS, ids=NAMES)
def test_sampling_from_the_exact_prediction_recovers_mean_and_variance(name: str, config: DiffusionConfig) -> None:
    first_order = name in ("flow_euler", "ddim", "ddpm")
    steps = 400 if first_order else 30
    x = draw(
        exact(config),
        make_scheduler(sampler(name, steps), config, LATENT),
        standard_noise(),
        steps,
        {},
        generator=torch.Generator().manual_seed(0),
    )
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30, 150])
@pytest.mark.parametrize(("name", "config"), PAIRS, ids=NAMES)
def test_any_number_of_steps_ends_near_the_data(name: str, config: DiffusionConfig, steps: int) -> None:
    x = draw(exact(config), make_scheduler(sampler(name), config, LATENT), standard_noise(), steps, {})
    assert x.isfinite().all()
    assert x.mean().item() == pytest.approx(MEAN, abs=0.05)
    assert x.std().item() < STD + 0.05


@pytest.mark.parametrize("config", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_ddim_is_diffusers_ddim_where_steps_divide_the_schedule(config: DiffusionConfig) -> None:
    """Where they don't, DDIMScheduler goes to other timesteps than it says, and the mean is lost."""
    theirs = DDIMScheduler(beta_schedule=config.noise_schedule, clip_sample=False, timestep_spacing="trailing")
    for steps, equal in ((50, True), (150, False)):
        x = draw(exact(config), make_scheduler(sampler("ddim"), config, LATENT), standard_noise(), steps, {})
        y = draw(exact(config), theirs, standard_noise(), steps, {})
        assert torch.allclose(x, y, atol=0.02) == equal
        assert x.mean().item() == pytest.approx(MEAN, abs=0.01)


def test_one_euler_step_lands_on_the_data() -> None:
    data = normal((1, *LATENT), 0, "data", 0, range(3))
    noise = normal((1, *LATENT), 0, "noise", 0, range(3))
    scheduler = make_scheduler(sampler("flow_euler", 1), FLOW, LATENT)
    assert torch.allclose(draw(lambda x, t, c: noise - data, scheduler, noise, 1, {}), data, atol=1e-6)


@pytest.mark.parametrize("name", ["flow_euler", "dpm_solver", "unipc"])
def test_sampling_is_shifted_once_as_training_is(name: str) -> None:
    """sqrt(2 frames) x 1.5; FlowMatchEuler by itself shifts its last sigma twice."""
    shift = 1.5 * 2**0.5
    steps = 10
    plain = set_steps(make_scheduler(sampler(name), DiffusionConfig(), LATENT), steps)
    moved = set_steps(make_scheduler(sampler(name), FLOW, LATENT), steps)
    assert torch.allclose(moved, 1000 * shift_times(plain / 1000, shift), atol=1e-2)
    if name == "flow_euler":
        assert torch.allclose(plain, torch.linspace(1000, 100, 10))


@pytest.mark.parametrize("name", ["flow_euler", "dpm_solver", "unipc"])
def test_the_model_receives_the_exact_timestep_of_its_input(name: str) -> None:
    """DPM-Solver++ and UniPC round their own timesteps; the model sees 1000 sigma."""
    seen: list[float] = []

    def model(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        seen.append(t[0].item())
        return torch.zeros_like(x)

    scheduler = make_scheduler(sampler(name), FLOW, LATENT)
    draw(model, scheduler, standard_noise(), 7, {})
    sigmas = scheduler.sigmas
    assert isinstance(sigmas, Tensor)
    assert seen == (1000 * sigmas[:-1]).tolist()


def test_many_steps_under_a_great_shift_are_all_taken() -> None:
    """Rounded timesteps repeat here; a scheduler that looks its step up by them starts at the second."""
    config = DiffusionConfig(flow_shift=12.0)
    for name in ("dpm_solver", "unipc"):
        scheduler = make_scheduler(sampler(name, 100), config, LATENT)
        x = draw(exact(config), scheduler, standard_noise(), 100, {})
        assert scheduler.step_index == 100
        assert x.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "unipc", "dpm_solver"])
@pytest.mark.parametrize("steps", [1, 20, 333, 500])
def test_the_cosine_schedule_is_not_entered_where_no_signal_is(name: str, steps: int) -> None:
    times = set_steps(make_scheduler(sampler(name, steps), COSINE, LATENT), steps)
    totals = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert totals[int(times[0])] > 3e-5
    assert (times.diff() < 0).all()


def test_ancestral_sampling_uses_the_learned_variance() -> None:
    """The largest variance, beta, at every step, against the smallest."""
    results = []
    for fraction in (-1.0, 1.0):

        def model(x: Tensor, t: Tensor, cond: Mapping[str, Tensor], fraction: float = fraction) -> Tensor:
            return torch.cat([exact(LINEAR)(x, t, cond), torch.full_like(x, fraction)], dim=1)

        scheduler = make_scheduler(sampler("ddpm", 20), LINEAR, LATENT, learned_variance=True)
        generator = torch.Generator().manual_seed(0)
        results.append(draw(model, scheduler, standard_noise(), 20, {}, generator=generator).std().item())
    assert results[0] < results[1]


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "unipc"])
def test_other_schedulers_leave_the_variance_out(name: str) -> None:
    def both(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        noise = exact(LINEAR)(x, t, cond)
        return torch.cat([noise, torch.full_like(noise, 99.0)], dim=1)

    ways = [(exact(LINEAR), False), (both, True)]
    x = [
        draw(model, make_scheduler(sampler(name), LINEAR, LATENT, learned), standard_noise(), 10, {})
        for model, learned in ways
    ]
    assert torch.equal(x[0], x[1])


def test_a_generator_per_sample_makes_noise_independent_of_the_batch() -> None:
    scheduler = make_scheduler(sampler("ddpm", 5), LINEAR, LATENT)
    noise = standard_noise()[:4]

    def rows_of(rows: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(r) for r in rows]
        return draw(exact(LINEAR), shifted(scheduler, 1.0), noise[rows], 5, {}, generator=generators)

    assert torch.allclose(rows_of([0, 1, 2, 3]), torch.cat([rows_of([0, 1]), rows_of([2, 3])]), atol=1e-6)


def test_a_scheduler_can_be_shifted_anew() -> None:
    for name in ("flow_euler", "dpm_solver", "unipc"):
        scheduler = make_scheduler(sampler(name), DiffusionConfig(flow_shift=5.0), LATENT)
        expected = set_steps(make_scheduler(sampler(name), FLOW, LATENT), 10)
        assert torch.allclose(set_steps(shifted(scheduler, 1.5 * 2**0.5), 10), expected)


@pytest.mark.parametrize(
    ("name", "config", "other"), [("flow_euler", LINEAR, "flow"), ("ddim", FLOW, "ddpm"), ("ddpm", FLOW, "ddpm")]
)
def test_a_sampler_of_another_objective_is_refused(name: str, config: DiffusionConfig, other: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} samples objective {other}; .*{config.objective}"):
        make_scheduler(sampler(name), config, LATENT)


@pytest.mark.parametrize(("name", "most"), [("ddim", 1000), ("ddpm", 1000), ("dpm_solver", 500), ("unipc", 500)])
def test_more_steps_than_the_schedule_has_are_refused(name: str, most: int) -> None:
    times = set_steps(make_scheduler(sampler(name, most), LINEAR, LATENT), most)
    assert (times.diff() < 0).all()
    with pytest.raises(ValueError, match=rf"steps {most + 1} .* {most}"):
        make_scheduler(sampler(name, most + 1), LINEAR, LATENT)


@pytest.mark.parametrize(("name", "config"), PAIRS, ids=NAMES)
def test_conditioning_frames_are_in_every_step_and_come_back_as_they_were(name: str, config: DiffusionConfig) -> None:
    clean = normal((1, *LATENT), 0, "data", 0, range(4))
    given = FrameCondition(torch.tensor([[True, False]]), clean)
    inputs: list[Tensor] = []

    def model(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        inputs.append(x)
        return exact(config)(x, t, cond)

    scheduler, noise = make_scheduler(sampler(name, 7), config, LATENT), normal((1, *LATENT), 0, "noise", 0, range(4))
    x = draw(model, scheduler, noise, 7, {}, torch.Generator().manual_seed(0), frame_condition=given)
    assert all(torch.equal(seen[:, :, 0], clean[:, :, 0]) for seen in [*inputs, x])
    if name != "ddpm":  # whose noise is drawn for all frames together
        plain = draw(exact(config), make_scheduler(sampler(name, 7), config, LATENT), noise, 7, {})
        assert torch.allclose(x[:, :, 1], plain[:, :, 1], atol=1e-5)


@pytest.mark.parametrize(("name", "config"), PAIRS, ids=NAMES)
def test_a_model_is_bound_once_and_called_by_step(name: str, config: DiffusionConfig) -> None:
    bound: list[tuple[Mapping[str, Any], Tensor]] = []
    steps: list[int] = []

    class Recorder:
        def bind(self, cond: Mapping[str, Any], times: Tensor) -> StepModel:
            bound.append((cond, times))
            return lambda x, i: steps.append(i) or torch.zeros_like(x)

    scheduler, cond = make_scheduler(sampler(name, 5), config, LATENT), {"fps": torch.ones(1)}
    sample(Recorder(), scheduler, standard_noise(), 5, cond, torch.Generator())
    ((found, times),) = bound
    assert found is cond
    assert times.shape == (5,)
    assert steps == [0, 1, 2, 3, 4]


def test_an_interrupted_loop_returns_what_it_has() -> None:
    done: list[int] = []

    def on_step(i: int, timestep: Tensor, x: Tensor) -> Tensor:
        done.append(i)
        return x

    scheduler = make_scheduler(sampler("flow_euler", 5), FLOW, LATENT)
    draw(exact(FLOW), scheduler, standard_noise(), 5, {}, on_step=on_step, interrupted=lambda: len(done) == 2)
    assert done == [0, 1]


def test_schedulers_of_others_are_neither_shifted_nor_mended() -> None:
    for make in (
        lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda: DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
        lambda: UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
        lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    ):
        theirs, plain = make(), make()
        assert shifted(theirs, 7.0) is theirs
        plain.set_timesteps(20)
        assert torch.equal(set_steps(theirs, 20), torch.as_tensor(plain.timesteps))
        assert not is_ours(theirs)


@pytest.mark.parametrize(("name", "config"), PAIRS, ids=NAMES)
def test_a_saved_scheduler_is_recognised_when_loaded(
    name: str, config: DiffusionConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scheduler = make_scheduler(sampler(name), config, LATENT)
    scheduler.save_pretrained(tmp_path)
    read = type(scheduler).from_pretrained(tmp_path)
    assert is_ours(read)
    assert torch.equal(set_steps(read, 9), set_steps(scheduler, 9))
    assert "not expected" not in caplog.text
