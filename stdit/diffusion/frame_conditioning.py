"""Which frames of a training clip are given: the base of image-to-video, extension, looping and in-betweening.

Given frames keep their data, are told time 0 and stay out of the loss (as Open-Sora's masks).
B batch · T latent frames, or patches of them: a model whose patches have several frames is given whole ones
"""

from __future__ import annotations

import torch
from torch import Tensor

from stdit.config import FrameConditioningConfig

PATTERNS = ("first", "head", "tail", "ends", "random")


def sample_frame_mask(config: FrameConditioningConfig, which: Tensor, length: Tensor, order: Tensor) -> Tensor | None:
    """(B, T) bool, True where a frame is given; None where the config gives none, and for images, which have but one.

    which, length (B,), uniform in [0, 1): the pattern, and how many frames, of 1 to T - 1. order (B, T): any distinct
    numbers; the frames of the least of them are those that pattern `random` gives.
    """
    shares = torch.tensor([getattr(config, name) for name in PATTERNS], device=which.device)
    frames = order.shape[1]
    if frames == 1 or not shares.any():
        return None
    pattern = torch.bucketize(which, shares.cumsum(0), right=True)  # len(PATTERNS): nothing is given
    count = 1 + (length * (frames - 1)).floor().long()[:, None]
    at = torch.arange(frames, device=which.device).expand(len(which), -1)
    ends = (at == 0) | ((at == frames - 1) & (frames > 2))
    each = [at == 0, at < count, at >= frames - count, ends, order.argsort(1).argsort(1) < count, at < 0]
    return torch.stack(each)[pattern, torch.arange(len(which), device=which.device)]
