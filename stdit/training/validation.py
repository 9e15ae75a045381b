"""How a run is doing: the loss on held-out clips, at the same noise and times whenever it is asked, and drawn samples.

Both use the moving average's weights. Every rank takes its share, and the same number
of forward passes as the others, which ZeRO-3 needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from stdit.config import Bucket, Config, latent_shape
from stdit.data.loader import Batch, Stream, collate
from stdit.diffusion.guidance import guided
from stdit.diffusion.objectives import with_scheduler_sign
from stdit.diffusion.schedulers import make_scheduler, sample
from stdit.encoders.video import VideoEncoder, video_encoder_from_identity
from stdit.models.control import Controlled
from stdit.models.sampling import Sampled, micro_conditions
from stdit.models.stdit import STDiT
from stdit.training.checks import Data
from stdit.training.distributed import Ranks
from stdit.training.ema import EMA
from stdit.training.engine import Engine
from stdit.training.inputs import Inputs, condition_of
from stdit.training.tracking import Tracker

# What a rank adds to have as many samples as the others: it is computed and not counted.
FILLER = -1


def shares(count: int, ranks: Ranks, batch_size: int) -> list[list[int]]:
    """This rank's part of 0 … count - 1, in batches; every rank has batches of the same sizes, FILLER where numbers run out."""
    each = ranks.size * batch_size
    batches = []
    for first in range(0, count, each):
        numbers = list(range(first, min(first + each, count)))
        size = -(-len(numbers) // ranks.size)
        numbers += [FILLER] * (size * ranks.size - len(numbers))
        batches.append(numbers[ranks.rank * size : (ranks.rank + 1) * size])
    return batches


def chosen(data: Data, config: Config, buckets: Sequence[Bucket], count: int) -> dict[str, list[int]]:
    """Ids of `count` validation clips by bucket key: one of each bucket in turn, drawn once by the seed."""
    ids = data.source.select(config.data.validation_split, buckets, config.data.where)
    streams = {b.key: Stream(ids[b.key], config.seed, b) for b in buckets if len(ids[b.key])}
    taken: dict[str, list[int]] = {key: [] for key in streams}
    while sum(map(len, taken.values())) < count:
        left = [key for key in streams if len(taken[key]) < len(ids[key])]
        if not left:
            break
        for key in left[: count - sum(map(len, taken.values()))]:
            taken[key].append(streams[key].at(len(taken[key])))
    return taken


class Preview:
    """Validation loss and sample grids of one run."""

    def __init__(self, config: Config, data: Data, inputs: Inputs, ranks: Ranks) -> None:
        self.config, self.data, self.inputs, self.ranks = config, data, inputs, ranks
        self._decoder: VideoEncoder | None = None

    def look(self, engine: Engine, ema: EMA, tracker: Tracker, step: int, last: bool) -> dict[str, float]:
        """What is due at `step`, with the moving average's weights: {"validation_loss": …} or {}, and a picture."""
        validate, draw = self.config.validation.every, self.config.samples.every
        validates, draws = (every is not None and (last or step % every == 0) for every in (validate, draw))
        found: dict[str, float] = {}
        if validates or draws:
            engine.module.eval()
            with ema.swapped(engine.publish):
                if validates:
                    found["validation_loss"] = self.loss(engine.module)
                if draws and (grid := self.grid(engine.module)) is not None:
                    tracker.picture("samples", grid, step)
            engine.module.train()
        return found

    def _batches(self, ids: list[int], bucket: Bucket, batch_size: int) -> list[tuple[Batch, Tensor]]:
        """This rank's batches of `ids`, each with 1 where a sample counts and 0 where it fills (B,)."""
        batches = []
        for share in shares(len(ids), self.ranks, batch_size):
            samples = [self.data.source.sample(ids[max(n, 0)]) for n in share]
            counts = torch.tensor([float(n != FILLER) for n in share], device=self.ranks.device)
            batches.append((collate(samples, [max(n, 0) for n in share], bucket), counts))
        return batches

    @torch.no_grad()
    def loss(self, model: Callable[..., Any]) -> float:
        """Mean loss over `validation.samples` clips at each of `validation.times`."""
        config, objective = self.config, self.inputs.objective
        taken = chosen(self.data, config, config.data.buckets, config.validation.samples)
        total, count = torch.zeros((), device=self.ranks.device), 0.0
        for bucket in config.data.buckets:
            for batch, counts in self._batches(taken.get(bucket.key, []), bucket, bucket.batch_size):
                x0 = self.inputs.latents(batch, None)
                noise = self.inputs.noise(x0, f"validation {bucket.key}", 0, batch.positions)
                condition = condition_of(batch, config.model, self.ranks.device)
                condition |= self.inputs.control(batch, x0, None)
                for time in config.validation.times:
                    t = torch.full((len(batch),), time, device=self.ranks.device)
                    each = objective.loss(
                        lambda x, s, c=condition: model(x, s, **c, return_dict=False)[0], x0, noise, t
                    )
                    total += (each * counts).sum()
                    count += float(counts.sum())
        summed, counted = self.ranks.total(total.item(), count)
        return summed / counted

    @torch.no_grad()
    def grid(self, model: STDiT | Controlled) -> Image.Image | None:
        """Clips drawn for captions or classes of the validation split, as one picture; on rank 0, else None."""
        config, wanted = self.config, self.config.samples
        # Conditions come from clips of any shape: what is drawn has the one that is asked for.
        shape = wanted.bucket or config.data.buckets[0]
        buckets = [b for b in config.data.buckets if not config.train.control or b.key == shape.key]
        conditions = next((b for b in buckets if any(chosen(self.data, config, [b], 1).values())), None)
        if conditions is None:  # of a control branch: it draws clips of a condition's own shape alone
            return None
        latent = latent_shape(shape, tuple(self.data.video_encoder["compression"]))
        ids = chosen(self.data, config, [conditions], wanted.count)[conditions.key]
        captions = [self.data.source.sample(i).caption for i in ids]

        # Told of the clip that is drawn, not of those whose captions it has.
        size = {k: v for k, v in micro_conditions(config.model, shape, 1.0, self.ranks.device).items() if k != "fps"}
        drawn = []
        for batch, _ in self._batches(ids, conditions, conditions.batch_size):
            start = torch.empty(len(batch), config.model.in_channels, *latent)
            x = self.inputs.noise(start, "samples", 0, batch.positions)
            scheduler = make_scheduler(wanted.sampler, config.diffusion, latent, config.model.learned_variance)
            predict = Sampled(model.base, model.control) if isinstance(model, Controlled) else Sampled(model)
            scale = wanted.sampler.guidance_scale if self._conditional else 1.0
            negative = self.inputs.empty(len(batch)) if scale != 1 else {}
            velocity = with_scheduler_sign(predict, config.diffusion)
            steered = guided(velocity, scale, negative or None, channels=wanted.sampler.guidance_channels)
            generators = [torch.Generator().manual_seed(p) for p in batch.positions]
            condition = condition_of(batch, config.model, self.ranks.device)
            if size:
                condition["added_cond_kwargs"] = {**condition["added_cond_kwargs"], **size}
            condition |= self.inputs.control(batch, self.inputs.latents(batch, None), None)
            part = sample(steered, scheduler, x, wanted.sampler.steps, condition, generators, ahead=predict.expect)
            # All ranks' parts of these, in the order of the numbers.
            drawn.append(self.ranks.joined(part).cpu())
        if not self.ranks.first:
            return None
        # Fillers stand at the end of the last batch.
        return draw_grid(self._decode(torch.cat(drawn)[: len(ids)]), captions)

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


def draw_grid(
    pixels: Tensor, captions: Sequence[str], frames: int = 8, least: int = 64, across: int = 1000
) -> Image.Image:
    """Pixels (B, 3, T, H, W) in [-1, 1] as a picture: each clip's frames, at most `frames`, in a row below its caption.

    least: px to which a frame is enlarged. across: px that clips side by side fill.
    """
    count, _, length, height, width = pixels.shape
    shown = np.linspace(0, length - 1, min(frames, length)).round().astype(int)
    by = max(1, -(-least // min(height, width)))
    values = ((pixels[:, :, shown].clamp(-1, 1) + 1) * 127.5).round().byte()
    images = values.permute(0, 2, 3, 4, 1).numpy().repeat(by, 2).repeat(by, 3)  # (B, F, H, W, 3)
    line, gap, letter = 14, 2, 6
    cell = (max(len(shown) * (width * by + gap), 160), height * by + line + gap)
    columns = min(count, max(1, across // cell[0]))
    grid = Image.new("RGB", (columns * cell[0], -(-count // columns) * cell[1]), "white")
    pen = ImageDraw.Draw(grid)
    for clip in range(count):
        left, top = clip % columns * cell[0], clip // columns * cell[1]
        # Pillow's built-in face knows Latin-1.
        caption = captions[clip].encode("latin-1", "replace").decode("latin-1")
        pen.text((left + gap, top), caption[: cell[0] // letter - 1], fill="black")
        for i in range(len(shown)):
            grid.paste(Image.fromarray(images[clip, i]), (left + i * (width * by + gap), top + line))
    return grid
