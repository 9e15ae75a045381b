"""Settings that a config leaves out because its features determine them.

    config = complete(config)                  # opens data.features if something is left out
    config = derive(config, facts, clips)      # pure

A setting is left out when no file and no `--set` names it; an explicit value, null too, is kept and checked by
stdit.training.data. What can be left out:

| setting                       | follows from                                                              |
|-------------------------------|---------------------------------------------------------------------------|
| model.in_channels             | channels of the latents                                                   |
| model.text_dim, pooled_dim    | widths of the text features, where the config names no num_classes either |
| model.max_text_tokens         | tokens of the longest caption                                             |
| data.buckets                  | the buckets that hold training clips; of an image model those of one frame |
| their batch_size, global_batch | data.batch_size, data.global_batch |
| data.buckets[].tokens, sizes  | latents and patches, with train.tokens_per_step                           |
| train.alignment.features_dim  | width of the vision encoder's features, with target features              |
| diffusion.shift_base: auto    | the smallest latent of the features                                       |
| train.precision: auto         | the run that is there, else the machine                                   |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stdit.config import Bucket, Config, ConfigError, TrainBucket, latent_shape, token_grid, validate

if TYPE_CHECKING:
    from stdit.data.features import FeatureFacts


def is_complete(config: Config) -> bool:
    """Whether the config states everything that could follow from features."""
    stated = config.diffusion.shift_base != "auto" and config.train.precision != "auto"
    return stated and not _missing(config) and _is_sized(config) and not _lacks_features_dim(config)


def _lacks_features_dim(config: Config) -> bool:
    alignment = config.train.alignment
    return alignment is not None and alignment.target == "features" and alignment.features_dim is None


def _is_sized(config: Config) -> bool:
    """Whether there are buckets, and their steps have sizes."""
    return bool(config.data.buckets) and all(b.is_sized for b in config.data.buckets)


def complete(config: Config) -> Config:
    """`config` with what it leaves out, from the features that it names. ConfigError: they don't exist or don't fit."""
    config = with_precision(config)
    if is_complete(config):
        return config
    if not config.data.feature_paths:
        if _lacks_features_dim(config):
            raise ConfigError("data.features synthetic: train.alignment.features_dim cannot follow from it")
        if config.data.buckets and config.diffusion.shift_base != "auto":  # synthetic features follow the model
            latents = {bucket.key: latent_shape(bucket, (1, 1, 1)) for bucket in config.data.buckets}
            return config if _is_sized(config) else _with_token_budget(config, latents)
        raise ConfigError("data.features synthetic: data.buckets and diffusion.shift_base cannot follow from it")
    from stdit.data.mixture import open_features

    features = open_features(config.data)
    buckets = [Bucket.parse(key) for key in features.index["buckets"]]
    found = features.select(config.data.train_split, buckets, config.data.where)
    return derive(config, features.facts(), {key: len(ids) for key, ids in found.items()})


def derive(config: Config, facts: FeatureFacts, clips: Mapping[str, int]) -> Config:
    """`config` with what it leaves out, all of it explicit. clips: training clips by bucket key, after `data.where`.

    ConfigError: no bucket holds training clips that the model can take; features of a vision encoder are wanted, and
    there are none.
    """
    if is_complete(config):
        return config
    data = config.model_dump(mode="json")
    for name in _missing(config):
        if (value := getattr(facts, name)) is not None:
            data["model"][name] = value
    if _lacks_features_dim(config):
        if facts.features_dim is None:
            raise ConfigError(no_vision_features(config))
        data["train"]["alignment"]["features_dim"] = facts.features_dim
    if not config.data.buckets:
        data["data"]["buckets"] = [b.model_dump() for b in _buckets(config, facts, clips)]
        data["data"]["batch_size"] = data["data"]["global_batch"] = None
    if config.diffusion.shift_base == "auto":
        data["diffusion"]["shift_base"] = list(facts.smallest_latent)
    found = validate(data, Config, f"{config.name}, completed from its features")
    return found if _is_sized(found) else _with_token_budget(found, facts.latents)


def no_vision_features(config: Config) -> str:
    """Message for a config that aligns to features which its data does not have."""
    return (
        f"train.alignment.target is features, but data.features {config.data.source_name} holds none of a vision encoder: "
        "extract with vision_encoder, or take target latents"
    )


def with_precision(config: Config, gpus: bool | None = None) -> Config:
    """`config` with train.precision stated: that of the run in its folder or its mirror, or by the machine. gpus:
    whether GPUs train, if not those of this machine."""
    if config.train.precision != "auto":
        return config
    from stdit.training import run_dir
    from stdit.training.machine import multiplies_bfloat16

    try:
        precision = run_dir.read_config(config.run_dir).train.precision
    except ConfigError:  # none has begun here
        precision = _precision_of_mirror(config) or ("bf16" if multiplies_bfloat16(gpus) else "fp32")
    return config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})


def _precision_of_mirror(config: Config) -> Any:
    """train.precision of the run at train.upload_to, if one has begun."""
    if config.train.upload_to is None:
        return None
    from stdit.training import mirror

    begun = mirror.read_config(config.train.upload_to)
    return begun and begun.train.precision


def _with_token_budget(config: Config, latents: Mapping[str, tuple[int, int, int]]) -> Config:
    """`config` with the tokens of each bucket, and the samples of a step that follow. ConfigError: a bucket without
    latents; a budget that is too small."""
    buckets, model = config.data.buckets, config.model
    if absent := [bucket.key for bucket in buckets if bucket.key not in latents]:
        raise ConfigError(f"data.buckets {', '.join(absent)} were not extracted; there are {', '.join(latents)}")
    tokens = {b.key: math.prod(token_grid(latents[b.key], model.patch_size, b.key, model.pad_latents)) for b in buckets}
    sizes = config.train.step_sizes(tokens)
    sized = tuple(b.model_copy(update={"tokens": tokens[b.key], **sizes[b.key]._asdict()}) for b in buckets)
    return config.model_copy(update={"data": config.data.model_copy(update={"buckets": sized})})


def _missing(config: Config) -> list[str]:
    """Keys of `model` that follow from features."""
    named = config.model.model_fields_set
    missing = [] if "in_channels" in named else ["in_channels"]
    if not named & {"text_dim", "num_classes"}:
        missing += ["text_dim", "max_text_tokens", *([] if config.model.pooled_text else ["pooled_dim"])]
    elif config.model.text_dim is not None:
        missing.append("max_text_tokens")
    return [name for name in missing if name not in named]


def _buckets(config: Config, facts: FeatureFacts, clips: Mapping[str, int]) -> list[TrainBucket]:
    """Buckets with training clips. The largest has data.batch_size samples, smaller ones as many more as they have
    fewer tokens; so with data.global_batch, in whole multiples."""
    model, usable = config.model, [key for key in facts.latents if clips.get(key)]
    if not model.has_time:
        usable = [key for key in usable if facts.latents[key][0] == 1]
    if not usable:
        kind = "" if model.has_time else " of one frame (model.temporal is false)"
        raise ConfigError(
            f"data.buckets is left out, but no bucket{kind} of {config.data.source_name} holds a clip of split "
            f"{config.data.train_split!r}; its buckets: {', '.join(facts.latents)}"
        )
    tokens = {
        key: math.prod(token_grid(facts.latents[key], model.patch_size, f"bucket {key}", model.pad_latents))
        for key in usable
    }
    most, size, step = max(tokens.values()), config.data.batch_size, config.data.global_batch
    made: list[TrainBucket] = []
    for key in usable:
        settings: dict[str, Any] = Bucket.parse(key).model_dump()
        if config.train.tokens_per_step is None and (size or not step):
            settings["batch_size"] = max(1, min((size or 1) * most // tokens[key], clips[key]))
        if step:
            settings["global_batch"] = step * max(1, min(most // tokens[key], clips[key] // step))
        made.append(TrainBucket(**settings))
    return made
