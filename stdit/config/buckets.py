"""Buckets: clip shapes, the samples of a step of each, and their latents and tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

from pydantic import Field, model_validator

from stdit.config.base import Fps, Frames, Frozen, Positive, Share, Width
from stdit.config.load import ConfigError


class Bucket(Frozen):
    """A clip shape in pixels. A batch holds clips of one bucket, a packed one (`train.packing`) of several."""

    frames: Frames
    """Frames of a clip; 1 for images."""
    height: Width
    """Height in pixels."""
    width: Width
    """Width in pixels."""

    @property
    def key(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @staticmethod
    def parse(key: str) -> Bucket:
        """The bucket of a key, FRAMESxHEIGHTxWIDTH. ValueError: another form."""
        if not re.fullmatch(r"[1-9]\d{0,6}x[1-9]\d{0,6}x[1-9]\d{0,6}", key, re.ASCII):
            raise ValueError(f"bucket {key!r}: expected FRAMESxHEIGHTxWIDTH, such as 16x256x256")
        frames, height, width = map(int, key.split("x"))
        return Bucket(frames=frames, height=height, width=width)


class ExtractBucket(Bucket):
    """A bucket that extraction crops and resizes clips to."""

    keep_probability: Share = 1.0
    """Share of the clips fitting this bucket that it keeps; the others go to the next bucket that they fit."""
    min_fps: Fps | None = None
    """Lowest frame rate of videos that go here, after `frame_stride` or `target_fps`. null: any."""
    max_fps: Fps | None = None
    """Highest frame rate of videos that go here. null: any."""

    @model_validator(mode="after")
    def _check_rates(self) -> ExtractBucket:
        if self.min_fps is not None and self.max_fps is not None and self.min_fps > self.max_fps:
            raise ValueError(f"min_fps {self.min_fps:g} is above max_fps {self.max_fps:g}")
        return self

    def takes_rate(self, fps: float) -> bool:
        """Whether videos of this frame rate may go here (to within a rounding: 29.97 passes for 30)."""
        return (self.min_fps is None or fps >= 0.99 * self.min_fps) and (
            self.max_fps is None or fps <= 1.01 * self.max_fps
        )


# Numbers of ranks that an error tries, to list those that work.
MAX_LISTED_RANKS = 1024


class MicroBatches(NamedTuple):
    """What one rank takes in an optimizer step of `samples` over all ranks: `accumulation` micro-batches of `size`
    samples, or of one less where the samples do not divide evenly."""

    size: int
    accumulation: int
    samples: int


class TrainBucket(Bucket):
    """A bucket that training draws batches from. It states batch_size, global_batch, or both, unless
    `train.tokens_per_step` does."""

    batch_size: Positive | None = None
    """Samples per rank and micro-batch; beside `global_batch`, the most that a micro-batch may have."""
    global_batch: Positive | None = None
    """Samples per optimizer step over all ranks, whatever their number: they are shared out as evenly as possible, in
    as few micro-batches as `batch_size` allows. null: data-parallel ranks * batch_size *
    train.gradient_accumulation."""
    tokens: Positive | None = None
    """Video tokens of a sample. Follows from the features with `train.tokens_per_step`, as the sizes above then do."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight per clip, relative to the other buckets."""

    @property
    def is_sized(self) -> bool:
        """Whether it is known how many samples a step takes."""
        return self.batch_size is not None or self.global_batch is not None

    def micro_batches(self, data_ranks: int, accumulation: int) -> MicroBatches:
        """One rank's share of a step on `data_ranks` data-parallel ranks. accumulation: micro-batches where the bucket
        states batch_size alone.

        ConfigError: global_batch leaves a rank without samples; names the numbers of ranks and the batches that work.
        """
        if self.global_batch is None:
            assert self.batch_size is not None
            return MicroBatches(self.batch_size, accumulation, data_ranks * self.batch_size * accumulation)
        if (divided := self._divide(self.global_batch, data_ranks)) is not None:
            return divided
        ranks = [
            n for n in range(1, min(self.global_batch, MAX_LISTED_RANKS) + 1) if self._divide(self.global_batch, n)
        ]
        nearest = (
            range(self.global_batch - 1, 0, -1),
            range(self.global_batch + 1, self.global_batch + data_ranks + 1),
        )
        sizes = [size for sizes in nearest if (size := next((n for n in sizes if self._divide(n, data_ranks)), None))]
        limit = "" if self.batch_size is None else f", at most {self.batch_size} a micro-batch (batch_size)"
        raise ConfigError(
            f"data.buckets {self.key}: global_batch is {self.global_batch}, too few or not divisible for {data_ranks} data-parallel "
            f"ranks that each take one sample or more in every micro-batch{limit}; it goes with {_listed(ranks)} ranks, and they with "
            f"a global_batch of {' or '.join(map(str, sizes))}"
        )

    def _divide(self, samples: int, data_ranks: int) -> MicroBatches | None:
        """The fewest micro-batches that batch_size allows; None if some would be empty."""
        accumulation = -(-samples // (data_ranks * (self.batch_size or samples)))
        shares = data_ranks * accumulation
        return MicroBatches(-(-samples // shares), accumulation, samples) if shares <= samples else None


def _listed(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 to 9: runs of numbers by their ends."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


Buckets = TypeVar("Buckets", bound=tuple[Bucket, ...])


def unique_buckets(buckets: Buckets) -> Buckets:
    keys = [bucket.key for bucket in buckets]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"buckets listed twice: {', '.join(repeated)}")
    return buckets


def default_bucket(buckets: Sequence[Bucket]) -> Bucket:
    """The shape that a run generates by default: the largest video bucket; of a run on images alone, the largest
    image."""
    b = max(buckets, key=lambda b: (b.frames > 1, b.height * b.width, b.frames))
    return Bucket(frames=b.frames, height=b.height, width=b.width)


def latent_shape(bucket: Bucket, compression: tuple[int, int, int]) -> tuple[int, int, int]:
    """Latent (T, H, W) of a clip of `bucket`'s size. `compression`: pixels per latent (t, h, w).

    Video autoencoders compress causally: T = 1 + (frames - 1) / t. ConfigError where sizes don't divide.
    """
    t, h, w = compression
    if (bucket.frames - 1) % t:
        raise ConfigError(
            f"bucket {bucket.key}: frames - 1 = {bucket.frames - 1} is not divisible by the autoencoder's temporal compression {t}"
        )
    for name, size, factor in (("height", bucket.height, h), ("width", bucket.width, w)):
        if size % factor:
            raise ConfigError(
                f"bucket {bucket.key}: {name} {size} is not divisible by the autoencoder's compression {factor}"
            )
    return (1 + (bucket.frames - 1) // t, bucket.height // h, bucket.width // w)


def token_grid(
    latent: tuple[int, int, int], patch: tuple[int, int, int], name: str, pad: bool = False
) -> tuple[int, int, int]:
    """Grid (T, H, W) of patches of a latent; ConfigError with both numbers where they don't divide, unless `pad`."""
    for axis, size, p in zip(("frames", "height", "width"), latent, patch, strict=True):
        if size % p and not pad:
            raise ConfigError(
                f"{name}: latent {axis} {size} is not divisible by model.patch_size {p} (model.pad_latents pads it)"
            )
    return (-(-latent[0] // patch[0]), -(-latent[1] // patch[1]), -(-latent[2] // patch[2]))
