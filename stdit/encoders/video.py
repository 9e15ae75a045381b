"""Autoencoders of images and videos behind one interface. Latent statistics live here and nowhere else.

    pixels (B, 3, T, H, W) in [-1, 1]  --encode-->  latents (B, C, t, h, w), raw: posterior mean and std
    raw latents  --normalise-->  (z - shift) * scale, of about unit variance: what the transformer sees
    B clips · C latent channels · T, H, W pixels · t, h, w latents, t = 1 + (T - 1) / compression[0]

Image autoencoders are applied per frame. Any diffusers class serves whose config says its statistics
(scaling_factor, shift_factor, latents_mean, latents_std) and its compression.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any, Literal, cast

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.auto_model import AutoModel
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from torch import Tensor, nn

from stdit.config import Bucket, ConfigError, VideoEncoderConfig, latent_shape
from stdit.encoders.latents import compression, statistics
from stdit.encoders.source import check_same, fingerprint_folder, folder_of, hub_commit, revision_of, subfolder_of
from stdit.files import apply_umask, check_regular

Kind = Literal["pixels", "image", "video"]
# ITU-R BT.601 luma of full-range RGB.
LUMA = (0.299, 0.587, 0.114)


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """No autoencoder: the latents are the clip itself, as RGB (3 channels) or as luma (1 channel).

    Luma is repeated over R, G and B on the way back, so a grey clip comes back as it was.
    """

    spatial_compression_ratio = 1
    temporal_compression_ratio = 1

    @register_to_config
    def __init__(self, latent_channels: int = 3, scaling_factor: float = 1.0) -> None:
        super().__init__()
        if latent_channels not in (1, 3):
            raise ValueError(f"PixelAutoencoder has 1 (luma) or 3 (RGB) channels, not {latent_channels}")
        weights = torch.tensor([LUMA]) if latent_channels == 1 else torch.eye(3)
        self.register_buffer("weights", weights)  # (C, 3)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As diffusers'."""
        super().save_pretrained(save_directory, *args, **kwargs)
        apply_umask(Path(save_directory), "config.json", "diffusion_pytorch_model*")

    def encode(self, x: Tensor) -> EncoderOutput:
        """RGB (B, 3, T, H, W) -> .latent (B, C, T, H, W)."""
        if len(self.weights) == 3:
            return EncoderOutput(latent=x)
        luma = torch.einsum("cr,brthw->bcthw", self.weights.float(), x.float())
        return EncoderOutput(latent=luma.to(x.dtype))

    def decode(self, z: Tensor) -> DecoderOutput:
        """Latents (B, C, T, H, W) -> .sample, RGB (B, 3, T, H, W)."""
        return DecoderOutput(sample=z.expand(-1, 3, -1, -1, -1))


class VideoEncoder:
    """An autoencoder with what is needed to use it: kind, compression, statistics, identity.

    `VideoEncoder(vae)` takes any diffusers autoencoder. `.identity` is JSON, and rebuilds the encoder
    by `video_encoder_from_identity`. ValueError: a class whose statistics or compression are not stated.
    """

    def __init__(self, vae: ModelMixin, frames_at_once: int = 16, source: dict[str, Any] | None = None) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.frames_at_once = frames_at_once
        self.kind = _kind(vae)
        self.compression = compression(vae, per_frame=self.kind == "image")
        shift, scale = statistics(vae)
        self.channels = len(shift)
        self.identity: dict[str, Any] = {
            "kind": self.kind,
            "class": type(vae).__name__,
            "path": None,
            "subfolder": None,
            "fingerprint": None,
            **(source or {}),
            "dtype": str(self.dtype).removeprefix("torch."),
            "frames_at_once": frames_at_once,
            "channels": self.channels,
            "compression": list(self.compression),
            "shift": shift,
            "scale": scale,
        }

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held and applied in."""
        return cast(torch.dtype, self.vae.dtype)

    @property
    def device(self) -> torch.device:
        return cast(torch.device, self.vae.device)

    @torch.no_grad()
    def check(self, bucket: Bucket) -> tuple[int, int, int]:
        """Latent (t, h, w) of a clip of this bucket, after a forward and back without arithmetic (on the meta device).

        ConfigError: sizes that the compression does not divide, or that the class maps to others than it
        promises (CogVideoX decodes the two latents of 5 frames to 8 frames: it takes 1 + 8 k).
        """
        shape = latent_shape(bucket, self.compression)
        if self.kind == "pixels":
            return shape
        twin = copy.copy(self)
        with torch.device("meta"):
            twin.vae = cast(Any, type(self.vae)).from_config(self.vae.config).eval()
            pixels = torch.empty(1, 3, bucket.frames, bucket.height, bucket.width)
            found = tuple(twin.decode(twin.encode(pixels)[0]).shape[2:])
        if found != pixels.shape[2:]:
            frames, height, width = found
            raise ConfigError(
                f"bucket {bucket.key}: {self.identity['class']} turns its {bucket.frames} frames of {bucket.height}x{bucket.width} "
                f"into {frames} of {height}x{width}; choose other sizes"
            )
        return shape

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> raw latents: (mean, std), each (B, C, t, h, w) float32 on the encoder's
        device.

        std is None where the class has no posterior. ConfigError: sizes that the compression does not
        divide. ValueError: latents of another shape than the compression promises.
        """
        b, _, frames, height, width = pixels.shape
        bucket = Bucket(frames=frames, height=height, width=width)
        expected = (b, self.channels, *latent_shape(bucket, self.compression))
        x = pixels.to(self.device, self.dtype)
        if self.kind == "image":
            parts = [
                self._posterior(part) for part in rearrange(x, "b c t h w -> (b t) c h w").split(self.frames_at_once)
            ]
            mean = rearrange(torch.cat([m for m, _ in parts]), "(b t) c h w -> b c t h w", b=b)
            stds = [s for _, s in parts if s is not None]
            std = rearrange(torch.cat(stds), "(b t) c h w -> b c t h w", b=b) if stds else None
        else:
            mean, std = self._posterior(x)
        if tuple(mean.shape) != expected:
            raise ValueError(
                f"{self.identity['class']} made latents of shape {tuple(mean.shape)} from a clip of bucket {bucket.key}; "
                f"its stated compression {self.compression} and {self.channels} channels promise {expected}"
            )
        return mean, std

    def _posterior(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and std (or None) of one forward, float32."""
        output = cast(Any, self.vae).encode(x)
        if (posterior := getattr(output, "latent_dist", None)) is not None:
            return posterior.mean.float(), posterior.std.float()
        # AutoencoderDC says latent, AutoencoderTiny latents.
        latent = getattr(output, "latent", None)
        return (output.latents if latent is None else latent).float(), None

    def _broadcast(self, key: str, like: Tensor) -> Tensor:
        return torch.tensor(self.identity[key], dtype=like.dtype, device=like.device).view(1, -1, 1, 1, 1)

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents (B, C, t, h, w) -> (z - shift) * scale."""
        return (z - self._broadcast("shift", z)) * self._broadcast("scale", z)

    def denormalise(self, z: Tensor) -> Tensor:
        """The inverse of `normalise`."""
        return z / self._broadcast("scale", z) + self._broadcast("shift", z)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, t, h, w) -> pixels (B, 3, T, H, W), float32 in [-1, 1], clamped.

        The same latents give the same pixels, also where the decoder injects noise (LTX-Video 0.9.1).
        """
        z = self.denormalise(latents.to(self.device, torch.float32)).to(self.dtype)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            if self.kind == "image":
                frames = rearrange(z, "b c t h w -> (b t) c h w").split(self.frames_at_once)
                sample = torch.cat([self._decode(part) for part in frames])
                sample = rearrange(sample, "(b t) c h w -> b c t h w", b=len(z))
            else:
                sample = self._decode(z)
        return sample.float().clamp(-1, 1)

    def _decode(self, z: Tensor) -> Tensor:
        """One forward of the decoder: raw latents -> pixels."""
        # LTX-Video 0.9.1 and later have a decoder that can denoise a little; its pipeline's default is time 0: none.
        time = (
            (torch.zeros(len(z), device=z.device, dtype=z.dtype),)
            if cast(Any, self.vae).config.get("timestep_conditioning")
            else ()
        )
        return cast(Any, self.vae).decode(z, *time).sample

    def to(self, device: torch.device | str) -> VideoEncoder:
        cast(nn.Module, self.vae).to(device)
        return self


def _kind(vae: ModelMixin) -> Kind:
    """What the encoder convolves over: frames (Conv2d), clips (Conv3d) or nothing."""
    if isinstance(vae, PixelAutoencoder):
        return "pixels"
    encoder = getattr(vae, "encoder", None)
    if not isinstance(encoder, nn.Module):
        raise ValueError(f"{type(vae).__name__} has no .encoder; it is no autoencoder of images or videos")
    _, *others = inspect.signature(cast(Any, vae).decode).parameters.values()
    if needed := [p.name for p in others if p.default is p.empty and p.kind is not p.VAR_KEYWORD]:
        raise ValueError(
            f"{type(vae).__name__}.decode needs more than latents ({', '.join(needed)}), which is not known here"
        )
    return "video" if any(isinstance(m, nn.Conv3d) for m in encoder.modules()) else "image"


def load_video_encoder(
    config: VideoEncoderConfig, device: torch.device | str = "cpu", revision: str | None = None
) -> VideoEncoder:
    """The autoencoder that `config` names. `revision`: a commit of the hub.

    ConfigError: the path is no folder and not on the hub, holds something else than an autoencoder,
    lacks weights, or is of another kind than the config says.
    """
    dtype = getattr(torch, config.dtype)
    if config.path is None:
        pixels = PixelAutoencoder(config.channels)
        nn.Module.to(pixels, dtype)  # ModelMixin's own `to` warns of modules kept in float32, of which there are none
        return VideoEncoder(pixels).to(device)
    key = "video_encoder.path"
    folder = folder_of(config.path, key)
    place = subfolder_of(folder, config.subfolder, key) if folder else None
    vae = load_autoencoder(config.path, config.subfolder, dtype, key, revision=revision)
    source = {
        "path": str(folder) if folder else config.path,
        "subfolder": config.subfolder,
        "fingerprint": fingerprint_folder(place) if place else hub_commit(config.path, config.subfolder, revision),
    }
    encoder = VideoEncoder(vae, config.frames_at_once, source)
    if encoder.kind != config.kind:
        raise ConfigError(
            f"video_encoder.kind: {config.kind!r}, but {config.path} holds {type(vae).__name__}, which is of kind {encoder.kind!r}"
        )
    return encoder.to(device)


def load_autoencoder(path: str, subfolder: str | None, dtype: torch.dtype | None, key: str, **hub: Any) -> ModelMixin:
    """The autoencoder in a folder or hub id, of diffusers or a PixelAutoencoder, strictly. hub: revision, token, …

    ConfigError, beginning with `key`: it cannot be loaded; a weight is missing, left over or of another shape.
    """
    where = f"{path}/{subfolder}" if subfolder else path
    location = {"subfolder": subfolder, **{k: v for k, v in hub.items() if v}}
    try:
        check_regular(Path(path, subfolder or ""))
        settings = cast(dict[str, Any], AutoModel.load_config(path, **location))
        name = settings.get("_class_name")
        cls: Any = PixelAutoencoder if name == PixelAutoencoder.__name__ else getattr(diffusers, str(name), None)
        if cls is None or not (hasattr(cls, "encode") and hasattr(cls, "decode")):
            raise ConfigError(
                f"{key}: {where} holds {name or 'no diffusers model (its config.json has no _class_name)'}, which is no autoencoder of diffusers"
            )
        vae, info = cls.from_pretrained(path, torch_dtype=dtype, output_loading_info=True, **location)
    except ConfigError:
        raise
    except Exception as error:  # whatever diffusers raises for files that are damaged
        raise ConfigError(
            f"{key}: {where}: cannot be loaded, neither as a folder nor from the hub ({type(error).__name__}: {error})"
        ) from error
    # diffusers only warns of these, and leaves the missing weights without values.
    wrong = {k: info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if wrong:
        raise ConfigError(
            f"{key}: {where}: the weights do not fit {name}: " + "; ".join(f"{k}: {list(v)}" for k, v in wrong.items())
        )
    return vae


def video_encoder_from_identity(
    identity: dict[str, Any], device: torch.device | str = "cpu", path: str | None = None
) -> VideoEncoder:
    """The encoder that made features of this `identity`. `path`: where its folder lies now, if elsewhere.

    ConfigError: gone, or no longer the same weights or statistics; the message says which.
    """
    config = VideoEncoderConfig(
        kind=identity["kind"],
        path=path or identity["path"],
        subfolder=identity["subfolder"],
        channels=identity["channels"] if identity["kind"] == "pixels" else 3,
        dtype=identity["dtype"],
        frames_at_once=identity["frames_at_once"],
    )
    encoder = load_video_encoder(config, device, revision_of(identity, config.path))
    check_same(identity, encoder.identity, f"the autoencoder {config.path or 'pixels'}")
    return encoder
