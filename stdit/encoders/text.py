"""T5 text encoders: T5, mT5, UMT5 and ByT5 by folder or hub id, and a random ByT5 with nothing to download.

captions --encode--> features (B, L, D), mask (B, L): L is the longest caption of the batch, in tokens
"""

from __future__ import annotations

import hashlib
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoModelForTextEncoding,
    AutoTokenizer,
    ByT5Tokenizer,
    MT5EncoderModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5EncoderModel,
    UMT5EncoderModel,
)

from stdit.config import ByteT5Config, ConfigError, TextEncoderConfig
from stdit.encoders.source import check_same, fingerprint_folder, folder_of, hub_commit, revision_of, subfolder_of

# The setting that messages name.
KEY = "text_encoder.path"


class TextEncoder:
    """A T5 encoder with its tokenizer. `.identity` is JSON, and rebuilds it by `text_encoder_from_identity`."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        max_tokens: int,
        source: dict[str, Any] | None = None,
    ) -> None:
        if not isinstance(model, T5EncoderModel | MT5EncoderModel | UMT5EncoderModel):
            raise ValueError(f"{type(model).__name__} is no encoder of T5, mT5, UMT5 or ByT5")
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer ({type(tokenizer).__name__}) has {len(tokenizer)} tokens, "
                f"the text encoder ({type(model).__name__}) embeds {model.config.vocab_size}: they don't belong together"
            )
        self.model = cast(PreTrainedModel, model.eval().requires_grad_(False))
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.dim = int(model.config.d_model)
        self.identity: dict[str, Any] = {
            "class": type(model).__name__,
            "path": None,
            "subfolder": None,
            "tokenizer_subfolder": None,
            "byte_t5": None,
            "fingerprint": None,
            **(source or {}),
            "dtype": str(model.dtype).removeprefix("torch."),
            "dim": self.dim,
            "max_tokens": max_tokens,
        }

    @property
    def dtype(self) -> torch.dtype:
        return cast(torch.dtype, self.model.dtype)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(features (B, L, D) float32, mask (B, L) bool): L is the longest of `captions` in tokens, at most max_tokens.

        Padding has mask False and features zero. A longer caption is cut; an empty one has the one token </s>.
        """
        tokens = self.tokenizer(
            captions, padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = tokens["input_ids"].to(self.model.device), tokens["attention_mask"].to(self.model.device)
        features = cast(Any, self.model)(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return features * mask[..., None], mask.bool()

    def token_counts(self, captions: list[str]) -> list[int]:
        """Tokens of each caption before it is cut to max_tokens."""
        return [len(ids) for ids in self.tokenizer(captions, truncation=False, verbose=False)["input_ids"]]

    def to(self, device: torch.device | str) -> TextEncoder:
        cast(torch.nn.Module, self.model).to(device)
        return self


def random_byte_t5(config: ByteT5Config) -> T5EncoderModel:
    """A frozen T5 encoder over bytes whose weights follow from `config` alone, on any machine and library version.

    Variances are those of T5's own initialisation (Raffel et al. 2020; attention without 1/sqrt(d), so q
    takes it), norms are one. Drawn uniformly from PCG64's raw stream: normal numbers pass through log and
    sqrt, which differ in the last bit between CPUs, and the weights' SHA-256 stands in every checkpoint.
    """
    if config.width % config.num_heads:
        raise ConfigError(f"text_encoder.byte_t5.width {config.width} is not divisible by num_heads {config.num_heads}")
    head = config.width // config.num_heads
    # ByT5's vocabulary: 256 bytes, 3 special tokens, 125 unused.
    settings = T5Config(
        vocab_size=384, d_model=config.width, d_kv=head, d_ff=2 * config.width, num_layers=config.depth, num_heads=config.num_heads,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng([]):  # the constructor draws weights, which are replaced below
        model = T5EncoderModel(settings)
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(1.0)
            continue
        std = config.initializer_factor
        if not name.startswith("shared"):
            fan_in = config.width if "relative_attention_bias" in name else weight.shape[1]
            std *= (fan_in * (head if name.endswith(".q.weight") else 1)) ** -0.5
        key = int.from_bytes(hashlib.blake2b(f"{config.seed}\0{name}".encode(), digest_size=8).digest(), "little")
        uniform = np.random.Generator(np.random.PCG64(key)).random(tuple(weight.shape), dtype=np.float32)
        weight.data.copy_(torch.from_numpy((uniform * 2 - 1) * np.float32(3**0.5 * std)))
    return model


def weights_sha256(model: torch.nn.Module) -> str:
    """Hex SHA-256 over names and bytes of the parameters."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}\0".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_text_encoder(
    config: TextEncoderConfig, device: torch.device | str = "cpu", revision: str | None = None
) -> TextEncoder:
    """The text encoder that `config` names. `revision`: a commit of the hub.

    ConfigError: the path is no folder and not on the hub, holds no T5 encoder, lacks weights or tokenizer.
    """
    dtype = getattr(torch, config.dtype)
    if config.byte_t5:
        random = random_byte_t5(config.byte_t5)
        source = {"byte_t5": config.byte_t5.model_dump(mode="json"), "fingerprint": weights_sha256(random)}
        return TextEncoder(
            random.to(dtype), cast(PreTrainedTokenizerBase, ByT5Tokenizer()), config.max_tokens, source
        ).to(device)
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
        return TextEncoder(model, tokenizer, config.max_tokens, source).to(device)
    except ValueError as error:
        raise ConfigError(f"{KEY}: {config.path}: {error}") from error


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


def _load(
    config: TextEncoderConfig, dtype: torch.dtype, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, with every weight the model has.

    Loaded with the dtype: T5 weights read as float32 and cast to float16 afterwards are corrupted.
    """
    assert config.path is not None
    where: dict[str, Any] = {"revision": revision} if revision else {}
    try:
        model, info = AutoModelForTextEncoding.from_pretrained(
            config.path, subfolder=config.subfolder or "", dtype=dtype, output_loading_info=True, **where
        )
        tokenizer = AutoTokenizer.from_pretrained(config.path, subfolder=config.tokenizer_subfolder or "", **where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"{KEY}: {config.path}: no T5 encoder with its tokenizer can be loaded ({error})") from error
    # A whole T5's decoder is rightly left over; a missing weight would be a random one.
    wrong = {k: info[k] for k in ("missing_keys", "mismatched_keys") if info[k]}
    if wrong:
        raise ConfigError(
            f"{KEY}: {config.path}: the weights do not fit: "
            + "; ".join(f"{k}: {sorted(map(str, v))}" for k, v in wrong.items())
        )
    return model, tokenizer


def text_encoder_from_identity(
    identity: dict[str, Any], device: torch.device | str = "cpu", path: str | None = None
) -> TextEncoder:
    """The encoder that made features of this `identity`. `path`: where its folder lies now, if elsewhere.

    ConfigError: gone, or no longer the same weights; the message says what differs.
    """
    random = identity["byte_t5"]
    config = TextEncoderConfig(
        path=None if random else path or identity["path"],
        subfolder=identity["subfolder"],
        tokenizer_subfolder=identity["tokenizer_subfolder"],
        byte_t5=ByteT5Config(**random) if random else None,
        max_tokens=identity["max_tokens"],
        dtype=identity["dtype"],
    )
    encoder = load_text_encoder(config, device, revision_of(identity, config.path))
    check_same(identity, encoder.identity, f"the text encoder {config.path or 'byte_t5'}")
    return encoder
