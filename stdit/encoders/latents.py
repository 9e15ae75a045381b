"""What an autoencoder of diffusers states of its latents: compression, and the statistics its pipelines normalise by.

Read from the module or its config, in the several spellings of the classes; what is not stated is an error.
"""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


def _stated(vae: ModelMixin, *names: str) -> Any:
    """The first of `names` that the model (a buffer, an attribute) or its config states; None if none does."""
    for name in names:
        # The module first: LTX's config may leave None what its constructor derives, and its statistics are buffers.
        for value in (
            vae.__dict__.get(name),
            vae._buffers.get(name),
            getattr(type(vae), name, None),
            vae.config.get(name),
        ):
            if isinstance(value, int | float | list | tuple | Tensor):
                return value
    return None


def compression(vae: ModelMixin, per_frame: bool) -> tuple[int, int, int]:
    """Pixels per latent (t, h, w); t is 1 for an autoencoder applied `per_frame`. ValueError: not stated."""
    spatial = _stated(vae, "spatial_compression_ratio", "scale_factor_spatial")
    if spatial is None and (blocks := vae.config.get("block_out_channels")):
        # AutoencoderKL, CogVideoX, Tiny: every block but one halves the sides.
        spatial = 2 ** (len(blocks) - 1)
    temporal = 1 if per_frame else _stated(vae, "temporal_compression_ratio", "scale_factor_temporal")
    if spatial is None or temporal is None:
        raise ValueError(
            f"{type(vae).__name__} states no {'spatial' if spatial is None else 'temporal'} compression "
            "(looked for spatial_compression_ratio, scale_factor_spatial, block_out_channels; "
            "temporal_compression_ratio, scale_factor_temporal)"
        )
    return (int(temporal), int(spatial), int(spatial))


def statistics(vae: ModelMixin) -> tuple[list[float], list[float]]:
    """Per-channel (shift, scale) such that (z - shift) * scale is what the class's own pipelines diffuse.

    With latents_mean and latents_std: (z - mean) / std * scaling_factor (SDXL, Mochi, LTX; Wan has no
    scaling_factor). Else (z - shift_factor) * scaling_factor (SD3; most have no shift_factor).
    ValueError: not stated, or not one per channel.
    """
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    if not isinstance(channels, int):
        raise ValueError(
            f"{type(vae).__name__} states no number of latent channels (looked for latent_channels, z_dim)"
        )
    factor = _stated(vae, "scaling_factor")
    mean, std = (_per_channel(vae, name, channels) for name in ("latents_mean", "latents_std"))
    if mean and std:
        return mean, [(1.0 if factor is None else float(factor)) / s for s in std]
    if factor is None:
        raise ValueError(
            f"{type(vae).__name__} states no latent statistics (looked for scaling_factor, latents_mean with latents_std); "
            "latents of unknown variance are not guessed at"
        )
    return [float(_stated(vae, "shift_factor") or 0.0)] * channels, [float(factor)] * channels


def _per_channel(vae: ModelMixin, name: str, channels: int) -> list[float] | None:
    values = _stated(vae, name)
    if values is None:
        return None
    values = [float(v) for v in (values.flatten().tolist() if isinstance(values, Tensor) else values)]
    if len(values) != channels:
        raise ValueError(f"{type(vae).__name__}.{name} has {len(values)} values for {channels} latent channels")
    return values
