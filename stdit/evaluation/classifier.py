"""Measurements on one clip: class and features by a small trained classifier, direction of motion by centroids.

The classifier is trained on the train split of one manifest; its classes are the values of the class column. Nothing is
downloaded. Its numbers are comparable within one manifest only.

Shapes: a clip is uint8 (T, H, W, 3); crops are float32 (N, 3, S, S) in [0, 1]; N frames, S the classifier's input size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stdit.config import NonNegative, Positive, SealedSchema, Sha256, check
from stdit.data.features import digest_of
from stdit.files import atomic_path, parse_json, seal

Frames = NDArray[np.uint8]  # (T, H, W, 3)
Crop = Literal["foreground", "frame"]

# A pixel that differs from the border colour by less than this fraction of the full range is background.
CONTRAST = 0.2
# Half of a crop's side over the foreground's root-mean-square radius: a full circle of ink fills 0.71 of the crop.
MARGIN = 2.0
DIRECTIONS = ("left", "right", "up", "down")
NO_DIRECTION = "none"


# ------------------------------------------------------------------------------- foreground, motion


def foreground(frames: Tensor) -> Tensor:
    """Contrast of each pixel to its frame's border colour, 0 below CONTRAST. (N, 3, H, W) in [0, 1] -> (N, H, W)."""
    border = torch.cat([frames[..., 0, :], frames[..., -1, :], frames[..., :, 0], frames[..., :, -1]], -1)  # (N, 3, b)
    colour = border.median(-1).values[..., None, None]
    contrast = (frames - colour).abs().amax(1)
    return contrast * (contrast > CONTRAST)


def centroids(mass: Tensor) -> Tensor:
    """Centre of mass (y, x) in pixels, NaN for an empty frame. (N, H, W) -> (N, 2)."""
    total = mass.sum((1, 2))
    y = torch.arange(mass.shape[1]) + 0.5
    x = torch.arange(mass.shape[2]) + 0.5
    return torch.stack([(mass.sum(2) * y).sum(1), (mass.sum(1) * x).sum(1)], 1) / total[:, None]


def crops(clip: Frames, size: int, mode: Crop = "foreground") -> Tensor:
    """Crops every frame to its foreground, centred and scaled to `size`; a frame without foreground is not cropped.

    Centre and scale are the first and second moments of the foreground: more robust to stray pixels than a bounding
    box.
    """
    frames = to_float(clip)  # (T, 3, H, W)
    n, _, height, width = frames.shape
    full = torch.tensor([height / 2, width / 2]).expand(n, 2)
    centre, half = full, full
    if mode == "foreground":
        mass = foreground(frames)
        found = centroids(mass)
        y = (torch.arange(height) + 0.5)[None, :, None] - found[:, 0, None, None]
        x = (torch.arange(width) + 0.5)[None, None, :] - found[:, 1, None, None]
        radius = ((mass * (y * y + x * x)).sum((1, 2)) / mass.sum((1, 2))).sqrt()
        empty = found.isnan().any(1, keepdim=True)
        centre = torch.where(empty, full, found)
        half = torch.where(empty, full, (MARGIN * radius).clamp_min(1.0)[:, None].expand(n, 2))
    # Supersample where the crop is larger than `size`, then average: no aliasing.
    fine = max(1, math.ceil(2 * float(half.max()) / size))
    line = (torch.arange(size * fine) + 0.5) / (size * fine) * 2 - 1
    scale = torch.tensor([height, width]) / 2
    rows, columns = ((centre[:, i, None] + half[:, i, None] * line) / scale[i] - 1 for i in (0, 1))
    points = len(line)
    grid = torch.stack([columns[:, None, :].expand(n, points, points), rows[:, :, None].expand(n, points, points)], -1)
    # Outside the frame: its border, which is background.
    sampled = F.grid_sample(frames, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return F.avg_pool2d(sampled, fine)


def direction(clip: Frames, min_motion: float) -> str:
    """Direction in which the foreground's centroid moves: left, right, up or down; `none` below `min_motion`.

    min_motion: fraction of the shorter side. The displacement is the slope of the least-squares line through the
    centroids times the clip's length.
    """
    centre = centroids(foreground(to_float(clip)))
    valid = ~centre.isnan().any(1)
    if int(valid.sum()) < 2:
        return NO_DIRECTION
    time = torch.arange(len(clip), dtype=torch.float32)[valid]
    time = time - time.mean()
    slope = (time[:, None] * centre[valid]).sum(0) / (time * time).sum()
    down, right = (slope * (len(clip) - 1) / min(clip.shape[1:3])).tolist()
    if max(abs(down), abs(right)) < max(min_motion, 1e-9):
        return NO_DIRECTION
    if abs(right) > abs(down):
        return "right" if right > 0 else "left"
    return "down" if down > 0 else "up"


def to_float(clip: Frames) -> Tensor:
    """uint8 (T, H, W, 3) -> float32 (T, 3, H, W) in [0, 1]."""
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or not len(clip):
        raise ValueError(f"a clip must be uint8 (T, H, W, 3) with T > 0, found {clip.dtype} {clip.shape}")
    return torch.from_numpy(np.ascontiguousarray(clip)).permute(0, 3, 1, 2).float() / 255


# ------------------------------------------------------------------------------------- classifier


class ClassifierNet(nn.Module):
    """Three convolutions and two linear layers: crops (N, 3, S, S) -> features (N, 64) -> logits (N, classes)."""

    width = 64

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.penultimate = nn.Linear(64 * 16, self.width)
        self.head = nn.Linear(self.width, classes)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.penultimate(self.convolutions(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@dataclass(frozen=True)
class ClassifierOutput:
    """Predictions for n clips, averaged over frames: class names (n), their probabilities (n), features (n, 64)."""

    names: list[str]
    probabilities: list[float]
    features: NDArray[np.float32]


@dataclass(frozen=True)
class ClassifierInfo:
    """Metadata of a classifier: classes in the order of the head, input crop, training set and held-out accuracy."""

    classes: tuple[str, ...]
    size: int
    crop: Crop
    fingerprint: str = ""
    train_frames: int = 0
    held_out_correct: int = 0
    held_out_frames: int = 0

    @property
    def held_out_accuracy(self) -> float | None:
        return self.held_out_correct / self.held_out_frames if self.held_out_frames else None


class ClassifierFile(SealedSchema):
    """Metadata of a classifier's safetensors: its ClassifierInfo, and the digest of its weights."""

    classes: tuple[str, ...]
    size: Positive
    crop: Crop
    fingerprint: str
    train_frames: NonNegative
    held_out_correct: NonNegative
    held_out_frames: NonNegative
    tensors: Sha256


class ClipClassifier:
    """A trained classifier of clips: averages per-frame predictions."""

    def __init__(self, net: ClassifierNet, info: ClassifierInfo) -> None:
        self.net = net.eval()
        self.info = info

    @torch.no_grad()
    def predict(self, clips: Sequence[Frames]) -> ClassifierOutput:
        """Class probabilities and features of each clip, averaged over its frames."""
        names, probabilities, features = [], [], []
        for clip in clips:
            x = self.net.features(crops(clip, self.info.size, self.info.crop))
            p = self.net.head(x).softmax(-1).mean(0)
            best = int(p.argmax())
            names.append(self.info.classes[best])
            probabilities.append(float(p[best]))
            features.append(x.mean(0).numpy())
        return ClassifierOutput(
            names, probabilities, np.stack(features) if features else np.zeros((0, ClassifierNet.width), "f4")
        )

    def save(self, path: Path) -> None:
        with atomic_path(path) as temporary:
            state = self.net.state_dict()
            info = seal({**asdict(self.info), "tensors": digest_of(state)})
            save_file(state, temporary, metadata={"classifier": json.dumps(info)})

    @classmethod
    def load(cls, path: Path) -> ClipClassifier:
        """ValueError: not a file of a classifier, or a damaged one."""
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get("classifier")
                state = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: cannot be read ({error})") from error
        if text is None:
            raise ValueError(f"{path}: not a classifier (no `classifier` in its metadata)")
        fields = parse_json(text)
        check(fields, ClassifierFile, str(path))
        if fields["tensors"] != digest_of(state):
            raise ValueError(f"{path}: its weights are not what was written")
        del fields["sha256"], fields["tensors"]
        info = ClassifierInfo(**{**fields, "classes": tuple(fields["classes"])})
        net = ClassifierNet(len(info.classes))
        net.load_state_dict(state)
        return cls(net, info)


def train_classifier(
    images: Tensor, labels: Tensor, info: ClassifierInfo, steps: int = 600, seed: int = 0, batch_size: int = 128
) -> ClipClassifier:
    """Trains a classifier on crops `images` (n, 3, S, S) with `labels` (n); deterministic for a seed.

    Augmented by small rotations, scales, shifts, contrast and noise, so that slightly blurred samples of a generator
    are classified as a person would.
    """
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"training needs as many labels as images and at least one, found {len(labels)} and {len(images)}"
        )
    generator = torch.Generator().manual_seed(seed)
    net = ClassifierNet(len(info.classes))
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02, fused=True)
    for step in range(steps):
        # Linear warm-up over a tenth of the steps, then cosine decay to 0.
        warmup, decay = (step + 1) / max(1, steps // 10), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1.0, warmup) * decay
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        x = _augment(images[chosen], generator)
        loss = F.cross_entropy(net(x), labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return ClipClassifier(net, info)


def _augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation up to 9 degrees, scale 0.85 to 1.15, shift up to 6 % of the side, contrast 0.8 to 1.1, noise 0.05."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(x), generator=generator)

    angle, scale = draw(-0.15, 0.15), draw(0.85, 1.15)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    affine = torch.stack([cos, -sin, draw(-0.12, 0.12), sin, cos, draw(-0.12, 0.12)], 1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return x * draw(0.8, 1.1)[:, None, None, None] + 0.05 * torch.randn(x.shape, generator=generator)
