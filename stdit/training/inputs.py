"""From a batch of features to what the model is given: normalised latents, noise, times and conditions.

All of it is a function of the seed, the step and a sample's place in the data's stream, so that it is the same on one
rank and on eight. The one exception is the dropout of LoRA adapters (`Inputs.seed_layers`). B samples · C latent channels · t, h, w latent grid
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.config import Config, FrameConditioningConfig, ModelConfig
from stdit.data.features import EmptyCaption
from stdit.data.loader import Batch
from stdit.diffusion.frame_conditioning import sample_frame_mask
from stdit.diffusion.objectives import DDPM, FlowMatching
from stdit.diffusion.randomness import generators, normal, seed_for, uniform


class Inputs:
    """Makes inputs for one run on one device. video_encoder: the identity of what made the latents. empty_caption: what
    stands for no caption, where the model has nothing of its own (null_text: empty)."""

    def __init__(
        self,
        config: Config,
        video_encoder: dict[str, Any],
        objective: FlowMatching | DDPM,
        device: torch.device,
        empty_caption: EmptyCaption | None = None,
    ) -> None:
        model = config.model
        self._empty: EmptyCaption | None = None
        if empty_caption is not None and model.text_dim is not None and model.null_text == "empty":
            pooled = empty_caption.pooled if model.pooled_dim is not None else None
            self._empty = EmptyCaption(empty_caption.text.to(device), None if pooled is None else pooled.to(device))
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

    def control(self, batch: Batch, x0: Tensor, step: int | None) -> dict[str, Tensor]:
        """What a control branch is told, {"control": (B, C, t or 1, h, w)}, normalised; {} where none is trained. Some
        samples are told zeros, by the config's share; for step None no one is."""
        wanted = self.config.train.control
        if wanted is None:
            return {}
        if wanted.condition == "first_frame":
            told = x0[:, :, :1]
        elif wanted.condition == "low_resolution":
            told = low_resolution(x0, wanted.factor)
        else:
            assert batch.control is not None
            told = (batch.control.to(self.device, non_blocking=True) - self._shift) * self._scale
        if step is not None and wanted.dropout:
            without = uniform(self.config.seed, "control dropout", step, batch.positions, self.device) < wanted.dropout
            told = told.masked_fill(without.view(-1, 1, 1, 1, 1), 0)
        return {"control": told}

    def seed_layers(self, step: int, positions: tuple[int, ...]) -> None:
        """Seeds what layers draw by themselves, from torch's own random state: dropout of adapters, which peft's layers draw
        for a micro-batch as a whole. It is the same at the same step with the same ranks, and so after a resume; with other
        micro-batches (other ranks, batch sizes or accumulation) it is another draw."""
        lora = self.config.train.lora
        if lora is not None and lora.dropout:
            torch.manual_seed(seed_for(self.config.seed, "layers", step, positions[0]))

    def choices(self, step: int, positions: tuple[int, ...]) -> dict[str, Any]:
        """What the model draws by, by the names of its forward: each sample's generator, for the drop path and routers;
        and `force_full` (B,), samples for which everything runs. {}: it draws nothing."""
        model, wanted, seed = self.config.model, self.config.train.dynamic, self.config.seed
        told: dict[str, Any] = {}
        if model.drop_path or model.dynamic:
            told["generator"] = generators(seed, "choices", step, positions)
        if wanted is not None:
            told["force_full"] = uniform(seed, "complete", step, positions, self.device) < wanted.full_model_prob
        return told

    def noise(self, x0: Tensor, purpose: str, step: int, positions: tuple[int, ...]) -> Tensor:
        """Standard normal of x0's shape."""
        return normal(tuple(x0.shape[1:]), self.config.seed, purpose, step, positions, self.device)

    def times(self, x0: Tensor, step: int, positions: tuple[int, ...]) -> Tensor:
        """Training times (B,) in [0, 1]."""
        u = uniform(self.config.seed, "time", step, positions, self.device)
        return self.objective.times(u, (x0.shape[2], x0.shape[3], x0.shape[4]))

    def given(self, x0: Tensor, step: int, positions: tuple[int, ...]) -> Tensor | None:
        """Frames (B, T) that are given, by the config's shares, whole patches of them (the model tells time 0 to those
        alone); None where there are none."""
        shares, patch = self.config.diffusion.frame_conditioning, self.config.model.patch_size[0]
        patches = x0.shape[2] // patch
        if patches == 1 or shares == FrameConditioningConfig():
            return None
        seed = self.config.seed
        which, length = (uniform(seed, f"given {what}", step, positions, self.device) for what in ("pattern", "length"))
        order = normal((patches,), seed, "given order", step, positions, self.device)
        mask = sample_frame_mask(shares, which, length, order)
        return None if mask is None else mask.repeat_interleave(patch, 1)

    def dropped(self, condition: dict[str, Any], step: int, positions: tuple[int, ...]) -> dict[str, Any]:
        """`condition` with some samples' conditions dropped, for classifier-free guidance: the whole of it where a
        caption is dropped, the label alone where a label is. A model without a null caption of its own is given the
        empty caption's features in the place of those that are dropped."""
        diffusion, seed = self.config.diffusion, self.config.seed
        changed = dict(condition)
        if "class_labels" in condition:
            without = uniform(seed, "label dropout", step, positions, self.device) < diffusion.label_dropout
            changed["class_labels"] = condition["class_labels"].masked_fill(without, -1)
        if "encoder_hidden_states" in condition or "pooled_projections" in condition:
            # Drawn on the host, which so knows of it without waiting for the device.
            without = uniform(seed, "caption dropout", step, positions) < diffusion.caption_dropout
            if self.config.model.null_text != "empty" or "encoder_hidden_states" not in condition:
                changed["drop_condition"] = without.to(self.device)
            elif without.any():
                changed |= _replaced(changed, self.empty(len(positions)), without.to(self.device))
        return changed

    def empty(self, count: int) -> dict[str, Tensor]:
        """The condition of `count` samples that are told nothing, for a model without a null caption of its own
        (null_text: empty): what guidance moves away from. {}: the model has one, or takes no text."""
        model = self.config.model
        if model.text_dim is None or model.null_text != "empty":
            return {}
        assert self._empty is not None  # stdit.training.checks has looked
        text = self._empty.text.expand(count, -1, -1)
        seen = torch.ones(text.shape[:2], dtype=torch.bool, device=self.device)
        told = {"encoder_hidden_states": text, "encoder_attention_mask": seen}
        if self._empty.pooled is not None:
            told["pooled_projections"] = self._empty.pooled.expand(count, -1)
        if model.num_classes is not None:
            told["class_labels"] = torch.full((count,), -1, device=self.device)
        return told


def _replaced(condition: dict[str, Any], empty: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """What `condition` has in common with `empty`, with empty's rows `where` (B,) is True; the shorter text is padded."""
    changed = {}
    for name, none in empty.items():
        told = condition[name]
        if name in ("encoder_hidden_states", "encoder_attention_mask"):
            longest = max(told.shape[1], none.shape[1])
            told, none = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in (told, none))
        changed[name] = torch.where(where.view(-1, *(1,) * (told.ndim - 1)), none, told)
    return changed


def low_resolution(x: Tensor, factor: int) -> Tensor:
    """(B, C, T, H, W) averaged over squares of `factor` latents a side, each in all its places."""
    small = F.avg_pool3d(x, (1, factor, factor))
    return small.repeat_interleave(factor, 3).repeat_interleave(factor, 4)


def micro_names(model: ModelConfig) -> list[str]:
    """What of a clip the model is told, by the names of its forward."""
    size = ["height", "width"] if "size" in model.micro_conditions or model.position_reference is not None else []
    return list(dict.fromkeys([*(name for name in model.micro_conditions if name != "size"), *size]))


def condition_of(batch: Batch, model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """The model's own conditions of a batch, by the names of its forward."""
    condition: dict[str, Any] = {}
    if model.num_classes is not None:
        condition["class_labels"] = batch.class_labels.to(device, non_blocking=True)
    if model.text_dim is not None:
        assert batch.text is not None
        assert batch.text_mask is not None
        # Cut here, on the host, which knows how long the longest prompt is without waiting for the device.
        longest = max(1, int(batch.text_mask.sum(1).max()))
        condition["encoder_hidden_states"] = batch.text[:, :longest].to(device, non_blocking=True)
        condition["encoder_attention_mask"] = batch.text_mask[:, :longest].to(device, non_blocking=True)
    if model.pooled_dim is not None:
        assert batch.pooled is not None
        condition["pooled_projections"] = batch.pooled.to(device, non_blocking=True)
    added = {name: getattr(batch, name).to(device, non_blocking=True) for name in micro_names(model)}
    if model.position_reference is not None:
        # Coordinates are of the clip as it is cut, one size for all; on the host, where the model computes with them.
        added |= {k: torch.tensor([float(getattr(batch.bucket, k))]) for k in ("height", "width")}
    return condition | ({"added_cond_kwargs": added} if added else {})
