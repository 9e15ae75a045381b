"""Identities of encoders, as features (index.json) and checkpoints (identity.json) record them: schemas of their JSON.

Made by stdit.encoders, which loads the same encoder from them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from stdit.config.base import FileSchema, Positive
from stdit.config.buckets import ExtractBucket
from stdit.config.extract import MOST_TEXT_ENCODERS, ByteT5Config, WindowsConfig

Dtype = Literal["float32", "bfloat16", "float16"]


class VideoIdentity(FileSchema):
    """An autoencoder with its latent statistics, one number per channel."""

    kind: Literal["pixels", "image", "video", "synthetic"]
    class_name: str = Field(alias="class")
    path: str | None = None
    subfolder: str | None = None
    fingerprint: str | None = None
    dtype: Dtype | None = None
    frames_at_once: Positive | None = None
    channels: Positive
    compression: tuple[Positive, Positive, Positive]
    shift: tuple[float, ...]
    scale: tuple[float, ...]

    @model_validator(mode="after")
    def _check(self) -> VideoIdentity:
        for key, values in (("shift", self.shift), ("scale", self.scale)):
            if len(values) != self.channels:
                raise ValueError(f"{key} has {len(values)} values for {self.channels} channels")
        if 0.0 in self.scale:
            raise ValueError("scale is 0 for a channel")
        if self.kind == "synthetic":
            return self
        wanted = {"path", "subfolder", "fingerprint", "dtype", "frames_at_once"}
        empty = {"dtype", "frames_at_once"} if self.kind == "pixels" else {*wanted} - {"subfolder"}
        if missing := sorted((wanted - self.model_fields_set) | {key for key in empty if getattr(self, key) is None}):
            raise ValueError(f"{', '.join(missing)} missing for an autoencoder of kind {self.kind}")
        return self


class VisionIdentity(FileSchema):
    """A vision encoder whose patch features lie beside the latents. dim: their width."""

    class_name: str = Field(alias="class", min_length=1)
    path: str
    subfolder: str | None
    fingerprint: str
    dtype: Dtype
    frames_at_once: Positive
    dim: Positive
    pixels_per_feature: Positive


class FrameSampling(FileSchema):
    """Which frames of which clips an extraction took: keys of ExtractConfig. buckets: all, if any has min_fps or
    max_fps; else none."""

    frame_stride: Positive = 1
    target_fps: float | None = None
    clip_window: Literal["first", "center"] = "first"
    windows: WindowsConfig | None = None
    buckets: tuple[ExtractBucket, ...] = ()

    @model_serializer(mode="wrap")
    def _without_empty(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # As runs recorded it before there were these keys.
        return {key: value for key, value in handler(self).items() if value or key not in ("windows", "buckets")}

    @staticmethod
    def of(config: Mapping[str, Any]) -> FrameSampling:
        """Of an extraction's config, as the features' index.json has it."""
        found = {key: config[key] for key in FrameSampling.model_fields if config.get(key) is not None}
        sampling = FrameSampling.model_validate(found)
        rated = any(bucket.min_fps or bucket.max_fps for bucket in sampling.buckets)
        return sampling if rated else sampling.model_copy(update={"buckets": ()})

    @property
    def of_one_window(self) -> FrameSampling:
        """What decides which frames are taken of a clip that is as long as its bucket."""
        return self.model_copy(update={"windows": None, "buckets": ()})

    @property
    def changed(self) -> dict[str, Any]:
        """As JSON, without defaults."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def needs_rate(self) -> bool:
        """Whether a video's frame rate has a say."""
        return self.target_fps is not None or bool(self.buckets)

    @property
    def most_windows(self) -> int:
        """Samples of a clip at most."""
        return 1 if self.windows is None else self.windows.max


class SyntheticTextIdentity(FileSchema):
    """Of synthetic captions, which no encoder reads."""

    class_name: Literal["synthetic"] = Field(alias="class")
    dim: Positive | None
    max_text_tokens: Positive
    pooled_dim: Positive | None


class SingleTextIdentity(FileSchema):
    """One text encoder: a folder or hub id, or the settings of random weights."""

    class_name: str = Field(alias="class", min_length=1)
    path: str | None
    subfolder: str | None
    tokenizer_subfolder: str | None
    byte_t5: ByteT5Config | None
    fingerprint: str
    dtype: Dtype
    dim: Positive
    max_text_tokens: Positive
    layer: int | None
    keep_padding: bool
    pooled_dim: Positive | None
    width: Positive | None

    @model_validator(mode="after")
    def _check(self) -> SingleTextIdentity:
        if (self.path is None) == (self.byte_t5 is None):
            raise ValueError("a text encoder has either path or byte_t5")
        return self


class _SeveralTextIdentity(FileSchema):
    fingerprint: str
    dtype: Dtype
    dim: Positive
    max_text_tokens: Positive
    pooled_dim: Positive | None
    width: Positive | None


class TokensIdentity(_SeveralTextIdentity):
    """Several encoders, concatenated along the tokens."""

    class_name: Literal["tokens"] = Field(alias="class")
    tokens: Annotated[tuple[TextIdentity, ...], Field(min_length=1, max_length=MOST_TEXT_ENCODERS)]


class ChannelsIdentity(_SeveralTextIdentity):
    """Several encoders, concatenated along the channels."""

    class_name: Literal["channels"] = Field(alias="class")
    channels: Annotated[tuple[TextIdentity, ...], Field(min_length=1, max_length=MOST_TEXT_ENCODERS)]


def _kind_of_text(found: Any) -> str:
    name = found.get("class") if isinstance(found, dict) else getattr(found, "class_name", None)
    return name if name in ("synthetic", "tokens", "channels") else "single"


TextIdentity = Annotated[
    Annotated[SyntheticTextIdentity, Tag("synthetic")]
    | Annotated[TokensIdentity, Tag("tokens")]
    | Annotated[ChannelsIdentity, Tag("channels")]
    | Annotated[SingleTextIdentity, Tag("single")],
    Discriminator(_kind_of_text),
]

TokensIdentity.model_rebuild()
ChannelsIdentity.model_rebuild()
