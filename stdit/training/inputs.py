"""Training inputs and loss: normalised latents, noise, timesteps and conditions of a batch, and the loss of a model on
it.

Everything random is a function of the seed, the step and a sample's position in the data stream, so that it is the same
on one rank and on eight. The one exception is the dropout of LoRA layers (`Inputs.seed_dropout`).
B samples · C latent channels · T, H, W latent frames, height, width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stdit.config import Config, FrameConditioningConfig, ModelConfig
from stdit.data.features import EmptyCaption
from stdit.data.loader import Batch, PackedBatch
from stdit.diffusion.frame_conditioning import sample_frame_mask
from stdit.diffusion.objectives import make_objective
from stdit.diffusion.randomness import generators, normal, seed_for, uniform
from stdit.models.packing import PackedClips
from stdit.training.dynamic_loss import flops_loss


class MicroBatchLoss(NamedTuple):
    """total () is to be differentiated; logged (3,), detached: diffusion loss, share of the full model's FLOPs,
    alignment loss; each (B,), detached: every sample's diffusion loss; times (B,): its timestep in [0, 1]. The
    diffusion loss is without min-SNR weights and contrastive term, as in validation."""

    total: Tensor
    logged: Tensor
    each: Tensor
    times: Tensor


class Drawn(NamedTuple):
    """Inputs of a training step for samples of one bucket: latents and noise (B, C, T, H, W), times (B,), conditioning
    frames (B, T) or None, and the arguments of the model's forward."""

    x0: Tensor
    noise: Tensor
    t: Tensor
    frame_mask: Tensor | None
    conditions: dict[str, Any]


class Inputs:
    """Prepares inputs and losses of one run on one device.

    video_encoder: identity of the autoencoder, with the latents' shift and scale. empty_caption: features of "", for a
    model without a null caption of its own (null_text: empty). sequence_rank: among the ranks that share a clip's
    tokens.
    """

    def __init__(
        self,
        config: Config,
        video_encoder: dict[str, Any],
        device: torch.device,
        empty_caption: EmptyCaption | None = None,
        sequence_rank: int = 0,
    ) -> None:
        model = config.model
        self._empty: EmptyCaption | None = None
        if empty_caption is not None and model.text_dim is not None and model.null_text == "empty":
            pooled = empty_caption.pooled if model.pooled_dim is not None else None
            self._empty = EmptyCaption(empty_caption.text.to(device), None if pooled is None else pooled.to(device))
        self.config, self.device, self.sequence_rank = config, device, sequence_rank
        self.objective = make_objective(config.diffusion, model.learned_variance)
        self._shift, self._scale = (
            torch.tensor(video_encoder[k], device=device).view(1, -1, 1, 1, 1) for k in ("shift", "scale")
        )

    def loss(self, model: Callable[..., Any], batch: Batch | PackedBatch, step: int) -> MicroBatchLoss:
        """Mean loss of `model` on a micro-batch: the objective's, plus the compute loss of a dynamic model and the
        alignment's."""
        if isinstance(batch, PackedBatch):
            return self.packed_loss(model, batch, step)
        dynamic, alignment = self.config.train.dynamic, self.config.train.alignment
        x0, noise, t, frame_mask, conditions = self.draw(batch, step)
        if alignment is not None:
            conditions["alignment_target"] = x0 if alignment.target == "latents" else self.vision(batch)
        self.seed_dropout(step, batch.positions)

        outputs: list[Any] = []

        def predict(x: Tensor, s: Tensor) -> Tensor:
            outputs[:] = model(x, s, **conditions, return_dict=False)
            return outputs[0]

        negatives = self.negatives(step, batch.positions)
        trained, each = self.objective.training_loss(predict, x0, noise, t, frame_mask, negatives)
        total, logged = trained.mean(), each.detach().mean()
        flops_ratio, distance = torch.ones_like(logged), torch.zeros_like(logged)
        if dynamic is not None:
            compute, flops_ratio = flops_loss(dynamic, outputs[1], conditions["force_full"], step)
            total = total + compute
        if alignment is not None:
            distance = outputs[-1].mean()
            total = total + alignment.weight * distance
        return MicroBatchLoss(total, torch.stack([logged, flops_ratio, distance.detach()]), each.detach(), t)

    def packed_loss(self, model: Callable[..., Any], batch: PackedBatch, step: int) -> MicroBatchLoss:
        """Mean loss over the samples of a packed sequence, in one call of the model."""
        drawn = [self.draw(part, step) for part in batch.parts]
        self.seed_dropout(step, batch.parts[0].positions)
        noised = [self.objective.model_inputs(d.x0, d.noise, d.t, d.frame_mask) for d in drawn]
        clips = PackedClips([{"hidden_states": x, **d.conditions} for (x, _), d in zip(noised, drawn, strict=True)])
        predictions = model(clips, torch.cat([timestep for _, timestep in noised]))
        losses = [
            self.objective.prediction_loss(y, x, d.x0, d.noise, d.t, d.frame_mask)
            for y, (x, _), d in zip(predictions, noised, drawn, strict=True)
        ]
        trained, each = (torch.cat(values) for values in zip(*losses, strict=True))
        logged = each.detach().mean()
        shares = torch.stack([logged, torch.ones_like(logged), torch.zeros_like(logged)])
        return MicroBatchLoss(trained.mean(), shares, each.detach(), torch.cat([d.t for d in drawn]))

    def draw(self, batch: Batch, step: int) -> Drawn:
        """What is drawn for the samples of one bucket: noise, timesteps, dropped conditions."""
        positions, x0 = batch.positions, self.latents(batch, step)
        frame_mask = self.frame_mask(x0, step, positions)
        conditions = self.drop_conditions(batch_conditions(batch, self.config.model, self.device), step, positions)
        conditions |= self.control(batch, x0, step) | self.router_inputs(step, positions)
        if frame_mask is not None:
            conditions["conditioning_frames"] = frame_mask
        noise, t = self.noise(x0, "noise", step, positions), self.timesteps(x0, step, positions)
        return Drawn(x0, noise, t, frame_mask, conditions)

    def latents(self, batch: Batch, step: int | None) -> Tensor:
        """Normalised latents (B, C, T, H, W), sampled from the posterior at each step; its mean for step None."""
        z = batch.mean.to(self.device, non_blocking=True)
        if batch.std is not None and step is not None:
            noise = normal(tuple(z.shape[1:]), self.config.seed, "posterior", step, batch.positions, self.device)
            z = torch.addcmul(z, batch.std.to(self.device, non_blocking=True), noise)
        return (z - self._shift) * self._scale

    def control(self, batch: Batch, x0: Tensor, step: int | None) -> dict[str, Tensor]:
        """{"control": (B, C, T or 1, H, W)}, normalised, for a control branch; {} without one. A share of the samples
        has zeros (train.control.dropout), none at step None."""
        settings = self.config.train.control
        if settings is None:
            return {}
        if settings.condition == "first_frame":
            condition = x0[:, :, :1]
        elif settings.condition == "low_resolution":
            condition = low_resolution(x0, settings.factor)
        else:
            assert batch.control is not None
            condition = (batch.control.to(self.device, non_blocking=True) - self._shift) * self._scale
        if step is not None and settings.dropout:
            dropped = (
                uniform(self.config.seed, "control dropout", step, batch.positions, self.device) < settings.dropout
            )
            condition = condition.masked_fill(dropped.view(-1, 1, 1, 1, 1), 0)
        return {"control": condition}

    def vision(self, batch: Batch) -> Tensor:
        """Features of the vision encoder (B, D, t, h', w')."""
        assert batch.vision is not None
        return batch.vision.to(self.device, non_blocking=True)

    def seed_dropout(self, step: int, positions: tuple[int, ...]) -> None:
        """Seeds torch's global generator, from which peft's LoRA layers draw dropout for a micro-batch as a whole. The
        same step with the same ranks draws the same, so a resume does; other micro-batches draw differently, as do the
        ranks that share a clip's tokens."""
        lora = self.config.train.lora
        if lora is not None and lora.dropout:
            shard = (self.sequence_rank,) if self.sequence_rank else ()
            torch.manual_seed(seed_for(self.config.seed, "layers", step, positions[0], *shard))

    def router_inputs(self, step: int, positions: tuple[int, ...]) -> dict[str, Any]:
        """Per-sample generators for drop path, routers and token routing, and `force_full` (B,) bool: samples that run
        the full model, as arguments of the model's forward; {} if it draws nothing."""
        model, dynamic, seed = self.config.model, self.config.train.dynamic, self.config.seed
        arguments: dict[str, Any] = {}
        if model.drop_path or model.dynamic or self.config.train.token_routing:
            arguments["generator"] = generators(seed, "choices", step, positions)
        routing = self.config.train.token_routing
        if routing is not None and routing.dense_finish:
            arguments["dense"] = step > round((1 - routing.dense_finish) * self.config.train.steps)
        if dynamic is not None:
            full = uniform(seed, "complete", step, positions, self.device) < dynamic.full_model_prob
            arguments["force_full"] = full
        return arguments

    def noise(self, x0: Tensor, purpose: str, step: int, positions: tuple[int, ...]) -> Tensor:
        """Standard normal of x0's shape."""
        return normal(tuple(x0.shape[1:]), self.config.seed, purpose, step, positions, self.device)

    def timesteps(self, x0: Tensor, step: int, positions: tuple[int, ...]) -> Tensor:
        """Training timesteps (B,) in [0, 1]."""
        u = uniform(self.config.seed, "time", step, positions, self.device)
        return self.objective.times(u, (x0.shape[2], x0.shape[3], x0.shape[4]))

    def negatives(self, step: int, positions: tuple[int, ...]) -> Tensor | None:
        """For each of B samples the index of another one of the micro-batch, (B,), all equally likely; None without
        contrastive flow matching."""
        if not self.config.diffusion.contrastive_weight:
            return None
        others = len(positions) - 1
        further = (uniform(self.config.seed, "negative", step, positions) * others).long().clamp(max=others - 1)
        return ((torch.arange(others + 1) + 1 + further) % (others + 1)).to(self.device)

    def frame_mask(self, x0: Tensor, step: int, positions: tuple[int, ...]) -> Tensor | None:
        """Conditioning frames (B, T) bool, in whole temporal patches, by the shares of diffusion.frame_conditioning;
        None if there are none."""
        shares, patch = self.config.diffusion.frame_conditioning, self.config.model.patch_size[0]
        patches = -(-x0.shape[2] // patch)
        if patches == 1 or shares == FrameConditioningConfig():
            return None
        seed = self.config.seed
        pattern, length = (
            uniform(seed, f"given {name}", step, positions, self.device) for name in ("pattern", "length")
        )
        order = normal((patches,), seed, "given order", step, positions, self.device)
        mask = sample_frame_mask(shares, pattern, length, order)
        return None if mask is None else mask.repeat_interleave(patch, 1)[:, : x0.shape[2]]

    def drop_conditions(self, conditions: dict[str, Any], step: int, positions: tuple[int, ...]) -> dict[str, Any]:
        """Drops conditions of some samples, for classifier-free guidance: labels alone by label_dropout, caption and
        label by caption_dropout. Without a null caption in the model, the empty caption's features replace them."""
        diffusion, seed = self.config.diffusion, self.config.seed
        changed = dict(conditions)
        if "class_labels" in conditions:
            dropped = uniform(seed, "label dropout", step, positions, self.device) < diffusion.label_dropout
            changed["class_labels"] = conditions["class_labels"].masked_fill(dropped, -1)
        if "encoder_hidden_states" in conditions or "pooled_projections" in conditions:
            # On the host, where `any` waits for no device.
            dropped = uniform(seed, "caption dropout", step, positions) < diffusion.caption_dropout
            if self.config.model.null_text != "empty" or "encoder_hidden_states" not in conditions:
                changed["drop_condition"] = dropped.to(self.device)
            elif dropped.any():
                changed |= _replace(changed, self.empty(len(positions)), dropped.to(self.device))
        return changed

    def empty(self, count: int) -> dict[str, Tensor]:
        """Unconditional arguments of the forward for `count` samples, for a model without a null caption of its own
        (null_text: empty); {} if it has one or takes no text."""
        model = self.config.model
        if model.text_dim is None or model.null_text != "empty":
            return {}
        assert self._empty is not None  # checked by stdit.training.data
        text = self._empty.text.expand(count, -1, -1)
        mask = torch.ones(text.shape[:2], dtype=torch.bool, device=self.device)
        conditions = {"encoder_hidden_states": text, "encoder_attention_mask": mask}
        if self._empty.pooled is not None:
            conditions["pooled_projections"] = self._empty.pooled.expand(count, -1)
        if model.num_classes is not None:
            conditions["class_labels"] = torch.full((count,), -1, device=self.device)
        return conditions


def _replace(conditions: dict[str, Any], empty: dict[str, Tensor], where: Tensor) -> dict[str, Tensor]:
    """Rows of `conditions` replaced by those of `empty` where `where` (B,) is True; the shorter text is padded."""
    changed = {}
    for name, null in empty.items():
        value = conditions[name]
        if name in ("encoder_hidden_states", "encoder_attention_mask"):
            longest = max(value.shape[1], null.shape[1])
            value, null = (F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1])) for x in (value, null))
        changed[name] = torch.where(where.view(-1, *(1,) * (value.ndim - 1)), null, value)
    return changed


def low_resolution(x: Tensor, factor: int) -> Tensor:
    """Averages (B, C, T, H, W) over squares of `factor` latents a side; the shape stays."""
    small = F.avg_pool3d(x, (1, factor, factor))
    return small.repeat_interleave(factor, 3).repeat_interleave(factor, 4)


def micro_names(model: ModelConfig) -> list[str]:
    """Micro-conditions of a clip that the model takes, by the names of its forward."""
    size = ["height", "width"] if "size" in model.micro_conditions or model.position_reference is not None else []
    return list(dict.fromkeys([*(name for name in model.micro_conditions if name != "size"), *size]))


def batch_conditions(batch: Batch, model: ModelConfig, device: torch.device) -> dict[str, Any]:
    """Conditions of a batch that the model takes, by the names of its forward."""
    conditions: dict[str, Any] = {}
    if model.num_classes is not None:
        conditions["class_labels"] = batch.class_labels.to(device, non_blocking=True)
    if model.text_dim is not None:
        assert batch.text is not None
        assert batch.text_mask is not None
        # Truncated to the longest caption here, on the host, which waits for no device.
        longest = max(1, int(batch.text_mask.sum(1).max()))
        conditions["encoder_hidden_states"] = batch.text[:, :longest].to(device, non_blocking=True)
        conditions["encoder_attention_mask"] = batch.text_mask[:, :longest].to(device, non_blocking=True)
    if model.pooled_dim is not None:
        assert batch.pooled is not None
        conditions["pooled_projections"] = batch.pooled.to(device, non_blocking=True)
    added = {name: getattr(batch, name).to(device, non_blocking=True) for name in micro_names(model)}
    if model.position_reference is not None:
        # Positions use the bucket's size; on the host, where the model computes coordinates.
        added |= {k: torch.tensor([float(getattr(batch.bucket, k))]) for k in ("height", "width")}
    return conditions | ({"added_cond_kwargs": added} if added else {})
