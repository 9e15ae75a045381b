"""Conditioning frames: latent frames that stay clean, at timestep 0, while the others are denoised.

The base of image-to-video, extension, looping and in-betweening. In training they are drawn by the shares of
`diffusion.frame_conditioning` and left out of the loss (Open-Sora's masks); in sampling they are put into x_t at every
step. B batch · T latent frames, or patches of them (a model whose patches span several frames conditions on whole
patches)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stdit.config import FrameConditioningConfig

PATTERNS = ("first", "head", "tail", "ends", "random")


class FrameCondition(NamedTuple):
    """Frames that are not denoised. frames (B or 1, T) bool: True where they are; latents (B or 1, C, T, H, W): clean
    latents, of which only those frames are read."""

    frames: Tensor
    latents: Tensor

    def apply(self, x: Tensor) -> Tensor:
        """x (B, C, T, H, W) with the conditioning frames in it."""
        return insert_frames(x, self.latents, self.frames)


def insert_frames(x: Tensor, clean: Tensor, frames: Tensor | None) -> Tensor:
    """x (B, C, T, H, W), with `clean` where frames (B or 1, T) is True."""
    return x if frames is None else torch.where(frames[:, None, :, None, None], clean, x)


def sample_frame_mask(config: FrameConditioningConfig, which: Tensor, length: Tensor, order: Tensor) -> Tensor | None:
    """Conditioning frames of training clips, (B, T) bool; None where the config has none, and for images.

    which, length (B,), uniform in [0, 1): select the pattern, and the number of frames, 1 to T - 1. order (B, T): any
    distinct numbers; pattern `random` takes the frames of the smallest.
    """
    shares = torch.tensor([getattr(config, name) for name in PATTERNS], device=which.device)
    frames = order.shape[1]
    if frames == 1 or not shares.any():
        return None
    pattern = torch.bucketize(which, shares.cumsum(0), right=True)  # len(PATTERNS): no conditioning frames
    count = 1 + (length * (frames - 1)).floor().long()[:, None]
    at = torch.arange(frames, device=which.device).expand(len(which), -1)
    ends = (at == 0) | ((at == frames - 1) & (frames > 2))
    masks = [at == 0, at < count, at >= frames - count, ends, order.argsort(1).argsort(1) < count, at < 0]
    return torch.stack(masks)[pattern, torch.arange(len(which), device=which.device)]
