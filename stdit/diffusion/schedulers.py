"""diffusers' schedulers, as trained models need them: the one place where our t (0 data, 1 noise) becomes their
timesteps.

Schedulers of `make_scheduler`, and those that diffusers' from_config makes from one, are marked in their config. They
are shifted to the size of the latents, and correct four habits of diffusers:
* FlowMatchEuler applies its shift to its smallest sigma twice and spends its last step on t = 0.001: sigmas are passed
  in.
* DPM-Solver++ and UniPC truncate flow timesteps to integers, two of which may be equal: the model gets the sigmas, and
  steps are counted instead of looked up.
* DPM-Solver++ mistakes channels for noise where variance is learned: `sample` cuts them off.
* DDIM steps over the end where the number of steps doesn't divide the schedule: first-order DPM-Solver++ replaces it.
Any other scheduler, say of a published pipeline, steps exactly as in diffusers' own pipelines.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

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
from stdit.diffusion.timesteps import TIMESTEPS, shift_for

Scheduler = FlowMatchEulerDiscreteScheduler | DDPMScheduler | DPMSolverMultistepScheduler | UniPCMultistepScheduler
# log(signal / noise) at which DDPM sampling begins, diffusers' advice for DPM-Solver++. The linear schedule ends here;
# the cosine schedule goes on to no signal at all, where an error in the predicted noise is 20,000 times as large in x0.
MIN_LAMBDA = -5.1
# In the config of schedulers made here; diffusers passes keys with a leading underscore on without a warning.
MARK = {"_made_by": "stdit"}

# Flow matching only; others say so by use_flow_sigmas.
FLOW_SCHEDULERS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
OBJECTIVES = {
    "flow_euler": ("flow",),
    "ddim": ("ddpm",),
    "ddpm": ("ddpm",),
    "dpm_solver": ("flow", "ddpm"),
    "unipc": ("flow", "ddpm"),
}


def check_sampler(sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
    """ValueError where `sampler` does not fit the objective, or has more steps than the noise schedule."""
    objectives = OBJECTIVES[sampler.scheduler]
    if diffusion.objective not in objectives:
        compatible = ", ".join(name for name, of in OBJECTIVES.items() if diffusion.objective in of)
        raise ValueError(
            f"sampler.scheduler {sampler.scheduler} samples objective {objectives[0]}; the model was trained with "
            f"diffusion.objective {diffusion.objective} (choose one of {compatible})"
        )
    # Multistep solvers divide by 0 where two steps round to one timestep.
    most = diffusion.num_train_timesteps // (2 if sampler.scheduler in ("dpm_solver", "unipc") else 1)
    if diffusion.objective == "ddpm" and sampler.steps > most:
        raise ValueError(
            f"sampler.steps {sampler.steps} is more than the {most} that {sampler.scheduler} supports with "
            f"diffusion.num_train_timesteps {diffusion.num_train_timesteps}"
        )


def compatible_scheduler(sampler: SamplerConfig, diffusion: DiffusionConfig) -> SamplerConfig:
    """`sampler`, its scheduler replaced by the objective's default where it is of another objective."""
    if diffusion.objective in OBJECTIVES[sampler.scheduler]:
        return sampler
    return sampler.model_copy(update={"scheduler": "flow_euler" if diffusion.objective == "flow" else "ddim"})


def make_scheduler(
    sampler: SamplerConfig,
    diffusion: DiffusionConfig,
    latent: tuple[int, int, int],
    learned_variance: bool = False,
) -> Scheduler:
    """The diffusers scheduler for latents (T, H, W) of a model trained with `diffusion`, shifted as in training.

    `ddpm` (ancestral sampling) uses a learned variance; the others are deterministic. ValueError: as check_sampler.
    """
    check_sampler(sampler, diffusion)
    scheduler = _make(sampler.scheduler, diffusion, latent, learned_variance)
    scheduler.register_to_config(**MARK)
    return scheduler


def _make(name: str, diffusion: DiffusionConfig, latent: tuple[int, int, int], learned_variance: bool) -> Scheduler:
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
            **schedule, solver_order=1, timestep_spacing="trailing", lambda_min_clipped=MIN_LAMBDA
        )
    if name == "ddpm":
        variance = "learned_range" if learned_variance else "fixed_small"
        return DDPMScheduler(**schedule, clip_sample=False, timestep_spacing="trailing", variance_type=variance)
    if name == "dpm_solver":
        return DPMSolverMultistepScheduler(**schedule, lambda_min_clipped=MIN_LAMBDA)
    return UniPCMultistepScheduler(**schedule)


def is_flow(scheduler: Any) -> bool:
    """Whether it is a scheduler of flow matching."""
    # from_config passes use_flow_sigmas on to schedulers that ignore it, such as DDIM.
    reads = "use_flow_sigmas" in inspect.signature(type(scheduler).__init__).parameters
    return isinstance(scheduler, FLOW_SCHEDULERS) or (reads and bool(scheduler.config.get("use_flow_sigmas", False)))


def is_ours(scheduler: Any) -> bool:
    """Whether it comes from `make_scheduler`, or by from_config from one that does."""
    return MARK.items() <= dict(scheduler.config).items()


def shifted(scheduler: Any, shift: float) -> Any:
    """A fresh copy of a scheduler of `make_scheduler`, with another shift (flow matching); any other is returned as it
    is."""
    if not is_ours(scheduler):
        return scheduler
    changes = {}
    if is_flow(scheduler):
        changes = {name: shift for name in ("shift", "flow_shift") if name in scheduler.config}
    return type(scheduler).from_config(scheduler.config, **changes)


def set_steps(scheduler: Any, steps: int, device: torch.device | str = "cpu") -> Tensor:
    """Sets `scheduler` up for `steps` steps; returns the model's timesteps (N,), noisiest first."""
    ours = is_ours(scheduler)
    if ours and isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchLCMScheduler):
        # Evenly from 1 to 1/steps, no step wasted near 0; the scheduler shifts them.
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
    """Moves the first steps of a DDPM scheduler to where log(signal / noise) reaches MIN_LAMBDA."""
    total = scheduler.alphas_cumprod.double()
    last = int((torch.log(total / (1 - total)) / 2 >= MIN_LAMBDA).sum()) - 1
    # With hundreds of steps several lie beyond it: the last of them moves to it, the others are dropped.
    first = max(int((scheduler.timesteps >= last).sum()) - 1, 0)
    scheduler.timesteps = scheduler.timesteps[first:].clone()
    scheduler.timesteps[0].clamp_(max=last)
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas[first:].clone()
        scheduler.sigmas[0].clamp_(max=((1 - total[last]) / total[last]).sqrt().item())
