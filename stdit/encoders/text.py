"""Text encoders, one or several whose features are concatenated: loaded from a config or from an identity.

captions --encode--> features (B, L, D), mask (B, L), pooled (B, P) or None: L is the longest caption of the batch, in tokens

Stable Diffusion 3 (Esser et al. 2024) joins two CLIPs along the channels, and T5 to both along the tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stdit.config import MOST_TEXT_ENCODERS, ConfigError, TextEncoderConfig
from stdit.encoders import single
from stdit.encoders.byte_t5 import random_byte_t5
from stdit.encoders.encoded import Encoded, along_channels, along_tokens, widened
from stdit.encoders.single import TextEncoder, fingerprint, load_one, one_from_identity

__all__ = [
    "Encoded",
    "TextEncoder",
    "TextEncoders",
    "components",
    "decisive",
    "decisive_of",
    "encoder_of",
    "feature_sizes",
    "load_text_encoder",
    "of_components",
    "random_byte_t5",
    "text_encoder_from_identity",
]

# Of the names of a pipeline's components.
SUFFIXES = ("", *(f"_{number}" for number in range(2, MOST_TEXT_ENCODERS + 1)))
Way = Literal["tokens", "channels"]
WAYS: tuple[Way, ...] = ("tokens", "channels")


class TextEncoders:
    """Several encoders as one: features one after another (`tokens`) or side by side (`channels`), pooled vectors side by side.

    Has what a TextEncoder has. ValueError: parts that do not fit together, with both numbers.
    """

    def __init__(self, way: Way, parts: Sequence[TextEncoder | TextEncoders], width: int | None = None) -> None:
        lengths = [part.max_text_tokens for part in parts]
        if way == "channels" and len(set(lengths)) > 1:
            raise ValueError(
                f"text_encoder.channels: {lengths[0]} and {next(n for n in lengths if n != lengths[0])} tokens "
                "(max_text_tokens); side by side they must be as many"
            )
        widths = [part.dim for part in parts]
        own = max(widths) if way == "tokens" else sum(widths)
        if width is not None and width < own:
            raise ValueError(f"text_encoder.width is {width}, the features of its {way} are {own} wide")
        self.way, self.parts = way, tuple(parts)
        self.dim = width or own
        self.max_text_tokens = sum(lengths) if way == "tokens" else lengths[0]
        pooled = sum(part.pooled_dim or 0 for part in parts)
        self.pooled_dim = pooled or None
        identities = [part.identity for part in parts]
        self.identity: dict[str, Any] = {
            "class": way,
            way: identities,
            "fingerprint": hashlib.sha256(json.dumps([i["fingerprint"] for i in identities]).encode()).hexdigest(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dim": self.dim,
            "max_text_tokens": self.max_text_tokens,
            "pooled_dim": self.pooled_dim,
            "width": width,
        }

    @property
    def dtype(self) -> torch.dtype:
        """Holds what each of them makes."""
        found = self.parts[0].dtype
        for part in self.parts[1:]:
            found = torch.promote_types(found, part.dtype)
        return found

    @property
    def each(self) -> tuple[TextEncoder, ...]:
        """The single encoders, in order."""
        return tuple(one for part in self.parts for one in part.each)

    @property
    def layout(self) -> dict[str, Any]:
        """What `encoder_of` takes, besides models and tokenizers, to make this encoder."""
        width = {"width": self.identity["width"]} if self.identity["width"] else {}
        return {self.way: [part.layout for part in self.parts], **width}

    def encode(self, captions: list[str]) -> Encoded:
        """As TextEncoder.encode. ValueError: a caption of which `channels` have different numbers of tokens."""
        parts = [part.encode(captions) for part in self.parts]
        made = along_tokens(parts) if self.way == "tokens" else along_channels(parts, captions)
        return Encoded(widened(made.features, self.dim), made.mask, made.pooled)

    def cuts(self, captions: list[str]) -> list[tuple[int, int] | None]:
        """(tokens, max_text_tokens) of each caption that an encoder cuts (of the first that does), None for the others."""
        found = zip(*(part.cuts(captions) for part in self.parts), strict=True)
        return [next((cut for cut in cuts if cut is not None), None) for cuts in found]

    def to(self, device: torch.device | str) -> TextEncoders:
        for part in self.parts:
            part.to(device)
        return self


def load_text_encoder(
    config: TextEncoderConfig, device: torch.device | str = "cpu", revision: str | None = None
) -> Any:
    """The text encoder, or encoders, that `config` names: a TextEncoder or TextEncoders. `revision`: a commit of the hub.

    ConfigError: a path is no folder and not on the hub, holds no encoder, lacks weights or tokenizer; a setting that does
    not fit its encoder, or the others.
    """
    if not config.parts:
        return load_one(config, device, revision)
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
    """The encoder, or encoders, that made features of this `identity`. `path`: where a single one's folder lies now, if elsewhere.

    ConfigError: gone, or no longer the same weights; the message says what differs.
    """
    for way in WAYS:
        if way in identity:
            parts = [text_encoder_from_identity(part, device) for part in identity[way]]
            return TextEncoders(way, parts, identity["width"])
    return one_from_identity(identity, device, path)


def feature_sizes(config: TextEncoderConfig) -> dict[str, int | None]:
    """`dim`, `max_text_tokens` and `pooled_dim` of the identity that the encoder of `config` will have, without loading weights.

    ConfigError: an encoder that is not there.
    """
    if not config.parts:
        return single.feature_sizes(config)
    parts = [feature_sizes(part) for part in config.parts]
    widths = [part["dim"] or 0 for part in parts]
    return {
        "dim": config.width or (max(widths) if config.tokens else sum(widths)),
        "max_text_tokens": config.longest,
        "pooled_dim": sum(part["pooled_dim"] or 0 for part in parts) or None,
    }


# ------------------------------------------------------------------------------ what decides features

# Settings that came later; an encoder that has them at their defaults is told from others by the rest.
_LATER = ("layer", "pooled", "keep_padding", "width")


def decisive(config: TextEncoderConfig) -> dict[str, Any]:
    """What of `config` decides features, without loading weights. ConfigError: an encoder that is not there."""
    own = {"width": config.width} if config.width else {}
    for way in WAYS:
        if parts := getattr(config, way):
            return {way: [decisive(part) for part in parts], **own}
    later = {key: value for key in _LATER if (value := getattr(config, key))}
    return {
        "fingerprint": fingerprint(config),
        "dtype": config.dtype,
        "max_text_tokens": config.max_text_tokens,
        **later,
    }


def decisive_of(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What `decisive` says of the config that the encoder of this identity was loaded from."""
    own = {"width": identity["width"]} if identity.get("width") else {}
    for way in WAYS:
        if way in identity:
            return {way: [decisive_of(part) for part in identity[way]], **own}
    said = {**identity, "pooled": bool(identity.get("pooled_dim"))}
    later = {key: said[key] for key in _LATER if said.get(key)}
    return {**{key: identity[key] for key in ("fingerprint", "dtype", "max_text_tokens")}, **later}


# ---------------------------------------------------------------------------------- from a pipeline's


def components(encoder: Any) -> dict[str, Any]:
    """{"text_encoder": …, "tokenizer": …, "text_encoder_2": …, …} of an encoder, or encoders, as diffusers' pipelines have them."""
    found: dict[str, Any] = {}
    for suffix, one in zip(SUFFIXES, encoder.each, strict=False):
        found |= {f"text_encoder{suffix}": one.model, f"tokenizer{suffix}": one.tokenizer}
    return found


def of_components(found: Mapping[str, Any], layout: Mapping[str, Any] | None, max_text_tokens: int) -> Any:
    """The encoder, or encoders, of a pipeline's components (`components`); None where it has none. layout: None for one
    encoder whose captions are cut at `max_text_tokens`.

    ValueError: an encoder without its tokenizer, not as many as the layout names, what does not fit together.
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
    return encoder_of(layout or {"max_text_tokens": max_text_tokens}, models, tokenizers)


def encoder_of(
    layout: Mapping[str, Any], models: Sequence[PreTrainedModel], tokenizers: Sequence[PreTrainedTokenizerBase]
) -> Any:
    """The encoder, or encoders, of these models. layout: its own, `.layout`.

    ValueError: not as many as the layout names; what does not fit together, with both numbers.
    """
    pairs = list(zip(models, tokenizers, strict=True))
    if (named := _count(layout)) != len(pairs):
        raise ValueError(f"the layout of the text encoders names {named}, the pipeline has {len(pairs)}")
    return _built(layout, iter(pairs))


def _count(layout: Mapping[str, Any]) -> int:
    parts = [part for way in WAYS for part in layout.get(way, ())]
    return sum(map(_count, parts)) if parts else 1


def _built(layout: Mapping[str, Any], pairs: Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]) -> Any:
    for way in WAYS:
        if way in layout:
            return TextEncoders(way, [_built(part, pairs) for part in layout[way]], layout.get("width"))
    model, tokenizer = next(pairs)
    return TextEncoder(model, tokenizer, **layout)
