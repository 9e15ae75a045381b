"""Tiny random encoders in folders: of text, as pipelines of diffusers lie, two CLIPs of unlike width and T5; vision
transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from stdit.config import TextEncoderConfig

CAPTIONS = ["the digit seven moves left", "", "two", "a caption that no CLIP here takes whole " * 3]
# Positions of the tiny CLIPs, as 77 of the published ones.
LENGTH = 20
# Widths of features: the CLIPs' side by side are narrower than T5's, as in SD3.
L, G, T5 = 16, 24, 48


def clip_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """A letter a token. pad: CLIP-L's own; CLIP-G is padded with `!`."""
    letters = [chr(i) for i in range(33, 127)]
    names = [name for letter in letters for name in (letter, f"{letter}</w>")] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {name: number for number, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH, pad_token=pad)


def save_clip(folder: Path, width: int, kind: Any = CLIPTextModelWithProjection, pad: str = "<|endoftext|>") -> None:
    """A CLIP of three layers into folder/text_encoder…, and its tokenizer beside it."""
    tokenizer = clip_tokenizer(pad)
    config = cast(Any, CLIPTextConfig)(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=LENGTH, projection_dim=width + 4, hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng([]):
        torch.manual_seed(width)
        kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))


def save_t5(folder: Path) -> None:
    settings: dict[str, Any] = {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 384}
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        T5EncoderModel(T5Config(d_model=T5, **settings)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder.with_name(folder.name.replace("text_encoder", "tokenizer")))


VISION_WIDTH = 16


def save_vision(folder: Path, kind: str = "dinov2", patch: int = 2, width: int = VISION_WIDTH) -> Path:
    """A tiny random vision transformer of positions for 8 x 8 px, with its preprocessor's mean and deviation."""
    size: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": patch,
    }
    kinds: dict[str, tuple[Any, Any]] = {
        "dinov2": (Dinov2Model, lambda: Dinov2Config(mlp_ratio=2, **size)),
        "registers": (Dinov2WithRegistersModel, lambda: Dinov2WithRegistersConfig(mlp_ratio=2, **size)),
        "siglip": (SiglipVisionModel, lambda: SiglipVisionConfig(intermediate_size=32, **size)),
        "clip": (CLIPVisionModel, lambda: CLIPVisionConfig(intermediate_size=32, **size)),
    }
    model, config = kinds[kind]
    with torch.random.fork_rng([]):
        torch.manual_seed(width)
        made = model(config())
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    made.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]})
    )
    return folder


def one(folder: Path, suffix: str, **settings: Any) -> dict[str, Any]:
    """What a config says of an encoder in a pipeline's folder."""
    place = {"path": str(folder), "subfolder": f"text_encoder{suffix}", "tokenizer_subfolder": f"tokenizer{suffix}"}
    return {**place, "max_text_tokens": LENGTH, **settings}


def sd3(folder: Path, tokens: int = 30) -> TextEncoderConfig:
    """Stable Diffusion 3's three encoders in `folder`, made there unless they are."""
    if not (folder / "text_encoder").exists():
        save_clip(folder / "text_encoder", L)
        save_clip(folder / "text_encoder_2", G, pad="!")
        save_t5(folder / "text_encoder_3")
    clip = {"layer": -2, "pooled": True, "keep_padding": True}
    parts = [
        {"channels": [one(folder, "", **clip), one(folder, "_2", **clip)]},
        one(folder, "_3", max_text_tokens=tokens, keep_padding=True),
    ]
    return TextEncoderConfig.model_validate({"tokens": parts})
