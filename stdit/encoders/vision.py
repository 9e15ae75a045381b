"""Frozen vision encoders of transformers, whose patch features a model's tokens are aligned to in training
(stdit.models.alignment).

    pixels (B, 3, T, H, W) in [-1, 1]  --encode-->  features (B, D, t, h, w) of frames 0, stride, 2 stride, …

B clips · D hidden size of the encoder · h, w = H, W / pixels_per_feature, rounded

A frame is resized (bicubic, antialiased) to h × w patches of the encoder and normalised by its preprocessor's mean and
deviation; features are the last hidden states of the patches, those of class and register tokens left out.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from stdit.config import ConfigError, VisionEncoderConfig
from stdit.encoders.pretrained import from_pretrained, load_pretrained, no_remote_code
from stdit.encoders.source import fingerprint_folder, folder_of, hub_commit, subfolder_of

# The setting that messages name.
KEY = "vision_encoder.path"
# Weights that patch features do not need, which published folders may lack.
UNUSED = ("pooler.", "head.", "vision_model.head.")


class VisionEncoder:
    """A vision transformer with what is needed to use it. `.identity` is JSON.

    mean, std: of the pixels (0 to 1) that it was trained on, one number per channel.
    """

    def __init__(
        self, model: Any, mean: list[float], std: list[float], config: VisionEncoderConfig, source: dict[str, Any]
    ) -> None:
        whole = model.config
        # Of CLIP and SigLIP, which have a text encoder too.
        self.model = getattr(model, "vision_model", model).eval().requires_grad_(False)
        self.patch = _patch_size(whole, config.path)
        self.pixels_per_feature, self.frames_at_once = config.pixels_per_feature, config.frames_at_once
        self._mean, self._std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
        # Those of learned positions that are not interpolated unless asked.
        parameters = inspect.signature(self.model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        self.identity: dict[str, Any] = {
            "class": type(self.model).__name__,
            **source,
            "frames_at_once": config.frames_at_once,
        }

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held and applied in."""
        return self.model.dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor, stride: int = 1) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> features (B, D, t, h, w), t = 1 + (T - 1) // stride, of every
        `stride`-th frame.

        ValueError: the encoder has not one output for each patch.
        """
        batch, frames = len(pixels), pixels[:, :, ::stride].transpose(1, 2).flatten(0, 1)
        parts = [self._encode_frames(part) for part in frames.split(self.frames_at_once)]
        return torch.cat(parts).unflatten(0, (batch, -1)).transpose(1, 2)

    def _encode_frames(self, frames: Tensor) -> Tensor:
        """Frames (N, 3, H, W) in [-1, 1] -> (N, D, h, w)."""
        h, w = (max(1, round(side / self.pixels_per_feature)) for side in frames.shape[2:])
        x = frames.to(self.model.device, torch.float32)
        size = h * self.patch[0], w * self.patch[1]
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        x = ((x + 1) / 2 - self._mean.to(x.device)) / self._std.to(x.device)
        states = self.model(pixel_values=x.to(self.dtype), **self._options).last_hidden_state
        if states.dim() != 3 or states.shape[1] < h * w:
            raise ValueError(
                f"{KEY}: {self.identity['class']} has outputs of shape {tuple(states.shape)} for {h} x {w} patches a frame; expected "
                "one for each patch, after those of other tokens"
            )
        return states[:, -h * w :].transpose(1, 2).unflatten(2, (h, w))  # class and register tokens come first


def load_vision_encoder(config: VisionEncoderConfig, device: torch.device | str = "cpu") -> VisionEncoder:
    """The encoder that `config` names. ConfigError: not found, not a vision transformer, weights missing, no
    preprocessor_config.json."""
    source, location = vision_identity(config), _location(config)
    folder = folder_of(config.path, KEY)
    try:
        with no_remote_code():
            processor, _ = ImageProcessingMixin.get_image_processor_dict(config.path, **location)
        model = load_pretrained(AutoModel, config.path, UNUSED, dtype=getattr(torch, config.dtype), **location)
    except Exception as error:  # whatever transformers raises for files that are damaged or missing
        raise ConfigError(f"{KEY}: {config.path}: cannot be loaded ({type(error).__name__}: {error})") from error
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not mean or not std or len(mean) != 3 or len(std) != 3:
        raise ConfigError(
            f"{KEY}: {config.path}: its preprocessor_config.json has image_mean {mean} and image_std {std}; three numbers each are needed"
        )
    place = {"path": str(folder) if folder else config.path, "subfolder": config.subfolder}
    return VisionEncoder(model.to(device), mean, std, config, {**place, **source})


def vision_identity(config: VisionEncoderConfig) -> dict[str, Any]:
    """The settings and weights' fingerprint that determine the features of `config`, without loading weights.
    ConfigError: not found."""
    folder = folder_of(config.path, KEY)
    try:
        if folder:
            fingerprint = fingerprint_folder(subfolder_of(folder, config.subfolder, KEY))
        else:
            fingerprint = hub_commit(config.path, config.subfolder, None)
    except OSError as error:
        raise ConfigError(f"{KEY}: {config.path} is no folder here and not found on the hub ({error})") from error
    return {
        "fingerprint": fingerprint,
        "dtype": config.dtype,
        "dim": feature_width(config),
        "pixels_per_feature": config.pixels_per_feature,
    }


def feature_width(config: VisionEncoderConfig) -> int:
    """Width of the encoder's features, from its config.json alone. ConfigError: not there, or not a vision
    transformer's."""
    if folder := folder_of(config.path, KEY):
        subfolder_of(folder, config.subfolder, KEY)
    try:
        settings = from_pretrained(AutoConfig, config.path, **_location(config))
    except Exception as error:  # whatever transformers raises for a file that is damaged
        raise ConfigError(
            f"{KEY}: {config.path}: its config.json cannot be read ({type(error).__name__}: {error})"
        ) from error
    _patch_size(settings, config.path)
    return int(getattr(settings, "vision_config", settings).hidden_size)


def _location(config: VisionEncoderConfig) -> dict[str, Any]:
    return {"subfolder": config.subfolder or ""}


def _patch_size(settings: Any, path: str) -> tuple[int, int]:
    """Height and width of a patch in pixels. ConfigError: the config is not a vision transformer's."""
    vision = getattr(settings, "vision_config", settings)
    patch = getattr(vision, "patch_size", None)
    if patch is None or getattr(vision, "hidden_size", None) is None:
        raise ConfigError(
            f"{KEY}: {path} holds a model of type {settings.model_type}, which is no vision transformer: its config has no patch_size and hidden_size"
        )
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return int(height), int(width)
