"""From a batch of features to what the model is given: normalised latents, noise, times and conditions.

All of it is a function of the seed, the step and a sample's place in the data's stream, so that it is the same on one
rank and on eight. B samples · C latent channels · t, h, w latent grid
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stdit.config import Config, GivenFramesConfig, ModelConfig
from stdit.data.loader import Batch
from stdit.diffusion.given import given_frames
from stdit.diffusion.objectives import DDPM, FlowMatching
from stdit.diffusion.randomness import normal, uniform


class Inputs:
    """Makes inputs for one run on one device. video_encoder: the identity of what made the latents."""

    def __init__(
        self, config: Config, video_encoder: dict[str, Any], objective: FlowMatching | DDPM, device: torch.device
    ) -> None:
        self.config, self.objective, self.device = config, objective, device
        self._shift, self._scale = (
            torch.tensor(video_encoder[k], device=device).view(1, -1, 1, 1, 1) for k in ("shift", "scale")
        )

    def latents(self, batch: Batch, step: int | None) -> Tensor:
        """Normalised latents (B, C, t, h, w): drawn anew from the posterior at each step; its mean for step None."""
        z = batch.mean.to(self.device, non_blocking=True)
        if batch.std is not None and step is not None:
            drawn = normal(tuple(z.shape[1:]), self.config.seed, "posterior", step, batch.positions, self.device)
            z = torch.addcmul(z, batch.std.to(self.device, non_blocking=True), drawn)
        return (z - self._shift) * self._scale

    def noise(self, x0: Tensor, purpose: str, step: int, positions: tuple[int, ...]) -> Tensor:
        """Standard normal of x0's shape."""
        return normal(tuple(x0.shape[1:]), self.config.seed, purpose, step, positions, self.device)

    def times(self, x0: Tensor, step: int, positions: tuple[int, ...]) -> Tensor:
        """Training times (B,) in [0, 1]."""
        u = uniform(self.config.seed, "time", step, positions, self.device)
        return self.objective.times(u, (x0.shape[2], x0.shape[3], x0.shape[4]))

    def given(self, x0: Tensor, step: int, positions: tuple[int, ...]) -> Tensor | None:
        """Frames (B, T) that are given, by the config's shares; None where there are none."""
        shares = self.config.diffusion.given_frames
        if x0.shape[2] == 1 or shares == GivenFramesConfig():
            return None
        seed, frames = self.config.seed, (x0.shape[2],)
        which, length = (uniform(seed, f"given {what}", step, positions, self.device) for what in ("pattern", "length"))
        return given_frames(shares, which, length, normal(frames, seed, "given order", step, positions, self.device))

    def dropped(self, condition: dict[str, Tensor], step: int, positions: tuple[int, ...]) -> dict[str, Tensor]:
        """`condition` with some samples' conditions dropped, for classifier-free guidance: the whole of it where a
        caption is dropped, the label alone where a label is."""
        diffusion, seed = self.config.diffusion, self.config.seed
        changed = dict(condition)
        if "class_labels" in condition:
            without = uniform(seed, "label dropout", step, positions, self.device) < diffusion.label_dropout
            changed["class_labels"] = condition["class_labels"].masked_fill(without, -1)
        if "encoder_hidden_states" in condition:
            changed["drop_condition"] = (
                uniform(seed, "caption dropout", step, positions, self.device) < diffusion.caption_dropout
            )
        return changed


def condition_of(batch: Batch, model: ModelConfig, device: torch.device) -> dict[str, Tensor]:
    """The model's own conditions of a batch, by the names of its forward."""
    condition: dict[str, Tensor] = {}
    if model.num_classes is not None:
        condition["class_labels"] = batch.class_labels.to(device, non_blocking=True)
    if model.text_dim is not None:
        assert batch.text is not None
        assert batch.text_mask is not None
        condition["encoder_hidden_states"] = batch.text.to(device, non_blocking=True)
        condition["encoder_attention_mask"] = batch.text_mask.to(device, non_blocking=True)
    for name in model.micro_conditions:
        condition[name] = getattr(batch, name).to(device, non_blocking=True)
    return condition
