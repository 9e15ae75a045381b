"""The sampling loop: a denoiser, a diffusers scheduler and noise come together here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stdit.diffusion.denoiser import Conditions, Denoiser
from stdit.diffusion.frame_conditioning import FrameCondition
from stdit.diffusion.schedulers import set_steps


def sample(
    model: Denoiser,
    scheduler: Any,
    x: Tensor,
    steps: int,
    cond: Conditions,
    generator: torch.Generator | list[torch.Generator] | None = None,
    on_step: Callable[[int, Tensor, Tensor], Tensor] | None = None,
    frame_condition: FrameCondition | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Denoises x (B, C, T, H, W), noise of unit variance, in `steps` steps of a diffusers scheduler.

    Args:
        model: predicts what the scheduler expects (see stdit.diffusion.objectives.with_scheduler_sign); it is bound to
            `cond` and all timesteps once.
        generator: of schedulers that add noise; one, or one per sample.
        on_step: called as (step, timestep, x_t) after each step; returns the x_t to go on with.
        frame_condition: conditioning frames, inserted into x_t at every step and returned bit for bit; the model
            reads which they are from `cond`.
        interrupted: asked before each step; True ends the loop with x_t as it is.
    """
    times = set_steps(scheduler, steps, x.device)
    step_model = model.bind(cond, times)
    insert = frame_condition.apply if frame_condition is not None else lambda x: x
    # 1 and the identity for the schedulers of make_scheduler; others of diffusers scale their input.
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    scale_input = getattr(scheduler, "scale_model_input", lambda x, timestep: x)
    noise = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    uses_variance = "learned" in str(scheduler.config.get("variance_type"))
    for i, timestep in enumerate(scheduler.timesteps):
        if interrupted():
            break
        prediction = step_model(insert(scale_input(x, timestep)), i).to(x.dtype)
        if not uses_variance:
            prediction = prediction[:, : x.shape[1]]
        x = insert(scheduler.step(prediction, timestep, x, **noise, return_dict=False)[0])
        if on_step is not None:
            x = on_step(i, timestep, x)
    return insert(x)
