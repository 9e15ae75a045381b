"""Feature extraction: encoders, buckets, and where clips come from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from stdit.config.auto_buckets import AutoEntry, expand_buckets
from stdit.config.base import Count, Fps, Frames, Frozen, NonNegative, Samples, Seconds, Share, Width, Workers
from stdit.config.buckets import ExtractBucket, unique_buckets
from stdit.config.data import CacheConfig, Where
from stdit.config.location import Location, Url


class VideoEncoderConfig(Frozen):
    """The autoencoder that turns clips into latents."""

    kind: Literal["pixels", "image", "video"] = "pixels"
    """pixels: no autoencoder, the clip itself. image: a diffusers image autoencoder, applied per frame. video: a
    diffusers video autoencoder."""
    path: str | None = None
    """Folder or hub id of a diffusers autoencoder (kind image or video)."""
    subfolder: str | None = None
    """Subfolder of `path` that holds it, such as vae."""
    channels: Literal[1, 3] = 3
    """Kind pixels: 1 (luma) or 3 (RGB)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the autoencoder and of the stored latents."""
    frames_at_once: Frames = 16
    """Kind image: frames encoded or decoded per forward pass."""

    @model_validator(mode="after")
    def _check_path(self) -> VideoEncoderConfig:
        if (self.kind == "pixels") != (self.path is None):
            raise ValueError(
                f"kind {self.kind!r} {'takes no path' if self.path else 'needs a path (folder or hub id)'}"
            )
        return self


class VisionEncoderConfig(Frozen):
    """A frozen vision transformer whose patch features are stored beside the latents, for `train.alignment` to train
    towards."""

    path: str
    """Folder or hub id of a vision transformer of transformers (DINOv2, DINOv3, SigLIP, CLIP, ViT), with its
    preprocessor_config.json."""
    subfolder: str | None = None
    """Subfolder of `path` that holds it."""
    pixels_per_feature: Count = 16
    """Pixels of a clip that a feature stands for, along each side: frames are resized until a patch of the encoder
    covers as many. 16 is a token of a model with patch size 2 on latents of compression 8: nothing is interpolated in
    training (REPA: 224 px for 256)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the encoder and of the stored features."""
    frames_at_once: Frames = 16
    """Frames per forward pass."""


# Keys of ExtractConfig, and of what identifies features: the encoders. Of a vision encoder only where there is one.
ENCODERS = ("video_encoder", "text_encoder", "vision_encoder")

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
              - {path: …, subfolder: text_encoder, tokenizer_subfolder: tokenizer, max_text_tokens: 77, layer: -2,
                pooled: true, keep_padding: true}
              - {path: …, subfolder: text_encoder_2, tokenizer_subfolder: tokenizer_2, …}
          - {path: …, subfolder: text_encoder_3, tokenizer_subfolder: tokenizer_3, max_text_tokens: 256,
             keep_padding: true}
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
    """Samples of a long clip: windows of as many frames as its bucket has, from the clip's beginning, or around its
    middle (`clip_window`)."""

    stride: Frames
    """Frames from the beginning of one window to the next, of those that frame_stride or target_fps leave. As many as a
    bucket has: its windows adjoin; fewer: they overlap."""
    max: Frames = 8
    """Windows of a clip at most."""


class ExtractConfig(Frozen):
    """Feature extraction: clips and captions in, feature shards out (`stdit extract --config …`)."""

    manifest: Location
    """A folder of clips (NAME.mp4 with its caption in NAME.txt), or a .jsonl, .csv or .parquet manifest; a path or a
    URL (s3://…, gs://…)."""
    out: Location
    """Folder of the features, or a URL: each finished shard is uploaded, index.json last (docs/data.md)."""
    buckets: Annotated[
        tuple[ExtractBucket, ...],
        Field(min_length=1),
        AfterValidator(unique_buckets),
        BeforeValidator(expand_buckets, json_schema_input_type=tuple[ExtractBucket | AutoEntry, ...] | AutoEntry),
    ]
    """Clip shapes; `{auto: …}`, alone or in the list, makes them. A clip goes to the size that keeps most of it, crop
    and scale together, of those that it covers; then to the longest bucket that it fits."""
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
    vision_encoder: VisionEncoderConfig | None = None
    """A vision encoder, for `train.alignment` with target features (REPA). null: none."""
    decoder: Literal["auto", "decord", "pyav"] = "auto"
    """Video decoder. auto: the one that was measured to be faster and to notice more damage, which is PyAV."""
    decoder_workers: Workers | Literal["auto"] = "auto"
    """Processes that decode ahead for each encoder (num_workers of a DataLoader). auto: one per core, shared by the
    encoders of a machine, at most 16, and fewer for few clips. Features do not depend on it."""
    decode_timeout_s: Seconds = 60.0
    """Seconds after which decoding of a clip is given up."""
    clip_window: Literal["first", "center"] = "first"
    """Which frames of a clip longer than its bucket are taken."""
    windows: WindowsConfig | None = None
    """Several samples of a clip that is longer than its bucket. null: one."""
    frame_stride: Frames = 1
    """Take every n-th frame; the frame rate is divided by n."""
    target_fps: Fps | None = None
    """Take frames at this rate, of videos of any higher one; slower videos are dropped. null: at the videos' own rates,
    which a bucket's `min_fps` and `max_fps` can keep apart."""
    clips_per_shard: Samples = 512
    """Clips per shard, the unit of work and of resuming."""
    batch_size: Samples = 16
    """Clips per forward pass of the autoencoder, captions per forward pass of the text encoder."""
    max_bad_share: Share = 0.05
    """Share of the clips that may fail to decode before extraction is an error."""
    control_column: str | None = None
    """Column with the path of each clip's control input (depth, edges, …): a video of as many frames, or an image.
    null: none."""
    captions: tuple[str, ...] = ()
    """Further captions of the clips, whose text features are extracted too: `dense` is that of column caption_dense."""
    workers: Workers = 1
    """Processes that encode (Ray actors under `pipelines.extract_features`), each with its own encoders and
    `decoder_workers`."""
    seed: NonNegative = 0
    """Seed of keep_probability."""
    cache: CacheConfig = CacheConfig()
    """Where clips are kept that are read by URL, and features on their way to one."""

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
