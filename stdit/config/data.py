"""Schema of buckets, encoders, extraction and training data.

stdit.config passes these names on; import them from there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from stdit.config.auto_buckets import AutoEntry, expand_buckets
from stdit.config.base import MAX_SECONDS, MAX_THREADS, Count, Frozen, NonNegative, Positive, Share, Width, Workers
from stdit.config.load import ConfigError
from stdit.config.location import LocalPath, Location, Url


class Bucket(Frozen):
    """A clip shape in pixels. A batch holds clips of one bucket."""

    frames: Annotated[int, Field(gt=0, le=1_000_000)]
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
    min_fps: float | None = Field(default=None, gt=0, le=1000)
    """Lowest frame rate of videos that go here, after `frame_stride` or `target_fps`. null: any."""
    max_fps: float | None = Field(default=None, gt=0, le=1000)
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
    """What one rank takes in an optimizer step of `samples` over all ranks: `accumulation` micro-batches of `size` samples, or of
    one less where the samples do not divide evenly."""

    size: int
    accumulation: int
    samples: int


class TrainBucket(Bucket):
    """A bucket that training draws batches from. It states batch_size, global_batch, or both, unless `train.tokens_per_step` does."""

    batch_size: Positive | None = None
    """Samples per rank and micro-batch; beside `global_batch`, the most that a micro-batch may have."""
    global_batch: Positive | None = None
    """Samples per optimizer step over all ranks, whatever their number: they are shared out as evenly as possible, in as few
    micro-batches as `batch_size` allows. null: data-parallel ranks * batch_size * train.gradient_accumulation."""
    tokens: Positive | None = None
    """Video tokens of a sample. Follows from the features with `train.tokens_per_step`, as the sizes above then do."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight per clip, relative to the other buckets."""

    @property
    def is_sized(self) -> bool:
        """Whether it is known how many samples a step takes."""
        return self.batch_size is not None or self.global_batch is not None

    def micro_batches(self, data_ranks: int, accumulation: int) -> MicroBatches:
        """One rank's share of a step on `data_ranks` data-parallel ranks. accumulation: micro-batches where the bucket states
        batch_size alone.

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


def _unique(buckets: Buckets) -> Buckets:
    keys = [bucket.key for bucket in buckets]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ValueError(f"buckets listed twice: {', '.join(repeated)}")
    return buckets


class Where(Frozen):
    """A filter on one column of the manifest. A missing value passes no filter."""

    column: str
    """Name of the column."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""
    one_of: tuple[str | int | float, ...] | None = None
    """Values that pass."""
    top: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the clips, those with the largest values, that pass: of the clips that pass all other filters."""
    per: str | None = None
    """Column whose groups each give their `top` share, such as class; `duration`: the frames of the clip (of its bucket, in training)."""

    @model_validator(mode="after")
    def _check_any(self) -> Where:
        if self.at_least is None and self.at_most is None and self.one_of is None and self.top is None:
            raise ValueError(f"the condition on column {self.column!r} states none of at_least, at_most, one_of, top")
        if self.per is not None and self.top is None:
            raise ValueError(f"the condition on column {self.column!r}: per {self.per!r} needs top")
        return self


class VideoEncoderConfig(Frozen):
    """The autoencoder that turns clips into latents."""

    kind: Literal["pixels", "image", "video"] = "pixels"
    """pixels: no autoencoder, the clip itself. image: a diffusers image autoencoder, applied per frame. video: a diffusers
    video autoencoder."""
    path: str | None = None
    """Folder or hub id of a diffusers autoencoder (kind image or video)."""
    subfolder: str | None = None
    """Subfolder of `path` that holds it, such as vae."""
    channels: Literal[1, 3] = 3
    """Kind pixels: 1 (luma) or 3 (RGB)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the autoencoder and of the stored latents."""
    frames_at_once: Positive = 16
    """Kind image: frames encoded or decoded per forward pass."""

    @model_validator(mode="after")
    def _check_path(self) -> VideoEncoderConfig:
        if (self.kind == "pixels") != (self.path is None):
            raise ValueError(
                f"kind {self.kind!r} {'takes no path' if self.path else 'needs a path (folder or hub id)'}"
            )
        return self


# As many as Stable Diffusion 3 has: text_encoder, text_encoder_2, text_encoder_3.
MOST_TEXT_ENCODERS = 3


class ByteT5Config(Frozen):
    """A frozen, randomly initialised T5 encoder over bytes (ByT5's tokenizer): text features without a download."""

    width: Width = 64
    """Width of the features (d_model)."""
    depth: Count = 2
    """Layers."""
    num_heads: Count = 4
    """Attention heads."""
    seed: NonNegative = 0
    """Seed of the weights."""
    initializer_factor: float = Field(default=1.0, gt=0)
    """Scale of the initial weights (T5Config.initializer_factor)."""


class TextEncoderConfig(Frozen):
    """One text encoder (T5, mT5, UMT5, ByT5 or CLIP by `path`, or a random `byte_t5`), or several, concatenated along
    `tokens` or `channels`. Stable Diffusion 3:

        tokens:
          - channels:
              - {path: …, subfolder: text_encoder, tokenizer_subfolder: tokenizer, max_text_tokens: 77, layer: -2, pooled: true, keep_padding: true}
              - {path: …, subfolder: text_encoder_2, tokenizer_subfolder: tokenizer_2, …}
          - {path: …, subfolder: text_encoder_3, tokenizer_subfolder: tokenizer_3, max_text_tokens: 256, keep_padding: true}
    """

    path: str | None = None
    """Folder or hub id of the encoder and its tokenizer."""
    subfolder: str | None = None
    """Subfolder of `path` that holds the encoder, such as text_encoder."""
    tokenizer_subfolder: str | None = None
    """Subfolder of `path` that holds the tokenizer, such as tokenizer."""
    byte_t5: ByteT5Config | None = None
    """A random byte-level T5 in place of `path`."""
    max_text_tokens: Width = 120
    """Captions are truncated to so many tokens."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the encoder and of the stored text features."""
    layer: Annotated[int, Field(le=-1)] | None = None
    """Hidden states used as features: -2 is the input of the last layer, without the final norm (SD3, SDXL). null: the
    encoder's output."""
    pooled: bool = False
    """CLIP: store the pooled vector of the caption too. The vectors of several encoders are concatenated."""
    keep_padding: bool = False
    """Pad captions to max_text_tokens and treat padding as tokens, unmasked (Stable Diffusion)."""

    tokens: tuple[TextEncoderConfig, ...] | None = Field(default=None, min_length=2)
    """Encoders concatenated along the tokens; narrower features are zero-padded."""
    channels: tuple[TextEncoderConfig, ...] | None = Field(default=None, min_length=2)
    """Encoders concatenated along the channels; all have the same number of tokens."""
    width: Width | None = None
    """Zero-pad features to this width. null: the encoders' own width."""

    @model_validator(mode="after")
    def _check_kind(self) -> TextEncoderConfig:
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
        """The encoders, or groups of encoders, that are concatenated; empty for a single encoder."""
        return self.tokens or self.channels or ()

    @property
    def encoders(self) -> tuple[TextEncoderConfig, ...]:
        """The single encoders, in order."""
        return tuple(one for part in self.parts for one in part.encoders) or (self,)

    @property
    def feature_tokens(self) -> int:
        """Tokens of the longest caption, over all encoders."""
        if self.tokens:
            return sum(part.feature_tokens for part in self.tokens)
        return self.channels[0].feature_tokens if self.channels else self.max_text_tokens


class WindowsConfig(Frozen):
    """Samples of a long clip: windows of as many frames as its bucket has, from the clip's beginning, or around its middle
    (`clip_window`)."""

    stride: Positive
    """Frames from the beginning of one window to the next, of those that frame_stride or target_fps leave. As many as a bucket has:
    its windows adjoin; fewer: they overlap."""
    max: Annotated[int, Field(gt=0, le=1_000_000)] = 8
    """Windows of a clip at most."""


class CacheConfig(Frozen):
    """The local cache of what is read by URL. All processes of a machine with the same folder share it."""

    folder: Path | None = None
    """Folder of the cache, on a local disk. null: stdit/objects in $XDG_CACHE_HOME or ~/.cache."""
    size_gb: float = Field(default=50.0, gt=0)
    """Most that it holds, 10^9 bytes; what was used longest ago is removed first. At least the largest file."""


class ExtractConfig(Frozen):
    """Feature extraction: clips and captions in, feature shards out (`stdit extract --config …`)."""

    manifest: Location
    """A folder of clips (NAME.mp4 with its caption in NAME.txt), or a .jsonl, .csv or .parquet manifest; a path or a URL (s3://…,
    gs://…)."""
    out: LocalPath
    """Folder of the features."""
    buckets: Annotated[
        tuple[ExtractBucket, ...],
        Field(min_length=1),
        AfterValidator(_unique),
        BeforeValidator(expand_buckets, json_schema_input_type=tuple[ExtractBucket | AutoEntry, ...] | AutoEntry),
    ]
    """Clip shapes; `{auto: …}`, alone or in the list, makes them. A clip goes to the size that keeps most of it, crop and scale together,
    of those that it covers; then to the longest bucket that it fits."""
    images_from_videos: bool = False
    """Videos that are too short for the other buckets go to buckets of one frame, which take their first. false: these
    take still images alone (where all buckets have one frame, videos too)."""
    min_area_ratio: Share = 0.0
    """Smallest area of a bucket, relative to the best bucket that the clip covers; smaller ones are not tried."""
    where: tuple[Where, ...] = ()
    """Filters on columns of the manifest; a clip must pass all."""
    video_encoder: VideoEncoderConfig = VideoEncoderConfig()
    """The autoencoder."""
    text_encoder: TextEncoderConfig | None = None
    """The text encoder. null: no text features (class-conditional or unconditional training)."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """Video decoder. auto: decord, and PyAV for what decord cannot read reliably."""
    decode_timeout_s: float = Field(default=60.0, gt=0, le=MAX_SECONDS)
    """Seconds after which decoding of a clip is given up."""
    clip_window: Literal["first", "center"] = "first"
    """Which frames of a clip longer than its bucket are taken."""
    windows: WindowsConfig | None = None
    """Several samples of a clip that is longer than its bucket. null: one."""
    frame_stride: Positive = 1
    """Take every n-th frame; the frame rate is divided by n."""
    target_fps: float | None = Field(default=None, gt=0, le=1000)
    """Take frames at this rate, of videos of any higher one; slower videos are dropped. null: at the videos' own rates,
    which a bucket's `min_fps` and `max_fps` can keep apart."""
    clips_per_shard: Positive = 512
    """Clips per shard, the unit of work and of resuming."""
    batch_size: Positive = 16
    """Clips per forward pass of the autoencoder, captions per forward pass of the text encoder."""
    max_bad_share: Share = 0.05
    """Share of the clips that may fail to decode before extraction is an error."""
    control_column: str | None = None
    """Column with the path of each clip's control input (depth, edges, …): a video of as many frames, or an image.
    null: none."""
    captions: tuple[str, ...] = ()
    """Further captions of the clips, whose text features are extracted too: `dense` is that of column caption_dense."""
    workers: Workers = 1
    """Processes that extract (Ray actors under `pipelines.extract_features`)."""
    seed: NonNegative = 0
    """Seed of keep_probability."""
    cache: CacheConfig = CacheConfig()
    """Where clips are kept that are read by URL."""

    @property
    def has_manifest(self) -> bool:
        """Whether the manifest is there; of a URL, reading it will tell."""
        return isinstance(self.manifest, Url) or self.manifest.exists()

    @model_validator(mode="after")
    def _check_rate(self) -> ExtractConfig:
        if self.target_fps is not None and self.frame_stride != 1:
            raise ValueError(f"target_fps {self.target_fps:g} decides which frames are taken; leave frame_stride out")
        return self

    @property
    def most_windows(self) -> int:
        """Samples of a clip at most."""
        return 1 if self.windows is None else self.windows.max


class FeatureSetConfig(Frozen):
    """One of several feature sets that a run trains on."""

    path: Location
    """The `out` of an extraction, a path or a URL."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples that come from this set, relative to the other sets. Left out of all sets: each gives as many as it has clips."""


def _kind_of_features(found: Any) -> str:
    return "sets" if isinstance(found, list | tuple) else "synthetic" if found == "synthetic" else "location"


class DataConfig(Frozen):
    """The extracted features that a training run reads."""

    features: Annotated[
        Annotated[Location, Tag("location")]
        | Annotated[Literal["synthetic"], Tag("synthetic")]
        | Annotated[tuple[FeatureSetConfig, ...], Field(json_schema_extra={"minItems": 1}), Tag("sets")],
        Discriminator(_kind_of_features),
    ]
    """The `out` of an extraction, a path or a URL (s3://…, gs://…); or several of the same encoders, [{path: a, weight: 0.7},
    {path: b, weight: 0.3}]; or `synthetic`: random data, to test a launch."""
    buckets: Annotated[tuple[TrainBucket, ...], Field(min_length=1), AfterValidator(_unique)] = ()
    """Shapes to train on, each with its batch size. Left out: all buckets of the features that hold training clips (of an
    image model, those of one frame)."""
    batch_size: Positive | None = None
    """Where `buckets` is left out: samples of the largest bucket per rank and micro-batch (default 1); smaller buckets take
    as many more as they have fewer tokens."""
    global_batch: Positive | None = None
    """Where `buckets` is left out: samples of the largest bucket per optimizer step over all ranks (see
    data.buckets[].global_batch); smaller buckets take a multiple of it, by their tokens."""
    where: tuple[Where, ...] = ()
    """Conditions on manifest columns that a training or validation clip must meet."""
    captions: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Shares by which training draws a clip's caption, anew in each epoch: {dense: 0.7, original: 0.3}; `original` is the column
    caption, others are the extraction's `captions`. A clip that lacks one draws among the others. null: original."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split of validation losses and sample grids."""
    workers: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0
    """Threads of each rank that read ahead; 0: none."""
    cache: CacheConfig = CacheConfig()
    """Where shards are kept of features that are read by URL: fetched whole and ahead of their use. Best larger than the features."""

    @property
    def feature_paths(self) -> tuple[Path | Url, ...]:
        """Folders or URLs of the features; empty for synthetic ones."""
        if isinstance(self.features, tuple):
            return tuple(features.path for features in self.features)
        return (self.features,) if isinstance(self.features, Path | Url) else ()

    @property
    def feature_weights(self) -> tuple[float, ...] | None:
        """Weights of several sets; None: by their clips."""
        weights = [f.weight for f in self.features if f.weight is not None] if isinstance(self.features, tuple) else []
        return tuple(weights) or None

    @property
    def source_name(self) -> str:
        """The features, for messages."""
        return ", ".join(map(str, self.feature_paths)) or "synthetic"

    @model_validator(mode="after")
    def _check_sets(self) -> DataConfig:
        if not self.features:  # here: a bound on its length would be reported beside an error of an entry
            raise ValueError("features: an empty list; expected one set or more, [{path: …, weight: …}, …]")
        paths = [str(path) for path in self.feature_paths]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"features: {', '.join(repeated)} listed twice; a set's share is its weight")
        weightless = (
            [str(f.path) for f in self.features if f.weight is None] if isinstance(self.features, tuple) else []
        )
        if weightless and self.feature_weights is not None:
            raise ValueError(
                f"features: {', '.join(weightless)} has no weight, but others have; give all sets one, or none"
            )
        return self

    @model_validator(mode="after")
    def _sizes(self) -> DataConfig:
        if self.captions is not None and not self.captions:
            raise ValueError("captions: no shares given; leave it out for the original captions")
        for name in ("batch_size", "global_batch"):
            if self.buckets and (size := getattr(self, name)) is not None:
                raise ValueError(f"{name} {size} is for buckets that follow from the features; these state their own")
        return self


# --------------------------------------------------------------------------------- shapes of clips


def default_bucket(buckets: Sequence[Bucket]) -> Bucket:
    """The shape that a run generates by default: the largest video bucket; of a run on images alone, the largest image."""
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
