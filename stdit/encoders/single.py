"""One text encoder: T5, mT5, UMT5, ByT5 or CLIP by folder or hub id, or a random ByT5 with nothing to download.

captions --encode--> features (B, L, D), mask (B, L), pooled (B, P) or None: L is the longest caption of the batch, in tokens
"""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForTextEncoding,
    AutoTokenizer,
    ByT5Tokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5EncoderModel,
    UMT5EncoderModel,
)

from stdit.config import ByteT5Config, ConfigError, TextEncoderConfig
from stdit.encoders.byte_t5 import random_byte_t5, weights_sha256
from stdit.encoders.encoded import Encoded, widened
from stdit.encoders.source import check_same, fingerprint_folder, folder_of, hub_commit, revision_of, subfolder_of

# The setting that messages name.
KEY = "text_encoder.path"

T5 = (T5EncoderModel, MT5EncoderModel, UMT5EncoderModel)
CLIP = (CLIPTextModel, CLIPTextModelWithProjection)


class TextEncoder:
    """One encoder with its tokenizer. `.identity` is JSON, and rebuilds it by `text_encoder_from_identity`.

    layer, pooled, keep_padding, width: as in TextEncoderConfig. ValueError: what this model has not, with both numbers.
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
            raise ValueError(
                f"{type(model).__name__} is no encoder of T5, mT5, UMT5 or ByT5, and no text encoder of CLIP"
            )
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
    def each(self) -> tuple[TextEncoder, ...]:
        """The single encoders, in order: this one."""
        return (self,)

    @property
    def layout(self) -> dict[str, Any]:
        """What `encoder_of` takes, besides model and tokenizer, to make this encoder."""
        given = {"layer": self.layer, "keep_padding": self.keep_padding, "width": self.identity["width"]}
        said = {key: value for key, value in given.items() if value}
        return {"max_text_tokens": self.max_text_tokens, **said, **({"pooled": True} if self.pooled_dim else {})}

    @torch.no_grad()
    def encode(self, captions: list[str]) -> Encoded:
        """(features (B, L, D) float32, mask (B, L) bool), and `.pooled`: L is the longest of `captions` in tokens, at
        most max_text_tokens.

        Padding has mask False and features zero, or with keep_padding is a token like the others, and L is max_text_tokens.
        A longer caption is cut; an empty one has the tokens that stand at every caption's ends (T5: </s>).
        """
        wake(self.model)
        padding = "max_length" if self.keep_padding else "longest"
        tokens = self.tokenizer(
            captions, padding=padding, truncation=True, max_length=self.max_text_tokens, return_tensors="pt"
        )
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
        features = widened(features.float() * mask[..., None], self.dim)
        return Encoded(features, mask.bool(), None if pooled is None else pooled.float())

    def token_counts(self, captions: list[str]) -> list[int]:
        """Tokens of each caption before it is cut to max_text_tokens."""
        return [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    def cuts(self, captions: list[str]) -> list[tuple[int, int] | None]:
        """(tokens, max_text_tokens) of each caption that is cut, None for the others."""
        return [(n, self.max_text_tokens) if n > self.max_text_tokens else None for n in self.token_counts(captions)]

    def to(self, device: torch.device | str) -> TextEncoder:
        cast(torch.nn.Module, self.model).to(device)
        return self


def wake(module: Any) -> None:
    """Fetches a module that a pipeline's enable_model_cpu_offload has put aside: its inputs are put where it lies."""
    if hasattr(module, "_hf_hook"):
        module._hf_hook.pre_forward(module)


# ------------------------------------------------------------------------------------------ loading


def load_one(config: TextEncoderConfig, device: torch.device | str = "cpu", revision: str | None = None) -> TextEncoder:
    """The single text encoder that `config` names. `revision`: a commit of the hub.

    ConfigError: the path is no folder and not on the hub, holds no encoder, lacks weights or tokenizer; a setting that
    does not fit the encoder.
    """
    dtype = getattr(torch, config.dtype)
    source: dict[str, Any]
    if config.byte_t5:
        model: PreTrainedModel = random_byte_t5(config.byte_t5)
        tokenizer = cast(PreTrainedTokenizerBase, ByT5Tokenizer())
        source = {"byte_t5": config.byte_t5.model_dump(mode="json"), "fingerprint": weights_sha256(model)}
        model = cast(Any, model).to(dtype)
    else:
        assert config.path is not None
        found, folder = fingerprint(config, revision), folder_of(config.path, KEY)
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


def fingerprint(config: TextEncoderConfig, revision: str | None = None) -> str:
    """What `.identity["fingerprint"]` of the encoder will be, without loading its weights. ConfigError: it is not there."""
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
    # Once, where both lie in one folder.
    return fingerprint_folder(*dict.fromkeys((subfolder_of(folder, config.subfolder, KEY), tokenizer)))


def feature_sizes(config: TextEncoderConfig) -> dict[str, int | None]:
    """`dim`, `max_text_tokens` and `pooled_dim` of the encoder's identity, from its config.json alone. ConfigError: not there."""
    if config.byte_t5:
        return {
            "dim": config.width or config.byte_t5.width,
            "max_text_tokens": config.max_text_tokens,
            "pooled_dim": None,
        }
    assert config.path is not None
    try:
        settings: Any = AutoConfig.from_pretrained(
            config.path, subfolder=config.subfolder or "", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {config.path}: its config.json cannot be read ({error})") from error
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
    """Model and tokenizer, with every weight the model has.

    Loaded with the dtype: T5 weights read as float32 and cast to float16 afterwards are corrupted.
    """
    assert config.path is not None
    where: dict[str, Any] = {"revision": revision} if revision else {}
    place = {"subfolder": config.subfolder or "", **where}
    try:
        kind = _class_of(AutoConfig.from_pretrained(config.path, **place))
        model, info = kind.from_pretrained(config.path, dtype=dtype, output_loading_info=True, **place)
        tokenizer = AutoTokenizer.from_pretrained(config.path, subfolder=config.tokenizer_subfolder or "", **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(
            f"{KEY}: {config.path}: no T5 encoder with its tokenizer can be loaded, and none of CLIP ({error})"
        ) from error
    # A whole T5's decoder (a whole CLIP's eyes) is rightly left over; a missing weight would be a random one.
    wrong = {k: info[k] for k in ("missing_keys", "mismatched_keys") if info[k]}
    if wrong:
        raise ConfigError(
            f"{KEY}: {config.path}: the weights do not fit: "
            + "; ".join(f"{k}: {sorted(map(str, v))}" for k, v in wrong.items())
        )
    return model, tokenizer


def _class_of(config: Any) -> Any:
    """The class that reads the weights of `config`; CLIP's with the projection wherever the weights have one."""
    if config.model_type not in ("clip", "clip_text_model"):
        return AutoModelForTextEncoding
    plain = "CLIPTextModel" in (config.architectures or [])
    return CLIPTextModel if plain else CLIPTextModelWithProjection


def one_from_identity(
    identity: dict[str, Any], device: torch.device | str = "cpu", path: str | None = None
) -> TextEncoder:
    """The single encoder that made features of this `identity`. `path`: where its folder lies now, if elsewhere.

    ConfigError: gone, or no longer the same weights; the message says what differs.
    """
    random = identity["byte_t5"]
    config = TextEncoderConfig(
        path=None if random else path or identity["path"],
        subfolder=identity["subfolder"],
        tokenizer_subfolder=identity["tokenizer_subfolder"],
        byte_t5=ByteT5Config(**random) if random else None,
        max_text_tokens=identity["max_text_tokens"],
        dtype=identity["dtype"],
        # Identities from before these were, have them at their defaults.
        layer=identity.get("layer"),
        pooled=bool(identity.get("pooled_dim")),
        keep_padding=identity.get("keep_padding", False),
        width=identity.get("width"),
    )
    encoder = load_one(config, device, revision_of(identity, config.path))
    check_same(identity, encoder.identity, f"the text encoder {config.path or 'byte_t5'}")
    return encoder
