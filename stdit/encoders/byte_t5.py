"""A frozen T5 encoder over bytes whose weights are drawn, not learned: text features with nothing to download."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from transformers import T5Config, T5EncoderModel

from stdit.config import ByteT5Config, ConfigError
from stdit.memory import check_fits

# Standard deviation of the position bias: heads attend to a few of the letters around, as trained ones do.
POSITION_BIAS = 2.0


def random_byte_t5(config: ByteT5Config) -> T5EncoderModel:
    """A frozen T5 encoder over bytes whose weights follow from `config` alone, on any machine and library version.

    Variances are those of T5's own initialisation (Raffel et al. 2020; attention without 1/sqrt(d), so q takes it), but
    for the position bias: T5's is too small to matter before training, and a caption would be its letters in any
    order. Norms are one. Drawn uniformly from PCG64's raw stream: normal numbers pass through log and sqrt, which
    differ in the last bit between CPUs, and the weights' SHA-256 stands in every checkpoint.
    """
    check_byte_t5(config)
    head = config.width // config.num_heads
    with torch.random.fork_rng([]):  # the constructor draws weights, which are replaced below
        model = T5EncoderModel(_settings(config))
    for name, weight in model.named_parameters():
        if weight.ndim == 1:
            weight.data.fill_(1.0)
            continue
        std = config.initializer_factor
        if "relative_attention_bias" in name:
            std *= POSITION_BIAS
        elif not name.startswith("shared"):
            std *= (weight.shape[1] * (head if name.endswith(".q.weight") else 1)) ** -0.5
        key = int.from_bytes(hashlib.blake2b(f"{config.seed}\0{name}".encode(), digest_size=8).digest(), "little")
        uniform = np.random.Generator(np.random.PCG64(key)).random(tuple(weight.shape), dtype=np.float32)
        weight.data.copy_(torch.from_numpy((uniform * 2 - 1) * np.float32(3**0.5 * std)))
    return model


def check_byte_t5(config: ByteT5Config) -> None:
    """ConfigError: widths that do not divide, or weights that this machine's memory does not hold."""
    if config.width % config.num_heads:
        raise ConfigError(f"text_encoder.byte_t5.width {config.width} is not divisible by num_heads {config.num_heads}")
    with torch.device("meta"):
        parameters = T5EncoderModel(_settings(config)).num_parameters()
    check_fits(
        f"text_encoder.byte_t5: width {config.width} and depth {config.depth} are {parameters / 1e6:,.0f} M parameters, which take",
        4 * parameters,
    )


def _settings(config: ByteT5Config) -> T5Config:
    # ByT5's vocabulary: 256 bytes, 3 special tokens, 125 unused.
    return T5Config(
        vocab_size=384, d_model=config.width, d_kv=config.width // config.num_heads, d_ff=2 * config.width, num_layers=config.depth,
        num_heads=config.num_heads, dropout_rate=0.0, feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip


def weights_sha256(model: torch.nn.Module) -> str:
    """Hex SHA-256 over names and bytes of the parameters."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}\0".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
