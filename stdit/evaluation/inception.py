"""InceptionV3 with the weights that define FID, KID and the Inception Score, in the original TensorFlow graph's
arithmetic.

Parameter names are those of pt_inception-2015-12-05-6726825d.pth (pytorch-fid, torch-fidelity: one file under two
names). It differs from torchvision's InceptionV3: averages leave out the padding, the last block takes a maximum, there
are 1008 classes, and images are resized as TensorFlow 1 did (corners aligned at the first pixel alone, no
antialiasing).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stdit.weights.state_dict import read_state_dict

# First 8 hex digits of the file's SHA-256, which are part of its name.
ORIGINAL_SHA256 = "6726825d"
SIZE = 299
# Width of the features after each stage; pytorch-fid calls the last one the third pool.
DIMS = (64, 192, 768, 2048)


class ConvBN(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = False
    ):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (kernel[0] // 2, kernel[1] // 2) if padding else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


Kernel = int | tuple[int, int]
# A convolution: name, outputs, kernel. A step of a branch: one, or two side by side.
Convolution = tuple[str, int, Kernel]
Step = tuple[Convolution, ...]


def branch(name: str, *convolutions: tuple[int, Kernel]) -> list[Step]:
    """A branch of (outputs, kernel), called NAME_1, NAME_2, …; NAME if it is one."""
    names = [name] if len(convolutions) == 1 else [f"{name}_{i}" for i in range(1, len(convolutions) + 1)]
    return [((name, *rest),) for name, rest in zip(names, convolutions, strict=True)]


class InceptionBlock(nn.Module):
    """Parallel branches and a pooling one, concatenated.

    pool: outputs of the convolution after the pooling; None: none. stride 2: the last convolution of a branch and the
    pooling have it, without padding. average: pooling takes the mean, else the maximum.
    """

    def __init__(
        self, inputs: int, branches: list[list[Step]], pool: int | None, average: bool = True, stride: int = 1
    ) -> None:
        super().__init__()
        self.average, self.stride = average, stride
        self.branches = [[[name for name, _, _ in step] for step in one] for one in branches]
        for one in branches:
            width = inputs
            for step in one:
                strided = stride == 2 and step is one[-1]
                for name, outputs, kernel in step:
                    self.add_module(name, ConvBN(width, outputs, kernel, 2 if strided else 1, padding=not strided))
                width = step[0][1]
        self.branch_pool = None if pool is None else ConvBN(inputs, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for one in self.branches:
            y = x
            for step in one:
                y = torch.cat([self.get_submodule(name)(y) for name in step], 1)
            found.append(y)
        if self.stride == 2:
            pooled = F.max_pool2d(x, 3, 2)
        elif self.average:
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*found, pooled if self.branch_pool is None else self.branch_pool(pooled)], 1)


def _block_a(inputs: int, pool: int) -> InceptionBlock:
    branches = [
        branch("branch1x1", (64, 1)),
        branch("branch5x5", (48, 1), (64, 5)),
        branch("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
    ]
    return InceptionBlock(inputs, branches, pool)


def _block_b(inputs: int) -> InceptionBlock:
    branches = [branch("branch3x3", (384, 3)), branch("branch3x3dbl", (64, 1), (96, 3), (96, 3))]
    return InceptionBlock(inputs, branches, None, stride=2)


def _block_c(inputs: int, width: int) -> InceptionBlock:
    row, column = (1, 7), (7, 1)
    branches = [
        branch("branch1x1", (192, 1)),
        branch("branch7x7", (width, 1), (width, row), (192, column)),
        branch("branch7x7dbl", (width, 1), (width, column), (width, row), (width, column), (192, row)),
    ]
    return InceptionBlock(inputs, branches, 192)


def _block_d(inputs: int) -> InceptionBlock:
    branches = [
        branch("branch3x3", (192, 1), (320, 3)),
        branch("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
    ]
    return InceptionBlock(inputs, branches, None, stride=2)


def _block_e(inputs: int, average: bool) -> InceptionBlock:
    def split(name: str) -> Step:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    branches: list[list[Step]] = [
        branch("branch1x1", (320, 1)),
        [(("branch3x3_1", 384, 1),), split("branch3x3_2")],
        [(("branch3x3dbl_1", 448, 1),), (("branch3x3dbl_2", 384, 3),), split("branch3x3dbl_3")],
    ]
    return InceptionBlock(inputs, branches, 192, average)


class InceptionV3(nn.Module):
    """uint8 images (n, 3, H, W) -> features (n, 2048) and logits without bias (n, 1008), which Inception Scores use."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=True)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_a(192, 32), _block_a(256, 64), _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b, self.Mixed_6c = _block_c(768, 128), _block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = _block_c(768, 160), _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b, self.Mixed_7c = _block_e(1280, average=True), _block_e(2048, average=False)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, images: Tensor, dims: int = 2048) -> tuple[Tensor, Tensor | None]:
        """dims: features of an earlier stage instead, one of DIMS; then there are no logits."""
        x = (resize_as_tensorflow1(images.float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        if dims == 64:
            return x.mean((2, 3)), None
        x = F.max_pool2d(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)), 3, 2)
        if dims == 192:
            return x.mean((2, 3)), None
        x = self.Mixed_6a(self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        if dims == 768:
            return x.mean((2, 3)), None
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).mean((2, 3))
        return x, x @ self.fc.weight.T


def resize_as_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of (n, C, H, W) as tf.image.resize_bilinear of TensorFlow 1: output pixel i is at i * H / size.

    Not PyTorch's, whose pixel centres are at (i + 0.5) * H / size - 0.5.
    """

    def grid(length: int) -> tuple[Tensor, Tensor, Tensor]:
        at = torch.arange(size, dtype=images.dtype, device=images.device) * torch.tensor(
            length / size, dtype=torch.float32
        )
        low = at.long()
        return low, (low + 1).clamp_max(length - 1), at - low

    y0, y1, dy = grid(images.shape[2])
    x0, x1, dx = grid(images.shape[3])
    top, bottom = images[:, :, y0], images[:, :, y1]
    top = top[..., x0] + (top[..., x1] - top[..., x0]) * dx
    bottom = bottom[..., x0] + (bottom[..., x1] - bottom[..., x0]) * dx
    return top + (bottom - top) * dy[:, None]


def load_inception(path: Path) -> InceptionV3:
    """ValueError: unreadable, or other keys or shapes than InceptionV3's."""
    state = read_state_dict(path).state
    net = InceptionV3()
    expected = net.state_dict()
    # Older files lack the counters of batch norm, which evaluation does not use.
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    wanted = {k for k in expected if not k.endswith("num_batches_tracked")}
    if wrong := sorted(wanted ^ state.keys()) or [k for k in sorted(wanted) if expected[k].shape != state[k].shape]:
        raise ValueError(
            f"{path}: not InceptionV3 in the layout of pt_inception-2015-12-05: {len(wrong)} keys are missing, unknown or "
            f"of another shape, such as {wrong[0]}"
        )
    net.load_state_dict({**expected, **state})
    return net.eval().requires_grad_(False)
