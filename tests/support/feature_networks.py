"""Random feature networks in the layouts of the published ones, for laws of scores."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from stdit.evaluation.inception import InceptionV3


def save_inception(path: Path) -> Path:
    """Random weights in the layout of pt_inception-2015-12-05, with activations that neither vanish nor explode."""
    torch.manual_seed(0)
    net = InceptionV3()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            assert module.running_var is not None
            assert module.running_mean is not None
            module.running_var.uniform_(0.8, 1.2)
            module.running_mean.normal_(std=0.1)
    torch.save(net.state_dict(), path)
    return path


class VideoNet(nn.Module):
    """The signature of i3d_torchscript.pt: video (n, 3, T, H, W) in 0 to 255 -> (n, 400)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 50, (3, 3, 3), stride=(1, 2, 2))

    def forward(
        self, video: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> Tensor:
        x = torch.relu(self.conv(video / 127.5 - 1.0))
        return torch.nn.functional.adaptive_avg_pool3d(x, (2, 2, 2)).flatten(1)


def save_video_net(path: Path) -> Path:
    torch.manual_seed(0)
    torch.jit.script(VideoNet()).save(str(path))  # pyright: ignore[reportAttributeAccessIssue]
    return path
