"""Validation loss on held-out clips, with the same noise and timesteps each time, and sample grids; with EMA weights.

Every rank computes its share in the same number of forward passes, as ZeRO-3 requires.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stdit.config import Bucket, Config, latent_shape
from stdit.data.loader import Batch, collate
from stdit.data.order import Stream
from stdit.diffusion.guidance import guided
from stdit.diffusion.objectives import Predict, with_scheduler_sign
from stdit.diffusion.sample import sample
from stdit.diffusion.schedulers import make_scheduler
from stdit.encoders.video import VideoEncoder, video_encoder_from_identity
from stdit.media import Cell, contact_sheet
from stdit.models.alignment import Aligned
from stdit.models.control import Controlled
from stdit.models.sampling import CachedConditions, micro_conditions
from stdit.models.stdit import STDiT
from stdit.training.data import TrainData
from stdit.training.distributed import Ranks
from stdit.training.ema import EMA
from stdit.training.engine import Engine
from stdit.training.inputs import Inputs, batch_conditions
from stdit.training.tracking import Tracker, is_due

# Pads a rank's share to the size of the others'; computed and not counted.
PADDING = -1
# Relative difference of a loss through the model's forward and through the sampler's.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}


def shard_batches(count: int, ranks: Ranks, batch_size: int) -> list[list[int]]:
    """This rank's share of 0 … count - 1, in batches of the same sizes on every rank, padded with PADDING."""
    each = ranks.data_size * batch_size
    batches = []
    for first in range(0, count, each):
        numbers = list(range(first, min(first + each, count)))
        size = -(-len(numbers) // ranks.data_size)
        numbers += [PADDING] * (size * ranks.data_size - len(numbers))
        batches.append(numbers[ranks.data_rank * size : (ranks.data_rank + 1) * size])
    return batches


def select_clips(data: TrainData, config: Config, buckets: Sequence[Bucket], count: int) -> dict[str, list[int]]:
    """Ids of `count` validation clips by bucket key, one of each bucket in turn, in an order fixed by the seed."""
    ids = data.source.select(config.data.validation_split, buckets, config.data.where)
    streams = {b.key: Stream(ids[b.key], config.seed, b) for b in buckets if len(ids[b.key])}
    selected: dict[str, list[int]] = {key: [] for key in streams}
    while sum(map(len, selected.values())) < count:
        left = [key for key in streams if len(selected[key]) < len(ids[key])]
        if not left:
            break
        for key in left[: count - sum(map(len, selected.values()))]:
            selected[key].append(streams[key].at(len(selected[key])))
    return selected


def _forward(model: Callable[..., Any], condition: Mapping[str, Any]) -> Predict:
    """The model's own forward under `condition`."""
    return lambda x, t: model(x, t, **condition, return_dict=False)[0]


def _sampler_forward(model: STDiT | Controlled | Aligned, condition: Mapping[str, Any]) -> Predict:
    """The same through what sampling calls, bound to its conditions; all samples have one timestep."""
    return lambda x, t: _as_sampled(model).bind(condition, t[:1])(x, 0)


def _as_sampled(model: STDiT | Controlled | Aligned) -> CachedConditions:
    if isinstance(model, Controlled):
        return CachedConditions(model.base, model.control)
    return CachedConditions(model.base if isinstance(model, Aligned) else model)


class Validator:
    """Computes validation loss and sample grids of one run."""

    def __init__(self, config: Config, data: TrainData, inputs: Inputs, ranks: Ranks) -> None:
        self.config, self.data, self.inputs, self.ranks = config, data, inputs, ranks
        self._batch_sizes = {key: each.size for key, each in config.micro_batches(ranks.size).items()}
        self._decoder: VideoEncoder | None = None
        self._remarked = False

    def run(self, engine: Engine, ema: EMA, tracker: Tracker, step: int) -> dict[str, float]:
        """Validation losses, if they are due at `step`, and `inference_gap` at checkpoints; a sample grid, if it is
        due, goes to the tracker."""
        config, steps = self.config, self.config.train.steps
        validates, samples = (is_due(section.every, step, steps) for section in (config.validation, config.samples))
        compares = config.validation.inference_check and is_due(config.train.checkpoint_every, step, steps)
        metrics: dict[str, float] = {}
        if validates or samples or compares:
            engine.module.eval()
            if compares and (losses := self.losses_of_both_paths(engine.module)) is not None:
                metrics["inference_gap"] = gap = abs(losses[1] - losses[0]) / max(abs(losses[0]), 1e-12)
                if not gap <= TOLERANCE[config.train.precision]:
                    tracker.print(
                        f"step {step}: training and inference disagree: the loss of a fixed batch is {losses[0]:.6g} through the "
                        f"model's forward and {losses[1]:.6g} through the sampler's ({gap:.2g} apart; {config.train.precision} "
                        f"allows {TOLERANCE[config.train.precision]:g})"
                    )
            if validates and config.validation.raw:
                metrics |= {f"raw_{key}": loss for key, loss in self.loss(engine.module).items()}
            with ema.swapped(engine.sync_from_masters):
                if validates:
                    metrics |= self.loss(engine.module)
                if samples and (grid := self.sample_grid(engine.module)) is not None:
                    tracker.image("samples", grid, step)
                    self._remark_count(tracker)
            engine.module.train()
        return metrics

    def _remark_count(self, tracker: Tracker) -> None:
        """Says once if the grid has fewer samples than the config asks for."""
        asked, buckets = self.config.samples.count, self.config.data.buckets
        drawn = sum(map(len, select_clips(self.data, self.config, buckets, asked).values()))
        if drawn < asked and not self._remarked:
            tracker.print(
                f"samples.count {asked}: {drawn} are drawn, one for each clip of split {self.config.data.validation_split!r}"
            )
        self._remarked = True

    def _batches(self, ids: list[int], bucket: Bucket, batch_size: int, first: int = 0) -> list[tuple[Batch, Tensor]]:
        """This rank's batches of `ids`, each with weights (B,): 1 for samples, 0 for padding. first: position of the
        first sample, which decides its noise."""
        batches = []
        for share in shard_batches(len(ids), self.ranks, batch_size):
            samples = [self.data.source.sample(ids[max(n, 0)]) for n in share]
            counts = torch.tensor([float(n != PADDING) for n in share], device=self.ranks.device)
            batches.append((collate(samples, [first + max(n, 0) for n in share], bucket), counts))
        return batches

    @torch.no_grad()
    def loss(self, model: Callable[..., Any]) -> dict[str, float]:
        """`validation_loss`: the mean over `validation.samples` clips at each of `validation.times`;
        `validation_loss/t=0.3` and `validation_loss/4x16x16`: the mean at each time, and of each bucket."""
        config, objective = self.config, self.inputs.objective
        selected = select_clips(self.data, config, config.data.buckets, config.validation.samples)
        buckets = [bucket for bucket in config.data.buckets if selected.get(bucket.key)]
        times = config.validation.times
        sums = torch.zeros(len(buckets), len(times), device=self.ranks.device)
        counted = [0.0] * len(buckets)
        for i, bucket in enumerate(buckets):
            for batch, counts in self._batches(selected[bucket.key], bucket, self._batch_sizes[bucket.key]):
                x0, noise, condition = self._fixed(batch, bucket)
                predict = _forward(model, condition)
                for k, time in enumerate(times):
                    each = objective.loss(predict, x0, noise, torch.full((len(batch),), time, device=self.ranks.device))
                    sums[i, k] += (each * counts).sum()
                counted[i] += float(counts.sum())
        flat = self.ranks.all_reduce(*sums.flatten().tolist(), *counted)
        total, clips = torch.tensor(flat[: sums.numel()]).view_as(sums.cpu()), torch.tensor(flat[sums.numel() :])
        by_time, by_bucket = total.sum(0) / clips.sum(), total.sum(1) / clips / len(times)
        return {
            "validation_loss": float(total.sum() / clips.sum() / len(times)),
            **{f"validation_loss/t={time:g}": float(loss) for time, loss in zip(times, by_time, strict=True)},
            **{f"validation_loss/{b.key}": float(loss) for b, loss in zip(buckets, by_bucket, strict=True)},
        }

    def _fixed(self, batch: Batch, bucket: Bucket) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Latents, noise and conditions of a batch, the same at every step."""
        x0 = self.inputs.latents(batch, None)
        noise = self.inputs.noise(x0, f"validation {bucket.key}", 0, batch.positions)
        condition = batch_conditions(batch, self.config.model, self.ranks.device)
        return x0, noise, condition | self.inputs.control(batch, x0, None)

    @torch.no_grad()
    def losses_of_both_paths(self, model: Any) -> tuple[float, float] | None:
        """Mean loss of a fixed batch through the model's forward, as in training, and through CachedConditions, as in
        sampling.

        The batch: the first validation clips of the first bucket that has any. None: there are none.
        """
        config, objective = self.config, self.inputs.objective
        found = (
            (b, ids)
            for b in config.data.buckets
            for ids in select_clips(self.data, config, [b], self._batch_sizes[b.key]).values()
        )
        bucket, ids = next(found, (None, []))
        if bucket is None:
            return None
        batch, counts = self._batches(ids, bucket, self._batch_sizes[bucket.key])[0]
        x0, noise, condition = self._fixed(batch, bucket)
        losses = []
        for predict in (_forward(model, condition), _sampler_forward(model, condition)):
            total = torch.zeros((), device=self.ranks.device)
            for time in config.validation.times:
                each = objective.loss(predict, x0, noise, torch.full((len(batch),), time, device=self.ranks.device))
                total += (each * counts).sum()
            summed, count = self.ranks.all_reduce(total.item(), float(counts.sum()))
            losses.append(summed / count / len(config.validation.times))
        return losses[0], losses[1]

    @torch.no_grad()
    def sample_grid(self, model: STDiT | Controlled | Aligned) -> Image.Image | None:
        """Samples for captions or classes of the validation split, as one image; None on ranks other than 0."""
        config, settings = self.config, self.config.samples
        # Captions come from clips of any shape; only a control branch needs clips of the samples' own shape.
        shape = settings.bucket or config.data.buckets[0]
        buckets = [b for b in config.data.buckets if not config.train.control or b.key == shape.key]
        selected = select_clips(self.data, config, buckets, settings.count)
        captions = [self.data.source.sample(i).caption for ids in selected.values() for i in ids]
        if not captions:
            return None
        latent = latent_shape(shape, tuple(self.data.video_encoder["compression"]))

        # Micro-conditions of the sampled clip, not of those whose captions it has.
        size = {k: v for k, v in micro_conditions(config.model, shape, 1.0, self.ranks.device).items() if k != "fps"}
        latents = []
        for bucket in (b for b in buckets if selected.get(b.key)):
            ids, drawn = selected[bucket.key], []
            first = sum(map(len, latents))  # each sample has noise of its own
            for batch, _ in self._batches(ids, bucket, self._batch_sizes[bucket.key], first):
                start = torch.empty(len(batch), config.model.in_channels, *latent)
                x = self.inputs.noise(start, "samples", 0, batch.positions)
                scheduler = make_scheduler(settings.sampler, config.diffusion, latent, config.model.learned_variance)
                predict = _as_sampled(model)
                scale = settings.sampler.guidance_scale if self._conditional else 1.0
                negative = self.inputs.empty(len(batch)) if scale != 1 else {}
                velocity = with_scheduler_sign(predict, config.diffusion)
                sampler = settings.sampler
                steered = guided(velocity, scale, negative or None, sampler.guidance_channels, sampler.path_drop)
                generators = [torch.Generator().manual_seed(p) for p in batch.positions]
                condition = batch_conditions(batch, config.model, self.ranks.device)
                if size:
                    condition["added_cond_kwargs"] = {**condition["added_cond_kwargs"], **size}
                condition |= self.inputs.control(batch, self.inputs.latents(batch, None), None)
                part = sample(steered, scheduler, x, settings.sampler.steps, condition, generators)
                drawn.append(self.ranks.all_gather(part).cpu())  # in order of their numbers
            latents.append(torch.cat(drawn)[: len(ids)])  # padding is at the end
        if not self.ranks.is_main:
            return None
        pixels = self._decode(torch.cat(latents))
        clips = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 4, 1).numpy()
        return contact_sheet([Cell(*cell) for cell in zip(clips, captions, strict=True)], strip=8)

    @property
    def _conditional(self) -> bool:
        model = self.config.model
        return any(value is not None for value in (model.num_classes, model.text_dim, model.pooled_dim))

    def _decode(self, latents: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1]."""
        if self.data.video_encoder["kind"] == "synthetic":
            return latents[:, :1].expand(-1, 3, -1, -1, -1) if latents.shape[1] < 3 else latents[:, :3]
        if self._decoder is None:
            self._decoder = video_encoder_from_identity(self.data.video_encoder, self.ranks.device)
        return torch.cat([self._decoder.decode(one[None]).cpu() for one in latents])
