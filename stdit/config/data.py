"""The schema of data: buckets, encoders, extraction, and what training reads of it.

stdit.config passes these names on; import them from there.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from stdit.config.base import Frozen, NonNegative, Positive, Share
from stdit.config.load import ConfigError


class Bucket(Frozen):
    """A shape, in pixels, that clips are cut to; batches hold one bucket only."""

    frames: Positive
    height: Positive
    width: Positive

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
    """The share `keep_probability` of the clips that fit stays here; the rest goes on to the next fitting bucket."""

    keep_probability: Share = 1.0


class TrainBucket(Bucket):
    """`batch_size`: samples of this shape per rank and micro-batch. `weight`: how often, against the others, per sample held."""

    batch_size: Positive
    weight: float = Field(default=1.0, gt=0)


Buckets = TypeVar("Buckets", bound=tuple[Bucket, ...])


def _unique(buckets: Buckets) -> Buckets:
    keys = [bucket.key for bucket in buckets]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"buckets listed twice: {', '.join(twice)}")
    return buckets


class Where(Frozen):
    """A condition on one manifest column."""

    column: str
    at_least: float | None = None
    at_most: float | None = None
    one_of: tuple[str | int | float, ...] | None = None

    @model_validator(mode="after")
    def _some(self) -> Where:
        if self.at_least is None and self.at_most is None and self.one_of is None:
            raise ValueError(f"the condition on column {self.column!r} states none of at_least, at_most, one_of")
        return self


class VideoEncoderConfig(Frozen):
    """The autoencoder. `pixels`: none, the clip itself; `image`: a diffusers image autoencoder, per frame;
    `video`: a diffusers video autoencoder. `path`: a local folder or hub id."""

    kind: Literal["pixels", "image", "video"] = "pixels"
    path: str | None = None
    subfolder: str | None = None
    # `pixels` only: 1 (luma) or 3 (RGB).
    channels: Literal[1, 3] = 3
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # `image` only: frames encoded or decoded at a time.
    frames_at_once: Positive = 16

    @model_validator(mode="after")
    def _path(self) -> VideoEncoderConfig:
        if (self.kind == "pixels") != (self.path is None):
            raise ValueError(
                f"kind {self.kind!r} {'takes no path' if self.path else 'needs a path (folder or hub id)'}"
            )
        return self


# As many as Stable Diffusion 3 has: text_encoder, text_encoder_2, text_encoder_3.
MOST_TEXT_ENCODERS = 3


class ByteT5Config(Frozen):
    """A frozen T5 encoder over bytes (ByT5's tokens), drawn from `seed`: text features with nothing to download."""

    width: Positive = 64
    depth: Positive = 2
    num_heads: Positive = 4
    seed: NonNegative = 0
    # T5Config.initializer_factor: how far the random weights reach.
    initializer_factor: float = Field(default=1.0, gt=0)


class TextEncoderConfig(Frozen):
    """A T5, mT5, UMT5, ByT5 or CLIP text encoder by `path` (folder or hub id), or a random `byte_t5`; or several, whose
    features are concatenated: their `tokens` one after another, or their `channels` side by side. Stable Diffusion 3:

        tokens:
          - channels:
              - {path: …, subfolder: text_encoder, tokenizer_subfolder: tokenizer, max_text_tokens: 77, layer: -2, pooled: true, keep_padding: true}
              - {path: …, subfolder: text_encoder_2, tokenizer_subfolder: tokenizer_2, …}
          - {path: …, subfolder: text_encoder_3, tokenizer_subfolder: tokenizer_3, max_text_tokens: 256, keep_padding: true}
    """

    path: str | None = None
    subfolder: str | None = None
    tokenizer_subfolder: str | None = None
    byte_t5: ByteT5Config | None = None
    max_text_tokens: Positive = 120
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    # Which hidden states are the features: -2 are those that the last layer is given (SD3, SDXL), without the final norm.
    # None: the model's own output.
    layer: Annotated[int, Field(le=-1)] | None = None
    # CLIP: whether its vector of the whole caption comes with the features. Those of several encoders are concatenated.
    pooled: bool = False
    # Whether captions are filled up to max_text_tokens with padding that is seen like any other token (Stable Diffusion).
    keep_padding: bool = False

    # Of unequal width, the narrower are filled with zeros.
    tokens: tuple[TextEncoderConfig, ...] | None = Field(default=None, min_length=2)
    # Each must have as many tokens as the others.
    channels: tuple[TextEncoderConfig, ...] | None = Field(default=None, min_length=2)
    # Zeros fill the features of one encoder, or of several concatenated, up to this width.
    width: Positive | None = None

    @model_validator(mode="after")
    def _one(self) -> TextEncoderConfig:
        kinds = [name for name in ("path", "byte_t5", "tokens", "channels") if getattr(self, name) is not None]
        if len(kinds) != 1:
            found = f"found {' and '.join(kinds)}" if kinds else "found none"
            raise ValueError(
                f"give exactly one of path and byte_t5, or tokens or channels of several encoders; {found}"
            )
        if self.parts:
            own = {"tokens", "channels", "width"}
            fields = {k: f for k, f in type(self).model_fields.items() if k not in own}
            if stray := [k for k, f in fields.items() if getattr(self, k) != f.default]:
                raise ValueError(f"{stray[0]} belongs to each of the {kinds[0]}, not to all of them")
        first, *others = self.channels or (None,)
        for other in others:
            if first is not None and other.feature_tokens != first.feature_tokens:
                raise ValueError(
                    f"channels of {first.feature_tokens} and {other.feature_tokens} tokens (max_text_tokens); side by side they must be as many"
                )
        if len(self.encoders) > MOST_TEXT_ENCODERS:
            raise ValueError(f"{len(self.encoders)} encoders; a pipeline holds at most {MOST_TEXT_ENCODERS}")
        return self

    @property
    def parts(self) -> tuple[TextEncoderConfig, ...]:
        """What is concatenated; nothing of a single encoder."""
        return self.tokens or self.channels or ()

    @property
    def encoders(self) -> tuple[TextEncoderConfig, ...]:
        """The single encoders, in order."""
        return tuple(one for part in self.parts for one in part.encoders) or (self,)

    @property
    def feature_tokens(self) -> int:
        """Tokens of the longest caption's features."""
        if self.tokens:
            return sum(part.feature_tokens for part in self.tokens)
        return self.channels[0].feature_tokens if self.channels else self.max_text_tokens


class ExtractConfig(Frozen):
    """Clips and captions in, feature shards out (`python -m pipelines.extract_features --config …`)."""

    manifest: Path
    out: Path
    # Tried from large to small area, then from long to short.
    buckets: Annotated[tuple[ExtractBucket, ...], Field(min_length=1), AfterValidator(_unique)]
    # A bucket whose area is below this share of the largest bucket that the clip covers is not tried.
    min_area_ratio: Share = 0.0
    where: tuple[Where, ...] = ()
    video_encoder: VideoEncoderConfig = VideoEncoderConfig()
    # None: no text features (class-conditional or unconditional training).
    text_encoder: TextEncoderConfig | None = None
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    decode_timeout_s: float = Field(default=60.0, gt=0)
    # Frames taken from a clip longer than its bucket, and every how manieth.
    window: Literal["first", "center"] = "first"
    frame_stride: Positive = 1
    clips_per_shard: Positive = 512
    batch_size: Positive = 16
    # More undecodable clips than this share of those that `where` leaves is an error.
    max_bad_share: Share = 0.05
    # The manifest's column with the path of each clip's condition (depth, edges, …), encoded beside it for a control
    # branch: a video of as many frames, or an image. None: no conditions.
    control_column: str | None = None
    workers: Positive = 1
    seed: NonNegative = 0


class DataConfig(Frozen):
    """Which extracted features a training run reads."""

    features: Path | Literal["synthetic"]
    """The `out` of an extraction; or `synthetic`: random data, to test a launch."""
    buckets: Annotated[tuple[TrainBucket, ...], Field(min_length=1), AfterValidator(_unique)] = ()
    """Shapes to train on, each with its batch size. Left out: all buckets of the features that hold training clips (of an
    image model, those of one frame)."""
    batch_size: Positive | None = None
    """Where `buckets` is left out: samples of the largest bucket per rank and micro-batch (default 1); smaller buckets take
    as many more as they have fewer tokens."""
    where: tuple[Where, ...] = ()
    """Conditions on manifest columns that a training or validation clip must meet."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split of validation losses and sample grids."""
    workers: NonNegative = 0
    """Threads of each rank that read ahead; 0: none."""

    @model_validator(mode="after")
    def _sizes(self) -> DataConfig:
        if self.buckets and self.batch_size is not None:
            raise ValueError(
                f"batch_size {self.batch_size} is for buckets that follow from the features; these state their own"
            )
        return self


# --------------------------------------------------------------------------------- shapes of clips


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


def token_grid(latent: tuple[int, int, int], patch: tuple[int, int, int], name: str) -> tuple[int, int, int]:
    """Grid (T, H, W) of patches of a latent; ConfigError with both numbers where they don't divide."""
    for axis, size, p in zip(("frames", "height", "width"), latent, patch, strict=True):
        if size % p:
            raise ConfigError(f"{name}: latent {axis} {size} is not divisible by model.patch_size {p}")
    return (latent[0] // patch[0], latent[1] // patch[1], latent[2] // patch[2])


def tokens(latent: tuple[int, int, int], patch: tuple[int, int, int], name: str) -> int:
    """Number of patches of a latent."""
    return math.prod(token_grid(latent, patch, name))
