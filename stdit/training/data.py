"""Opens the data of a run and checks the config against it, before any rank, weight or GPU is set up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from diffusers.models.attention_dispatch import AttentionBackendName

from stdit.config import Bucket, Config, ConfigError, ModelConfig, latent_shape, token_grid
from stdit.config.identity import FrameSampling
from stdit.console import count_of
from stdit.data.features import EmptyCaption
from stdit.data.loader import Loader, Source, Synthetic
from stdit.data.mixture import Mixture, open_features
from stdit.diffusion.schedulers import check_sampler
from stdit.encoders.video import PixelAutoencoder, VideoEncoder
from stdit.models.cost import parameter_count
from stdit.training.adapters import check_lora_targets
from stdit.training.deepspeed_config import make_deepspeed_config
from stdit.training.derive import no_vision_features
from stdit.training.tracking import check_trackers


@dataclass(frozen=True)
class TrainData:
    """Samples of a run, and the identities of the encoders that made them."""

    source: Source
    video_encoder: dict[str, Any]  # identity (stdit.encoders.video)
    text_encoder: dict[str, Any] | None  # identity (stdit.encoders.text)
    classes: tuple[str, ...]
    fingerprint: str
    latents: dict[str, tuple[int, int, int]]  # latent (T, H, W) by bucket key
    empty_caption: EmptyCaption | None = None  # if the model needs it
    text_tokens: int = 0  # mean length of a training caption; 0: no text
    # frame rates of the videos that are trained on, the most common first: {"25": 730, "30": 12}
    frame_rates: dict[str, int] = field(default_factory=dict)
    frame_sampling: FrameSampling | None = None  # which frames of a clip were extracted


def open_data(config: Config, ranks: int | None = None) -> TrainData:
    """Opens the data of `config`. ranks: of the run, if they are known. ConfigError, with the key and both numbers,
    where model, autoencoder, text encoder, sampler or ranks do not match."""
    check_trackers(config)
    make_deepspeed_config(config.train, 1, "cpu")  # checks train.deepspeed
    _check_names(config)
    check_lora_targets(config)
    source, video, text, classes, fingerprint = _open(config)
    where = f"data.features {config.data.source_name}"
    model = config.model
    if model.in_channels != video["channels"]:
        raise ConfigError(
            f"model.in_channels is {model.in_channels}, but {where} has latents of {video['channels']} channels ({video['class']})"
        )
    _check_text(model, text, where)
    empty = _empty_caption(config, source, where)
    if model.num_classes is not None and len(classes) > model.num_classes:
        raise ConfigError(f"model.num_classes is {model.num_classes}, but {where} has {len(classes)} classes")
    if model.num_classes is not None and not classes:
        raise ConfigError(f"model.num_classes is {model.num_classes}, but {where} has no classes")
    latents = {}
    for i, bucket in enumerate(config.data.buckets):
        latents[bucket.key] = latent_shape(bucket, tuple(video["compression"]))
        name = f"data.buckets[{i}] {bucket.key}"
        tokens = math.prod(token_grid(latents[bucket.key], model.patch_size, name, model.pad_latents))
        if bucket.tokens not in (None, tokens):
            raise ConfigError(
                f"{name}: tokens is {bucket.tokens}, but a sample of this model has {tokens}; leave tokens, global_batch and "
                "batch_size out, and train.tokens_per_step gives them"
            )
        if not model.temporal and latents[bucket.key][0] > 1:
            raise ConfigError(
                f"data.buckets[{i}]: {bucket.frames} frames, but model.temporal is false: an image model takes 1"
            )
    check_sequence_parallel(config, latents, config.train.sequence_parallel if ranks is None else ranks)
    _check_control(config, source, latents)
    _check_alignment(config, source)
    if config.samples.every:
        shape = config.samples.bucket or config.data.buckets[0]
        latent = latent_shape(shape, tuple(video["compression"]))
        token_grid(latent, model.patch_size, "samples.bucket", model.pad_latents)
        try:
            check_sampler(config.samples.sampler, config.diffusion)
        except ValueError as error:
            raise ConfigError(f"samples.{error}") from error
    Loader(source, config.data, config.seed)  # checks for buckets without samples
    if config.validation.every or config.samples.every:
        ids = source.select(config.data.validation_split, config.data.buckets, config.data.where)
        if not sum(map(len, ids.values())):
            key = "validation.every" if config.validation.every else "samples.every"
            raise ConfigError(
                f"{key}: {where} holds no sample of split {config.data.validation_split!r} in this run's buckets"
            )
    return TrainData(
        source,
        video,
        text,
        classes,
        fingerprint,
        latents,
        empty,
        _text_tokens(config, source),
        _frame_rates(config, source),
        getattr(source, "frame_sampling", None),
    )


def _text_tokens(config: Config, source: Source) -> int:
    """Mean length of a training caption, in tokens; 0 for models without text."""
    if config.model.text_dim is None:
        return 0
    lengths = getattr(source, "text_lengths", None)
    if lengths is None:  # random data
        return config.model.max_text_tokens
    data = config.data
    chosen = source.select(data.train_split, data.buckets, data.where)
    return round(float(lengths(np.concatenate(list(chosen.values()))).mean()))


def check_sequence_parallel(config: Config, latents: dict[str, tuple[int, int, int]], ranks: int) -> None:
    """ConfigError: a bucket has fewer tokens, or a micro-batch of it on `ranks` ranks fewer frames, than ranks that
    share them."""
    size, model, micro_batches = config.train.sequence_parallel, config.model, config.micro_batches(ranks)
    for i, bucket in enumerate(config.data.buckets):
        t, h, w = token_grid(latents[bucket.key], model.patch_size, f"data.buckets[{i}]", model.pad_latents)
        where = f"train.sequence_parallel is {size}, but data.buckets[{i}] {bucket.key} has"
        if h * w < size:
            raise ConfigError(f"{where} {h * w} patches a frame ({h} x {w}); every rank needs one or more")
        _, accumulation, step = micro_batches[bucket.key]
        samples = step // (config.train.data_ranks(ranks) * accumulation)  # of the smallest
        if model.attention != "full" and samples * t < size:
            raise ConfigError(
                f"{where} {samples * t} frames a micro-batch (batch_size {samples}, {t} frames of "
                "patches); attention within frames needs one or more for every rank"
            )


def _check_text(model: ModelConfig, text: dict[str, Any] | None, where: str) -> None:
    """Checks the model against the text features. text: identity of the encoder, or None."""
    for key, value in (("text_dim", model.text_dim), ("pooled_dim", model.pooled_dim)):
        if value is not None and text is None:
            raise ConfigError(f"model.{key} is {value}, but {where} was extracted without a text encoder")
    if text is None:
        return
    if model.text_dim is not None and text["dim"] != model.text_dim:
        raise ConfigError(f"model.text_dim is {model.text_dim}, but {where} has text features {text['dim']} wide")
    if model.text_dim is not None and text["max_text_tokens"] > model.max_text_tokens:
        raise ConfigError(
            f"model.max_text_tokens is {model.max_text_tokens}, but {where} has captions of up to {text['max_text_tokens']} tokens"
        )
    pooled = text.get("pooled_dim")
    if model.pooled_dim is not None and pooled != model.pooled_dim:
        found = f"pooled vectors {pooled} wide" if pooled else "no pooled vectors (pooled: true of a CLIP encoder)"
        raise ConfigError(f"model.pooled_dim is {model.pooled_dim}, but {where} has {found}")


def describe_data(config: Config, data: TrainData) -> str:
    """For the log: parameters, training clips by bucket, and the buckets of the features that are not trained on."""
    line = f"{parameter_count(config.model) / 1e6:,.2f} M parameters"
    if not config.data.feature_paths:
        return f"{line}, random data"
    extracted = [Bucket.parse(key) for key in data.source.index["buckets"]]  # pyright: ignore[reportAttributeAccessIssue]
    trained = {bucket.key for bucket in config.data.buckets}
    chosen = data.source.select(config.data.train_split, extracted, config.data.where)
    clips = {key: len(ids) for key, ids in chosen.items()}
    counts = ", ".join(f"{key} {clips[key]:,}" for key in clips if key in trained)
    left_out = ", ".join(
        f"{key} ({count_of(count, 'clip')})" for key, count in clips.items() if key not in trained and count
    )
    sets = ""
    if isinstance(data.source, Mixture):
        found = [len(part) for part in data.source.split(np.sort(np.concatenate([chosen[key] for key in trained])))]
        weights = data.source.weights or found
        named = zip(data.source.names, weights, found, strict=True)
        shares = (f"{name} {w / sum(weights):.1%} of the samples ({count_of(n, 'clip')})" for name, w, n in named)
        sets = f"; sets: {', '.join(shares)}"
    return f"{line}; training clips by bucket: {counts}{sets}" + (f"; not trained on: {left_out}" if left_out else "")


def describe_sets(samples: Mapping[str, int]) -> str:
    """For the end of the log: what a mixture's sets have given. samples: by set; empty for one set."""
    total = max(1, sum(samples.values()))
    return "samples by set: " * bool(samples) + ", ".join(
        f"{name} {n:,} ({n / total:.1%})" for name, n in samples.items()
    )


def _frame_rates(config: Config, source: Source) -> dict[str, int]:
    """Frame rates of the training clips of more than one frame, by their number."""
    count = getattr(source, "frame_rates", None)
    if count is None:  # random data
        return {}
    ids = source.select(config.data.train_split, [b for b in config.data.buckets if b.frames > 1], config.data.where)
    return count(np.concatenate([*ids.values(), np.empty(0, np.int64)]))


def _empty_caption(config: Config, source: Source, where: str) -> EmptyCaption | None:
    """Features of "", if they are this run's null caption. ConfigError: the extraction has none."""
    model, samples = config.model, config.samples
    if model.text_dim is None or model.null_text != "empty":
        return None
    found: EmptyCaption | None = getattr(source, "empty_caption", None)
    if found is not None:
        return found
    guides = samples.every is not None and samples.sampler.guidance_scale != 1
    for key, value in (("caption_dropout", config.diffusion.caption_dropout), ("guidance_scale", int(guides))):
        if value:
            what = f"diffusion.{key} is {value}" if key == "caption_dropout" else f"samples.sampler.{key} is not 1"
            raise ConfigError(
                f"model.null_text is empty and {what}: this needs the text encoder's features of an empty caption, which "
                f"{where} does not have; run its extraction again, which adds them"
            )
    return None


def _check_names(config: Config) -> None:
    """Checks settings that name things outside the config."""
    backends = [b.value for b in AttentionBackendName]
    if config.train.attention_backend not in (None, *backends):
        raise ConfigError(
            f"train.attention_backend: {config.train.attention_backend!r} is none of diffusers': {', '.join(backends)}"
        )
    # A run that is resumed no longer needs its initial weights.
    if config.init is not None and not (config.run_dir / "checkpoints").exists():
        source = config.init.source
        if not any((source / name).exists() for name in ("config.json", "identity.json", "checkpoints")):
            raise ConfigError(
                f"init.source: {source}: no config.json of a diffusers model, no checkpoint and no run directory"
            )


def _check_control(config: Config, source: Source, latents: dict[str, tuple[int, int, int]]) -> None:
    """Checks that the data has the control branch's condition."""
    control = config.train.control
    if control is None:
        return
    if control.condition == "paired" and not getattr(source, "has_control", False):
        raise ConfigError(
            f"train.control.condition is paired, but data.features {config.data.source_name} holds no conditions: "
            "extract with control_column, or take first_frame or low_resolution"
        )
    for key, (_, h, w) in latents.items():
        if control.condition == "low_resolution" and (h % control.factor or w % control.factor):
            raise ConfigError(
                f"train.control.factor {control.factor} does not divide bucket {key}'s latents, {h}x{w} (height x width)"
            )
    shape = config.samples.bucket
    if config.samples.every and shape is not None and shape.key not in latents:
        raise ConfigError(
            f"samples.bucket {shape.key}: samples use the conditions of clips, which have {', '.join(latents)}"
        )


def _check_alignment(config: Config, source: Source) -> None:
    """Checks that the data has the features that tokens are aligned to."""
    alignment = config.train.alignment
    if alignment is None or alignment.target == "latents":
        return
    vision = getattr(source, "vision_encoder", None)
    if vision is None and not isinstance(source, Synthetic):
        raise ConfigError(no_vision_features(config))
    if vision is not None and vision["dim"] != alignment.features_dim:
        raise ConfigError(
            f"train.alignment.features_dim is {alignment.features_dim}, but data.features {config.data.source_name} has features of "
            f"{vision['class']}, {vision['dim']} wide"
        )


def _open(config: Config) -> tuple[Source, dict[str, Any], dict[str, Any] | None, tuple[str, ...], str]:
    """Source, identities, classes and fingerprint of `data.features`."""
    model, alignment = config.model, config.train.alignment
    if config.data.feature_paths:
        features = open_features(config.data, alignment is not None and alignment.target == "features")
        return (
            features,
            features.video_encoder,
            features.text_encoder,
            tuple(features.classes),
            features.index["fingerprint"],
        )
    source = Synthetic(
        model.in_channels, model.num_classes, model.text_dim, model.max_text_tokens, model.pooled_dim,
        alignment and alignment.features_dim,
    )  # fmt: skip
    if model.in_channels in (1, 3):
        video = VideoEncoder(PixelAutoencoder(model.in_channels)).identity
    else:
        # Latents of no autoencoder: trainable, not decodable.
        ones = [1.0] * model.in_channels
        video = {
            "kind": "synthetic",
            "class": "none",
            "channels": model.in_channels,
            "compression": [1, 1, 1],
            "shift": [0.0] * model.in_channels,
            "scale": ones,
        }
    text = None
    if model.text_dim is not None or model.pooled_dim is not None:
        text = {"class": "synthetic", "dim": model.text_dim, "max_text_tokens": source.max_text_tokens}
        text["pooled_dim"] = model.pooled_dim
    return source, video, text, tuple(str(n) for n in range(model.num_classes or 0)), "synthetic"
