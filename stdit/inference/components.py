"""Components of a pipeline: loads those of a run (transformer, encoders, scheduler), and checks that they fit
together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from pydantic import ConfigDict, Field, model_validator

from stdit.config import (
    ConfigError,
    DiffusionConfig,
    FileSchema,
    NonNegative,
    Positive,
    SamplerConfig,
    check,
    read_json,
    validate,
)
from stdit.config.identity import FrameSampling
from stdit.diffusion.schedulers import compatible_scheduler, make_scheduler
from stdit.encoders.text_loading import (
    SUFFIXES,
    components,
    load_text_model,
    load_tokenizer,
    text_encoder_from_identity,
)
from stdit.encoders.video import VideoEncoder, load_autoencoder, video_encoder_from_identity
from stdit.models.control import STDiTControl
from stdit.models.stdit import STDiT
from stdit.training import checkpoint
from stdit.training.adapters import load_trained
from stdit.training.checkpoint import Weights
from stdit.training.identity import load_identity


class PipelineIndex(FileSchema):
    """model_index.json of a saved pipeline: its components as [library, class], and what STDiTPipeline is made with."""

    model_config = ConfigDict(extra="allow")

    class_name: str = Field(alias="_class_name")
    diffusers_version: str | None = Field(default=None, alias="_diffusers_version")
    diffusion: DiffusionConfig | None = None
    max_text_tokens: Positive | None = None
    classes: dict[str, NonNegative] | None = None
    fps: float | None = Field(default=None, gt=0)
    text_layout: dict[str, Any] | None = None
    frame_sampling: FrameSampling | None = None

    @model_validator(mode="after")
    def _check_components(self) -> PipelineIndex:
        extra = self.model_extra or {}
        for name, value in extra.items():
            pair = isinstance(value, list) and len(value) == 2 and len({type(part) for part in value}) == 1
            if not name.startswith("_") and not (pair and isinstance(value[0], str | None)):
                raise ValueError(f"{name}: expected [library, class] or [null, null], found {value!r}")
        if self.class_name == "STDiTPipeline":
            parts = [f"{kind}{suffix}" for suffix in SUFFIXES for kind in ("text_encoder", "tokenizer")]
            parts += ["transformer", "scheduler", "vae", "control"]
            wanted = [*type(self).model_fields, *parts]
            if missing := [name for name in wanted if name not in self.model_fields_set and name not in extra]:
                raise ValueError(f"{', '.join(missing)} missing")
        return self


def read_index(folder: Path | str, class_name: str = "STDiTPipeline") -> dict[str, Any]:
    """model_index.json in a folder. ConfigError: damaged, or of another class of pipelines."""
    return check_index(read_json(Path(folder) / "model_index.json", PipelineIndex), folder, class_name)


def check_index(index: Any, folder: Path | str, class_name: str) -> dict[str, Any]:
    """`index`, the content of a folder's or hub id's model_index.json. Errors as `read_index`."""
    check(index, PipelineIndex, f"{folder}/model_index.json")
    if index["_class_name"] != class_name:
        raise ConfigError(f"{folder} holds a {index['_class_name']}, not an {class_name}")
    return index


def load_strictly(path: str, index: Mapping[str, Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Autoencoder, text encoders and tokenizers of a saved pipeline, which diffusers would load with weights missing,
    or by code of the folder.

    kwargs: of from_pretrained; components among them are not loaded. ConfigError: a component that lacks weights.
    """
    dtypes = kwargs.get("torch_dtype", kwargs.get("dtype"))
    hub = {
        key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only", "variant") if key in kwargs
    }
    loaded: dict[str, Any] = {}
    for name in ("vae", *(f"text_encoder{suffix}" for suffix in SUFFIXES)):
        if name in kwargs or (index.get(name) or [None])[0] is None:
            continue
        dtype = dtypes.get(name, dtypes.get("default")) if isinstance(dtypes, dict) else dtypes
        load = load_autoencoder if name == "vae" else load_text_model
        loaded[name] = load(path, name, dtype, name, **hub)
    hub.pop("variant", None)  # of weights alone
    for name in (f"tokenizer{suffix}" for suffix in SUFFIXES):
        if name not in kwargs and (index.get(name) or [None])[0] is not None:
            loaded[name] = load_tokenizer(path, name, name, **hub)
    return loaded


def load_components(run: Path, weights: Weights, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of STDiTPipeline. kwargs: components to use in place of the stored ones, `torch_dtype`, and `base`.

    ValueError: a keyword that is none of these; an encoder that is gone or changed, latents that nothing decodes.
    """
    dtype = kwargs.pop("torch_dtype", kwargs.pop("dtype", None))
    texts = [f"{name}{suffix}" for suffix in SUFFIXES for name in ("text_encoder", "tokenizer")]
    parts = {name: kwargs.pop(name) for name in ("scheduler", "vae", *texts, "text_layout") if name in kwargs}
    base = kwargs.pop("base", None)
    if kwargs:
        raise ValueError(f"{run}: a run takes no {', '.join(kwargs)}")
    # Once: it reads every byte of the checkpoint to verify it.
    place = checkpoint.find_weights(run, weights)
    identity = load_identity(place.parent)
    transformer, control = load_trained(place, base and Path(base), dtype)
    diffusion = validate(identity["diffusion"], DiffusionConfig, f"{run}: identity.json: diffusion")
    if "vae" not in parts:
        if identity["video_encoder"]["kind"] == "synthetic":
            raise ValueError(f"{run} was trained on synthetic latents, which no autoencoder decodes; give vae=…")
        parts["vae"] = video_encoder_from_identity(identity["video_encoder"]).vae
    # Features for a run of several stages have text, which a stage with class labels alone does not take.
    settings = transformer.settings
    of_text = identity["text_encoder"] if settings.text_dim or settings.pooled_dim else None
    if of_text is not None and of_text["class"] != "synthetic" and "text_encoder" not in parts:
        encoder = text_encoder_from_identity(of_text)
        parts = {**components(encoder), "text_layout": encoder.layout, **parts}
    if "scheduler" not in parts:
        sampler = validate(identity["config"]["samples"]["sampler"], SamplerConfig, f"{run}: samples.sampler")
        parts["scheduler"] = make_scheduler(
            compatible_scheduler(sampler, diffusion), diffusion, (1, 1, 1), transformer.settings.learned_variance
        )
    return {
        "transformer": transformer,
        "diffusion": diffusion,
        "max_text_tokens": of_text["max_text_tokens"] if of_text else None,
        "classes": {name: i for i, name in enumerate(identity.get("classes") or [])} or None,
        "control": control,
        "fps": checkpoint.common_frame_rate(identity),
        "frame_sampling": identity.get("frame_sampling"),
        **parts,
    }


def check_components(transformer: STDiT, vae: ModelMixin, control: STDiTControl | None, encoder: Any) -> None:
    """ValueError: components that don't fit together, with both numbers. encoder: the text encoder or encoders, or
    None."""
    settings, channels = transformer.settings, VideoEncoder(vae).channels
    if channels != settings.in_channels:
        raise ValueError(
            f"the autoencoder ({type(vae).__name__}) has {channels} latent channels, the transformer takes in_channels {settings.in_channels}"
        )
    if control is not None:
        control.check_base(transformer)
    if encoder is None:
        return
    if settings.text_dim != encoder.dim:
        raise ValueError(
            f"the text encoder's features are {encoder.dim} wide, the transformer takes text_dim {settings.text_dim}"
        )
    if encoder.pooled_dim and settings.pooled_dim and encoder.pooled_dim != settings.pooled_dim:
        raise ValueError(
            f"the text encoder's pooled vectors are {encoder.pooled_dim} wide, the transformer takes pooled_dim {settings.pooled_dim}"
        )
    if encoder.max_text_tokens > settings.max_text_tokens:
        raise ValueError(
            f"max_text_tokens {encoder.max_text_tokens} is more than the transformer's max_text_tokens {settings.max_text_tokens}"
        )
