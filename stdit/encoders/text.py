"""Text encoders: one (T5, mT5, UMT5, ByT5 or CLIP), or several whose features are concatenated.

captions --encode--> TextFeatures: features (B, L, D), mask (B, L), pooled (B, P) or None

B captions · L tokens of the batch's longest caption · D feature width · P width of the pooled vector

Stable Diffusion 3 (Esser et al. 2024) concatenates two CLIPs along the channels, and T5 to both along the tokens.
Loading, from a config or an identity: text_loading.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    UMT5EncoderModel,
)

from stdit.memory import device_memory, gib

T5 = (T5EncoderModel, MT5EncoderModel, UMT5EncoderModel)
CLIP = (CLIPTextModel, CLIPTextModelWithProjection)
# Along what the features of several encoders are concatenated.
Axis = Literal["tokens", "channels"]
AXES: tuple[Axis, ...] = ("tokens", "channels")


# ------------------------------------------------------------------------------------------ features


class TextFeatures(tuple[Tensor, Tensor]):
    """Output of a text encoder: the tuple (features, mask), with `.pooled`.

    features (B, L, D) float32, zero where masked; mask (B, L) bool, False behind a caption's last token;
    pooled (B, P) float32, one vector per caption, or None.
    """

    pooled: Tensor | None

    def __new__(cls, features: Tensor, mask: Tensor, pooled: Tensor | None = None) -> Self:
        output = super().__new__(cls, (features, mask))
        output.pooled = pooled
        return output

    def __getnewargs__(self) -> tuple[Tensor, Tensor, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self[0], self[1], self.pooled)

    @property
    def features(self) -> Tensor:
        return self[0]

    @property
    def mask(self) -> Tensor:
        return self[1]


def concat_tokens(parts: Sequence[TextFeatures]) -> TextFeatures:
    """Concatenates along the tokens: (B, L1 + L2 + …, max D). Narrower features are zero-padded; masked tokens between
    encoders are removed (Esser et al. 2024)."""
    width = max(part.features.shape[2] for part in parts)
    features = torch.cat([pad_width(part.features, width) for part in parts], dim=1)
    mask = torch.cat([part.mask for part in parts], dim=1)
    return TextFeatures(*_compact(features, mask), _concat_pooled(parts))


def concat_channels(parts: Sequence[TextFeatures], captions: Sequence[str]) -> TextFeatures:
    """Concatenates along the channels: (B, L, D1 + D2 + …). ValueError: a caption's token counts differ between
    encoders."""
    counts = torch.stack([part.mask.sum(1) for part in parts])
    if (differs := (counts != counts[0]).any(0)).any():
        wrong = int(differs.nonzero()[0])
        found = " and ".join(str(int(count)) for count in counts[:, wrong])
        raise ValueError(
            f"text_encoder.channels: caption {captions[wrong][:60]!r} has {found} tokens; side by side they must be as many "
            "(keep_padding: true makes them so)"
        )
    return TextFeatures(torch.cat([part.features for part in parts], dim=2), parts[0].mask, _concat_pooled(parts))


def pad_width(features: Tensor, width: int) -> Tensor:
    """Zero-pads features: (B, L, D) -> (B, L, width)."""
    return F.pad(features, (0, width - features.shape[2]))


def _concat_pooled(parts: Sequence[TextFeatures]) -> Tensor | None:
    vectors = [part.pooled for part in parts if part.pooled is not None]
    return torch.cat(vectors, dim=1) if vectors else None


def _compact(features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Moves each caption's unmasked tokens to the front, in order, and trims to the longest caption."""
    if mask.all():
        return features, mask
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    longest = int(mask.sum(1).max())
    order = order[:, :longest]
    return features.gather(1, order[..., None].expand(-1, -1, features.shape[2])), mask.gather(1, order)


# ------------------------------------------------------------------------------------------ encoders


class TextEncoder:
    """A frozen T5 or CLIP text model with its tokenizer. `.identity` (JSON) rebuilds it by
    `text_encoder_from_identity`.

    layer, pooled, keep_padding, width: as in TextEncoderConfig. ValueError: a setting that the model does not support.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_text_tokens: int,
        source: dict[str, Any] | None = None,
        *,
        layer: int | None = None,
        pooled: bool = False,
        keep_padding: bool = False,
        width: int | None = None,
    ) -> None:
        if not isinstance(model, T5 + CLIP):
            raise ValueError(f"{type(model).__name__} is no encoder of T5, mT5, UMT5 or ByT5, and no CLIP text encoder")
        name, config = type(model).__name__, cast(Any, model.config)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has {len(tokenizer)} tokens, "
                f"the text encoder ({name}) embeds {config.vocab_size}: they don't belong together"
            )
        if isinstance(model, CLIP) and max_text_tokens > config.max_position_embeddings:
            raise ValueError(
                f"max_text_tokens is {max_text_tokens}, {name} has positions for {config.max_position_embeddings} tokens"
            )
        if layer is not None and not -1 - config.num_hidden_layers <= layer <= -1:
            raise ValueError(f"layer is {layer}, {name} has {config.num_hidden_layers} layers")
        if pooled and not isinstance(model, CLIP):
            raise ValueError(f"pooled: {name} makes no vector of the whole caption; CLIP does")
        own = int(config.hidden_size)
        if width is not None and width < own:
            raise ValueError(f"width is {width}, the features of {name} are {own} wide")
        self.model = cast(PreTrainedModel, model.eval().requires_grad_(False))
        self.tokenizer = tokenizer
        self.max_text_tokens, self.layer, self.keep_padding = max_text_tokens, layer, keep_padding
        self.dim = width or own
        self.pooled_dim: int | None = None
        if pooled:
            self.pooled_dim = int(config.projection_dim if isinstance(model, CLIPTextModelWithProjection) else own)
        self.identity: dict[str, Any] = {
            "class": name,
            "path": None,
            "subfolder": None,
            "tokenizer_subfolder": None,
            "byte_t5": None,
            "fingerprint": None,
            **(source or {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "dim": self.dim,
            "max_text_tokens": max_text_tokens,
            "layer": layer,
            "keep_padding": keep_padding,
            "pooled_dim": self.pooled_dim,
            "width": width,
        }

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.model.dtype)

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The single encoders, in order: this one."""
        return (self,)

    @property
    def layout(self) -> dict[str, Any]:
        """Settings from which `build_encoder` rebuilds this encoder around its model and tokenizer."""
        options = {"layer": self.layer, "keep_padding": self.keep_padding, "width": self.identity["width"]}
        options = {key: value for key, value in options.items() if value}
        return {"max_text_tokens": self.max_text_tokens, **options, **({"pooled": True} if self.pooled_dim else {})}

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextFeatures:
        """TextFeatures of `captions`; L is the longest caption in tokens, at most max_text_tokens.

        Padding is masked; with keep_padding it counts as tokens, and L is max_text_tokens. Longer captions are
        truncated; an empty one has its special tokens (T5: </s>). ValueError: more memory than there is.
        """
        onload(self.model)
        padding = "max_length" if self.keep_padding else "longest"
        tokens = self.tokenizer(
            captions, padding=padding, truncation=True, max_length=self.max_text_tokens, return_tensors="pt"
        )
        self._check_memory(*tokens["input_ids"].shape)
        ids, mask = tokens["input_ids"].to(self.model.device), tokens["attention_mask"].to(self.model.device)
        if self.keep_padding:
            mask = torch.ones_like(mask)
        out = cast(Any, self.model)(
            input_ids=ids,
            attention_mask=None if self.keep_padding else mask,
            output_hidden_states=self.layer is not None,
        )
        features: Tensor = out.last_hidden_state if self.layer is None else out.hidden_states[self.layer]
        pooled: Tensor | None = None
        if self.pooled_dim:
            pooled = out.text_embeds if isinstance(self.model, CLIPTextModelWithProjection) else out.pooler_output
        features = pad_width(features.float() * mask[..., None], self.dim)
        return TextFeatures(features, mask.bool(), None if pooled is None else pooled.float())

    def _check_memory(self, captions: int, length: int) -> None:
        """ValueError: T5's attention scores of one layer, which it computes in full, do not fit."""
        heads = cast(Any, self.model.config).num_heads if isinstance(self.model, T5) else 0
        needed, available = captions * heads * length**2 * self.dtype.itemsize, device_memory(self.model.device)
        if needed > available:
            raise ValueError(
                f"text_encoder: the attention of {captions} captions of {length} tokens takes {gib(needed)} at least; there are "
                f"{gib(available)}. Lower max_text_tokens or batch_size"
            )

    def token_counts(self, captions: list[str]) -> list[int]:
        """Tokens of each caption before truncation."""
        return [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    def cuts(self, captions: list[str]) -> list[tuple[int, int] | None]:
        """(tokens, max_text_tokens) of each caption that is truncated, None for the others."""
        return [(n, self.max_text_tokens) if n > self.max_text_tokens else None for n in self.token_counts(captions)]

    def to(self, device: torch.device | str) -> TextEncoder:
        cast(torch.nn.Module, self.model).to(device)
        return self


def onload(module: Any) -> None:
    """Moves a module that enable_model_cpu_offload has offloaded back to its device."""
    if hasattr(module, "_hf_hook"):
        module._hf_hook.pre_forward(module)


class TextEncoders:
    """Several encoders with the interface of one: features concatenated along `axis`, pooled vectors along the
    channels.

    ValueError: token counts (`channels`) or widths that do not fit.
    """

    def __init__(self, axis: Axis, parts: Sequence[TextEncoder | TextEncoders], width: int | None = None) -> None:
        lengths = [part.max_text_tokens for part in parts]
        if axis == "channels" and len(set(lengths)) > 1:
            raise ValueError(
                f"text_encoder.channels: {lengths[0]} and {next(n for n in lengths if n != lengths[0])} tokens "
                "(max_text_tokens); side by side they must be as many"
            )
        widths = [part.dim for part in parts]
        own = max(widths) if axis == "tokens" else sum(widths)
        if width is not None and width < own:
            raise ValueError(f"text_encoder.width is {width}, the features of its {axis} are {own} wide")
        self.axis, self.parts = axis, tuple(parts)
        self.dim = width or own
        self.max_text_tokens = sum(lengths) if axis == "tokens" else lengths[0]
        pooled = sum(part.pooled_dim or 0 for part in parts)
        self.pooled_dim = pooled or None
        identities = [part.identity for part in parts]
        self.identity: dict[str, Any] = {
            "class": axis,
            axis: identities,
            "fingerprint": hashlib.sha256(json.dumps([i["fingerprint"] for i in identities]).encode()).hexdigest(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "dim": self.dim,
            "max_text_tokens": self.max_text_tokens,
            "pooled_dim": self.pooled_dim,
            "width": width,
        }

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest type that represents the features of every encoder."""
        found = self.parts[0].dtype
        for part in self.parts[1:]:
            found = torch.promote_types(found, part.dtype)
        return found

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        """The single encoders, in order."""
        return tuple(one for part in self.parts for one in part.encoders)

    @property
    def layout(self) -> dict[str, Any]:
        """Settings from which `build_encoder` rebuilds these encoders around their models and tokenizers."""
        width = {"width": self.identity["width"]} if self.identity["width"] else {}
        return {self.axis: [part.layout for part in self.parts], **width}

    def encode(self, captions: list[str]) -> TextFeatures:
        """As TextEncoder.encode. ValueError: a caption of which `channels` have different numbers of tokens."""
        parts = [part.encode(captions) for part in self.parts]
        joined = concat_tokens(parts) if self.axis == "tokens" else concat_channels(parts, captions)
        return TextFeatures(pad_width(joined.features, self.dim), joined.mask, joined.pooled)

    def cuts(self, captions: list[str]) -> list[tuple[int, int] | None]:
        """(tokens, max_text_tokens) of each caption that an encoder truncates (the first that does), None for the
        others."""
        found = zip(*(part.cuts(captions) for part in self.parts), strict=True)
        return [next((cut for cut in cuts if cut is not None), None) for cuts in found]

    def to(self, device: torch.device | str) -> TextEncoders:
        for part in self.parts:
            part.to(device)
        return self
