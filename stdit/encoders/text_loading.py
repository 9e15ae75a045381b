"""Loading text encoders: from a config, from the identity that features record, or from a pipeline's components."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stdit.config import MOST_TEXT_ENCODERS, ByteT5Config, ConfigError, TextEncoderConfig
from stdit.encoders.byte_t5 import random_byte_t5, weights_sha256
from stdit.encoders.pretrained import from_pretrained, load_pretrained
from stdit.encoders.source import check_same, fingerprint_folder, folder_of, hub_commit, revision_of, subfolder_of
from stdit.encoders.text import AXES, TextEncoder, TextEncoders

# The setting that messages name.
KEY = "text_encoder.path"
# Of the names of a pipeline's components.
SUFFIXES = ("", *(f"_{number}" for number in range(2, MOST_TEXT_ENCODERS + 1)))


def load_text_encoder(
    config: TextEncoderConfig, device: torch.device | str = "cpu", revision: str | None = None
) -> Any:
    """Loads the TextEncoder or TextEncoders of `config`. revision: a commit of the hub.

    ConfigError: a path that is neither a folder nor on the hub, no encoder in it, missing weights or tokenizer; a
    setting that its encoder, or the other encoders, do not support.
    """
    if not config.parts:
        return _load_single(config, device, revision)
    try:
        parts = [load_text_encoder(part, device, revision) for part in config.parts]
        return TextEncoders("tokens" if config.tokens else "channels", parts, config.width)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def text_encoder_from_identity(
    identity: dict[str, Any], device: torch.device | str = "cpu", path: str | None = None
) -> Any:
    """Loads the TextEncoder or TextEncoders with this `identity`. path: folder of a single encoder, if it has moved.

    ConfigError: not found, or other weights or settings; the message says what differs.
    """
    for axis in AXES:
        if axis in identity:
            parts = [text_encoder_from_identity(part, device) for part in identity[axis]]
            return TextEncoders(axis, parts, identity["width"])
    return _single_from_identity(identity, device, path)


def feature_sizes(config: TextEncoderConfig) -> dict[str, int | None]:
    """`dim`, `max_text_tokens` and `pooled_dim` of the identity that the encoder of `config` will have, without loading
    weights.

    ConfigError: an encoder that is not there.
    """
    if not config.parts:
        return _single_sizes(config)
    parts = [feature_sizes(part) for part in config.parts]
    widths = [part["dim"] or 0 for part in parts]
    return {
        "dim": config.width or (max(widths) if config.tokens else sum(widths)),
        "max_text_tokens": config.feature_tokens,
        "pooled_dim": sum(part["pooled_dim"] or 0 for part in parts) or None,
    }


# ------------------------------------------------------------------------------------------ a single encoder


def _load_single(
    config: TextEncoderConfig, device: torch.device | str = "cpu", revision: str | None = None
) -> TextEncoder:
    """`load_text_encoder` of a config that names one encoder."""
    dtype = getattr(torch, config.dtype)
    source: dict[str, Any]
    if config.byte_t5:
        model: PreTrainedModel = random_byte_t5(config.byte_t5)
        tokenizer = cast(PreTrainedTokenizerBase, ByT5Tokenizer())
        source = {"byte_t5": config.byte_t5.model_dump(mode="json"), "fingerprint": weights_sha256(model)}
        model = cast(Any, model).to(dtype)
    else:
        assert config.path is not None
        found, folder = _fingerprint(config, revision), folder_of(config.path, KEY)
        model, tokenizer = _load(config, dtype, revision)
        source = {
            "path": str(folder) if folder else config.path,
            "subfolder": config.subfolder,
            "tokenizer_subfolder": config.tokenizer_subfolder,
            "fingerprint": found,
        }
    try:
        return TextEncoder(
            model,
            tokenizer,
            config.max_text_tokens,
            source,
            layer=config.layer,
            pooled=config.pooled,
            keep_padding=config.keep_padding,
            width=config.width,
        ).to(device)
    except ValueError as error:
        raise ConfigError(f"{KEY}: {config.path or 'byte_t5'}: {error}") from error


def _fingerprint(config: TextEncoderConfig, revision: str | None = None) -> str:
    """The encoder's `.identity["fingerprint"]`, computed without loading its weights. ConfigError: not found."""
    if config.byte_t5:
        return weights_sha256(random_byte_t5(config.byte_t5))
    assert config.path is not None
    folder = folder_of(config.path, KEY)
    if folder is None:
        try:
            return hub_commit(config.path, config.subfolder, revision)
        except OSError as error:
            raise ConfigError(f"{KEY}: {config.path} is no folder here and not found on the hub ({error})") from error
    tokenizer = folder / (config.tokenizer_subfolder or "")
    if not tokenizer.is_dir():
        raise ConfigError(f"text_encoder.tokenizer_subfolder: {folder} has no subfolder {config.tokenizer_subfolder!r}")
    # Model and tokenizer may share a folder.
    return fingerprint_folder(*dict.fromkeys((subfolder_of(folder, config.subfolder, KEY), tokenizer)))


def _single_sizes(config: TextEncoderConfig) -> dict[str, int | None]:
    """`dim`, `max_text_tokens` and `pooled_dim` of the encoder's identity, from its config.json alone. ConfigError: not
    there."""
    if config.byte_t5:
        return {
            "dim": config.width or config.byte_t5.width,
            "max_text_tokens": config.max_text_tokens,
            "pooled_dim": None,
        }
    assert config.path is not None
    try:
        settings: Any = from_pretrained(AutoConfig, config.path, subfolder=config.subfolder or "")
    except Exception as error:  # whatever transformers raises for a file that is damaged
        raise ConfigError(
            f"{KEY}: {config.path}: its config.json cannot be read ({type(error).__name__}: {error})"
        ) from error
    text = getattr(settings, "text_config", settings)  # a full CLIP has another config for its images
    pooled = text.projection_dim if _class_of(settings) is CLIPTextModelWithProjection else text.hidden_size
    return {
        "dim": config.width or int(text.hidden_size),
        "max_text_tokens": config.max_text_tokens,
        "pooled_dim": int(pooled) if config.pooled else None,
    }


def _load(
    config: TextEncoderConfig, dtype: torch.dtype, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads model and tokenizer; every weight of the model must be there.

    Loaded in `dtype`: T5 weights that are loaded as float32 and then cast to float16 are corrupted.
    """
    assert config.path is not None
    model = load_text_model(config.path, config.subfolder, dtype, KEY, revision=revision)
    return model, load_tokenizer(config.path, config.tokenizer_subfolder, KEY, revision=revision)


def load_tokenizer(path: str, subfolder: str | None, key: str, **hub: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or hub id. hub: revision, token, … ConfigError, beginning with `key`: it cannot be
    loaded."""
    where = f"{path}/{subfolder}" if subfolder else path
    try:
        return from_pretrained(AutoTokenizer, path, subfolder=subfolder or "", **{k: v for k, v in hub.items() if v})
    except Exception as error:  # whatever the tokenizers raise for files that are damaged
        raise ConfigError(
            f"{key}: {where}: its tokenizer cannot be loaded ({type(error).__name__}: {error})"
        ) from error


def load_text_model(
    path: str, subfolder: str | None, dtype: torch.dtype | None, key: str, **hub: Any
) -> PreTrainedModel:
    """The T5 or CLIP text model in a folder or hub id, strictly. dtype: None for that of its config. hub: revision,
    token, …

    ConfigError, beginning with `key`: it cannot be loaded, or a weight is missing or of another shape.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    location = {"subfolder": subfolder or "", **{k: v for k, v in hub.items() if v}}
    try:
        kind = _class_of(from_pretrained(AutoConfig, path, **location))
        # Unexpected keys are fine: a full T5 has a decoder, a full CLIP an image encoder.
        return load_pretrained(kind, path, dtype=dtype, **location)
    except Exception as error:  # whatever transformers raises for files that are damaged
        raise ConfigError(
            f"{key}: {where}: no T5 or CLIP text encoder can be loaded ({type(error).__name__}: {error})"
        ) from error


def _class_of(config: Any) -> Any:
    """The model class of a Hugging Face config; for CLIP with its projection, unless the weights have none."""
    if config.model_type not in ("clip", "clip_text_model"):
        return AutoModelForTextEncoding
    plain = "CLIPTextModel" in (config.architectures or [])
    return CLIPTextModel if plain else CLIPTextModelWithProjection


def _single_from_identity(
    identity: dict[str, Any], device: torch.device | str = "cpu", path: str | None = None
) -> TextEncoder:
    """`text_encoder_from_identity` of an identity of one encoder."""
    random = identity["byte_t5"]
    config = TextEncoderConfig(
        path=None if random else path or identity["path"],
        subfolder=identity["subfolder"],
        tokenizer_subfolder=identity["tokenizer_subfolder"],
        byte_t5=ByteT5Config(**random) if random else None,
        max_text_tokens=identity["max_text_tokens"],
        dtype=identity["dtype"],
        # Older identities lack these keys.
        layer=identity.get("layer"),
        pooled=bool(identity.get("pooled_dim")),
        keep_padding=identity.get("keep_padding", False),
        width=identity.get("width"),
    )
    encoder = _load_single(config, device, revision_of(identity, config.path))
    check_same(identity, encoder.identity, f"the text encoder {config.path or 'byte_t5'}")
    return encoder


# ------------------------------------------------------------------------------ identity of features

# Left out of an identity where they have their defaults, so that older identities stay equal.
_OPTIONAL = ("layer", "pooled", "keep_padding", "width")


def feature_identity(config: TextEncoderConfig) -> dict[str, Any]:
    """The settings and weights' fingerprint that determine the features of `config`, without loading weights.

    ConfigError: an encoder that is not found.
    """
    width = {"width": config.width} if config.width else {}
    for axis in AXES:
        if parts := getattr(config, axis):
            return {axis: [feature_identity(part) for part in parts], **width}
    options = {key: value for key in _OPTIONAL if (value := getattr(config, key))}
    return {
        "fingerprint": _fingerprint(config),
        "dtype": config.dtype,
        "max_text_tokens": config.max_text_tokens,
        **options,
    }


def feature_identity_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """`feature_identity` of the config from which the encoder with this identity was loaded."""
    width = {"width": identity["width"]} if identity.get("width") else {}
    for axis in AXES:
        if axis in identity:
            return {axis: [feature_identity_of(part) for part in identity[axis]], **width}
    settings = {**identity, "pooled": bool(identity.get("pooled_dim"))}
    options = {key: settings[key] for key in _OPTIONAL if settings.get(key)}
    return {**{key: identity[key] for key in ("fingerprint", "dtype", "max_text_tokens")}, **options}


# ---------------------------------------------------------------------------------- pipeline components


def components(encoder: Any) -> dict[str, Any]:
    """Components of a diffusers pipeline: {"text_encoder": …, "tokenizer": …, "text_encoder_2": …, …}."""
    found: dict[str, Any] = {}
    for suffix, one in zip(SUFFIXES[: len(encoder.encoders)], encoder.encoders, strict=True):
        found |= {f"text_encoder{suffix}": one.model, f"tokenizer{suffix}": one.tokenizer}
    return found


def from_components(found: Mapping[str, Any], layout: Mapping[str, Any] | None, max_text_tokens: int) -> Any:
    """The inverse of `components`; None for a pipeline without text encoders. layout: None for a single encoder with
    captions of at most `max_text_tokens`.

    ValueError: an encoder without its tokenizer, another number of encoders than the layout's, encoders that do not
    fit.
    """
    models, tokenizers = [], []
    for suffix in SUFFIXES:
        model, tokenizer = found.get(f"text_encoder{suffix}"), found.get(f"tokenizer{suffix}")
        if (model is None) != (tokenizer is None):
            raise ValueError(f"text_encoder{suffix} and tokenizer{suffix}: give both or neither")
        if model is not None:
            models.append(model)
            tokenizers.append(tokenizer)
    if not models:
        return None
    if layout is None and len(models) > 1:
        raise ValueError(f"{len(models)} text encoders: text_layout says how their features are concatenated")
    return build_encoder(layout or {"max_text_tokens": max_text_tokens}, models, tokenizers)


def build_encoder(
    layout: Mapping[str, Any], models: Sequence[PreTrainedModel], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> Any:
    """Builds the TextEncoder or TextEncoders with this `.layout` from models and tokenizers.

    ValueError: another number of models than the layout's; encoders that do not fit.
    """
    pairs = list(zip(models, tokenizers, strict=True))
    if (named := _count(layout)) != len(pairs):
        raise ValueError(f"the layout of the text encoders names {named}, the pipeline has {len(pairs)}")
    return _build(layout, iter(pairs))


def _count(layout: Mapping[str, Any]) -> int:
    parts = [part for axis in AXES for part in layout.get(axis, ())]
    return sum(map(_count, parts)) if parts else 1


def _build(layout: Mapping[str, Any], pairs: Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Any:
    for axis in AXES:
        if axis in layout:
            return TextEncoders(axis, [_build(part, pairs) for part in layout[axis]], layout.get("width"))
    model, tokenizer = next(pairs)
    return TextEncoder(model, tokenizer, **layout)
