"""Sampling by diffusers' schedulers: the one place where our times (t = 0 data, t = 1 noise) meet their timesteps.

A scheduler that `make_scheduler` made, or that was made from one by diffusers' from_config, bears a mark in its config.
It is shifted to the latents it draws, and three habits of diffusers are kept from its samples. FlowMatchEuler shifts its smallest sigma twice and spends its last
step on a thousandth: it is given its sigmas. DPM-Solver++ and UniPC round the times of flow matching down to whole
numbers, two of which may then be equal: the model is given the sigmas themselves and steps are counted, not looked
up. DPM-Solver++ takes three channels for the noise where variance is learned: schedulers that do not use the variance
never see it. Any other scheduler, a published one say, steps exactly as diffusers' own pipelines have it step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_lcm import FlowMatchLCMScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from torch import Tensor

from stdit.config import DiffusionConfig, SamplerConfig
from stdit.diffusion.guidance import Model
from stdit.diffusion.timesteps import TIMESTEPS, shift_for

Scheduler = FlowMatchEulerDiscreteScheduler | DDPMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler
# log(signal / noise) below which DDPM sampling does not begin, as diffusers advises for DPM-Solver++. The linear schedule
# ends here; the cosine schedule goes on until there is no signal, and an error in the noise that a model predicts there
# returns twenty-thousandfold in x0.
LEAST_LAMBDA = -5.1
# In the config of the schedulers made here; diffusers carries keys with a leading underscore along in silence.
MARK = {"_made_by": "stdit"}

# Those of flow matching alone; others are told by use_flow_sigmas.
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
OBJECTIVES = {
    "flow_euler": ("flow",),
    "ddim": ("ddpm",),
    "ddpm": ("ddpm",),
    "dpm_solver": ("flow", "ddpm"),
    "unipc": ("flow", "ddpm"),
}


def check_sampler(sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
    """ValueError where `sampler` cannot draw from a model of this objective, or takes more steps than there are."""
    objectives = OBJECTIVES[sampler.scheduler]
    if diffusion.objective not in objectives:
        fitting = ", ".join(name for name, of in OBJECTIVES.items() if diffusion.objective in of)
        raise ValueError(
            f"sampler.scheduler {sampler.scheduler} draws from objective {objectives[0]}; the model was trained with "
            f"diffusion.objective {diffusion.objective} (choose one of {fitting})"
        )
    # The multistep solvers would divide by 0 where two of their steps are rounded to one timestep.
    most = diffusion.num_train_timesteps // (2 if sampler.scheduler in ("dpm_solver", "unipc") else 1)
    if diffusion.objective == "ddpm" and sampler.steps > most:
        raise ValueError(
            f"sampler.steps {sampler.steps} is more than the {most} that {sampler.scheduler} can take of "
            f"diffusion.num_train_timesteps {diffusion.num_train_timesteps}"
        )


def compatible_scheduler(sampler: SamplerConfig, diffusion: DiffusionConfig) -> SamplerConfig:
    """`sampler`, with the usual scheduler of the objective in place of one that cannot draw from it."""
    if diffusion.objective in OBJECTIVES[sampler.scheduler]:
        return sampler
    return sampler.model_copy(update={"scheduler": "flow_euler" if diffusion.objective == "flow" else "ddim"})


def make_scheduler(
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
    latent: tuple[int, int, int],
    learned_variance: bool = False,
) -> Scheduler:
    """The diffusers scheduler that draws latents (T, H, W) from a model trained with `diffusion`, shifted as in training.

    `ddpm` (ancestral sampling) uses a learned variance; the others are deterministic. ValueError as check_sampler's.
    """
    check_sampler(sampler, diffusion)
    scheduler = _made(sampler.scheduler, diffusion, latent, learned_variance)
    scheduler.register_to_config(**MARK)
    return scheduler


def _made(name: str, diffusion: DiffusionConfig, latent: tuple[int, int, int], learned_variance: bool) -> Scheduler:
    if diffusion.objective == "flow":
        shift = shift_for(diffusion, latent)
        if name == "flow_euler":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS, shift=shift)
        solver = DPMSolverMultistepScheduler if name == "dpm_solver" else UniPCMultistepScheduler
        return solver(
            num_train_timesteps=TIMESTEPS, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
    schedule = {"num_train_timesteps": diffusion.num_train_timesteps, "beta_schedule": diffusion.noise_schedule}
    if name == "ddim":
        # DDIM is first-order DPM-Solver++ (Lu et al. 2022, section 4.1). diffusers' DDIMScheduler steps to timestep -
        # N // steps whatever the next timestep is: where steps doesn't divide N, at 150 steps, the mean is 7 % off.
        return DPMSolverMultistepScheduler(
            **schedule, solver_order=1, timestep_spacing="trailing", lambda_min_clipped=LEAST_LAMBDA
        )
    if name == "ddpm":
        variance = "learned_range" if learned_variance else "fixed_small"
        return DDPMScheduler(**schedule, clip_sample=False, timestep_spacing="trailing", variance_type=variance)
    if name == "dpm_solver":
        return DPMSolverMultistepScheduler(**schedule, lambda_min_clipped=LEAST_LAMBDA)
    return UniPCMultistepScheduler(**schedule)


def is_flow(scheduler: Any) -> bool:
    """Whether `scheduler` steps along flow matching's straight paths."""
    config = scheduler.config
    return isinstance(scheduler, FLOW_SCHEDULERS) or bool(config.get("use_flow_sigmas", False))


def is_ours(scheduler: Any) -> bool:
    """Whether `make_scheduler` made it, or from_config did from one that it made."""
    return MARK.items() <= dict(scheduler.config).items()


def shifted(scheduler: Any, shift: float) -> Any:
    """Of a scheduler of ours, a fresh one, with another shift where it is one of flow matching; any other as it is."""
    if not is_ours(scheduler):
        return scheduler
    changes = {}
    if is_flow(scheduler):
        changes = {name: shift for name in ("shift", "flow_shift") if name in scheduler.config}
    return type(scheduler).from_config(scheduler.config, **changes)


def set_steps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Readies `scheduler` for `steps` steps; returns the times (steps,) on the model's scale, noisiest first."""
    ours = is_ours(scheduler)
    if ours and isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler):
        # Evenly from 1 to 1/steps, so that every step is of use; the scheduler shifts them.
        scheduler.set_timesteps(sigmas=cast(Any, np.linspace(1.0, 1.0 / steps, steps)), device=cast(Any, device))
    else:
        scheduler.set_timesteps(steps, device=device)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    if ours and is_flow(scheduler):
        return (cast(Tensor, scheduler.sigmas)[:-1] * TIMESTEPS).to(device)
    if ours and isinstance(scheduler, DDPMScheduler | UniPCMultistepScheduler):
        _begin_with_signal(scheduler)
    return cast(Tensor, scheduler.timesteps)


def _begin_with_signal(scheduler: Any) -> None:
    """Moves the first steps of a DDPM scheduler to where log(signal / noise) reaches LEAST_LAMBDA."""
    total = scheduler.alphas_cumprod.double()
    last = int((torch.log(total / (1 - total)) / 2 >= LEAST_LAMBDA).sum()) - 1
    # With hundreds of steps several lie beyond it; the last of them is kept, and moved to it.
    first = max(int((scheduler.timesteps >= last).sum()) - 1, 0)
    scheduler.timesteps = scheduler.timesteps[first:].clone()
    scheduler.timesteps[0].clamp_(max=last)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas[first:].clone()
        scheduler.sigmas[0].clamp_(max=((1 - total[last]) / total[last]).sqrt().item())


class FrameCondition(NamedTuple):
    """Frames that are not drawn: frames (B or 1, T) bool, True where they are; latents (B or 1, C, T, H, W), of which only
    those frames are looked at."""

    frames: Tensor
    latents: Tensor

    def into(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) with the given frames in it."""
        return torch.where(self.frames[:, None, :, None, None], self.latents, x)


def sample(
    model: Model,
    scheduler: Any,
    x: Tensor,
    steps: int,
    cond: Mapping[str, Tensor],
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    *,
    given: FrameCondition | None = None,
    ahead: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Draws from `model`, which predicts what the scheduler's objective does, beginning at noise `x` (B, C, T, H, W).

    generator: for schedulers that add noise; a list holds one per sample. on_step(i, timestep, x_t) is called after
    each step and returns the x_t to go on with. given: frames that stand in x at every step as they are, and so come
    back to the last bit; the model is told of them by `cond`. ahead(times) is called once, before the first step, with
    the times (N,) of all: each t that the model is then given is a view of one of them.
    """
    times = set_steps(scheduler, steps, x.device)
    if ahead is not None:
        ahead(times)
    # 1 and the identity for all that make_scheduler makes; others of diffusers' scale what they are given.
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    noisy = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    uses_variance = "learned" in str(scheduler.config.get("variance_type"))
    for i, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        seen = seen if given is None else given.into(seen)
        prediction = model(seen, times[i].expand(x.shape[0]), cond).to(x.dtype)
        if not uses_variance:
            prediction = prediction[:, : x.shape[1]]
        x = scheduler.step(prediction, timestep, x, **noisy, return_dict=False)[0]
        x = x if given is None else given.into(x)
        if on_step is not None:
            x = on_step(i, timestep, x)
    return x if given is None else given.into(x)
