"""Feature networks of published scores, by path: one medium in, its feature rows out.

A medium is evaluated by itself, on one thread unless configured: features don't depend on batches, order or workers.
Preprocessing is part of a score's definition and of its protocol (`resizing`).

T frames · H height · W width · D feature width
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from stdit.config import NetworkPaths
from stdit.encoders.pretrained import from_pretrained, load_pretrained
from stdit.evaluation import video_quality
from stdit.evaluation.inception import ORIGINAL_SHA256, load_inception
from stdit.files import check_regular, fingerprint_files, read_json, sha256

Frames = NDArray[np.uint8]  # (T, H, W, 3)
Rows = dict[str, NDArray[np.float32]]  # name -> (D,)

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class NetworkError(ValueError):
    """Weights that are unreadable, or not those that define a score."""


class MissingWeights(NetworkError):
    """No weights at the configured path, or no path."""


class Network(ABC):
    """Features of one medium. `key`: of NetworkPaths. Loaded on first use; picklable before."""

    key = ""
    resizing = "none"

    def __init__(self, path: Path | None = None, device: str = "cpu") -> None:
        self.path, self.device = path, device

    @property
    def width(self) -> int:
        """Dimensions of `features`; 0: it has none."""
        return 0

    @property
    def folder(self) -> Path:
        assert self.path is not None
        return self.path

    @cached_property
    def sha256(self) -> str:
        """Of the weights: a file's, or over a folder's config and safetensors; empty without weights."""
        if self.path is None:
            return ""
        if self.folder.is_file():
            return sha256(self.folder)
        files = sorted(p for p in self.folder.glob("*") if p.suffix in (".json", ".safetensors"))
        return fingerprint_files(files, sha256)

    @property
    def identity(self) -> dict[str, str]:
        """What decides its features."""
        return {"network": self.key, "sha256": self.sha256, "resizing": self.resizing}

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def check(self) -> None:
        """NetworkError: weights that cannot be used. Loads nothing large."""
        if self.path is not None and not self.path.exists():
            raise MissingWeights(f"networks.{self.key}: {self.path}: no such file or folder")

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        """Why it cannot take media of this shape (T, H, W); None: it can."""
        return None

    @abstractmethod
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        """Feature rows of one medium."""


class NoNetwork(Network):
    """VBench's temporal flickering, and measures of motion, which need no weights."""

    key = "none"

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        return None if shape[0] >= 3 else f"of videos of 3 frames or more, these have {shape[0]}"

    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        measures = (
            video_quality.temporal_flickering,
            video_quality.linear_motion_smoothness,
            video_quality.vmaf_motion,
        )
        return {measure.__name__: np.array([measure(frames)], np.float32) for measure in measures}


class FileNetwork(Network):
    """One published file of weights, known by its hash."""

    expected_sha256 = ""  # or its beginning
    known_as = ""

    def check(self) -> None:
        super().check()
        if not self.folder.is_file():
            raise NetworkError(f"networks.{self.key}: {self.folder}: expected a file")
        if not self.sha256.startswith(self.expected_sha256):
            raise NetworkError(
                f"networks.{self.key}: {self.folder} has SHA-256 {self.sha256[:16]}…; {self.known_as} has "
                f"{self.expected_sha256[:16]}…"
            )


class Inception(FileNetwork):
    key = "inception"
    resizing = "bilinear to 299x299 as TensorFlow 1, no antialiasing"
    expected_sha256 = ORIGINAL_SHA256
    known_as = f"pt_inception-2015-12-05-{ORIGINAL_SHA256}.pth, which defines FID, KID and the Inception Score,"

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        return _images_only(shape)

    @property
    def width(self) -> int:
        return 2048

    @cached_property
    def _net(self) -> Any:
        return load_inception(self.folder).to(self.device)

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        features, logits = self._net(_channels_first(frames).to(self.device))
        return {"features": _array(features[0]), "logits": _array(logits[0])}


class TransformersNetwork(Network):
    """A folder of transformers. architecture: its class there; expected: keys of its config.json that define the score,
    "a.b" for a nested one."""

    architecture = ""
    expected: dict[str, Any] = {}  # noqa: RUF012 (of the class)
    known_as = ""

    @cached_property
    def config(self) -> dict[str, Any]:
        try:
            return read_json(self.folder / "config.json")
        except ValueError as error:
            raise NetworkError(f"networks.{self.key}: {self.folder}: no readable config.json ({error})") from error

    def check(self) -> None:
        super().check()
        try:
            check_regular(self.folder)
        except ValueError as error:
            raise NetworkError(f"networks.{self.key}: {error}") from error
        self.matches(self.expected, self.known_as)
        if not any(self.folder.glob("*.safetensors")):
            raise NetworkError(f"networks.{self.key}: {self.folder}: holds no .safetensors")

    @property
    def width(self) -> int:
        return int(self.config.get("hidden_size", 0))

    def matches(self, expected: dict[str, Any], known_as: str) -> None:
        """NetworkError: the config differs from the network that defines a score."""
        for key, value in expected.items():
            found: Any = self.config
            for part in key.split("."):
                found = found.get(part) if isinstance(found, dict) else None
            if found != value:
                raise NetworkError(
                    f"networks.{self.key}: {self.folder}/config.json: {key} is {found!r}; {known_as} has {value!r}"
                )

    @cached_property
    def _net(self) -> Any:
        import transformers

        try:
            # Features are taken before pooler and predictor, which published folders may lack.
            kind, options = (
                getattr(transformers, self.architecture),
                {"local_files_only": True, "use_safetensors": True},
            )
            model = load_pretrained(kind, self.folder, ("pooler.", "predictor."), dtype=torch.float32, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise NetworkError(f"networks.{self.key}: {self.folder}: {error}") from error
        return model.eval().requires_grad_(False).to(self.device)


class DinoV2(TransformersNetwork):
    key = "dinov2"
    architecture = "Dinov2Model"
    resizing = "Pillow bicubic to 224x224 in 8 bits, as dgm-eval"
    known_as = "DINOv2 ViT-L/14, which defines FD-DINOv2,"
    expected = {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "patch_size": 14}  # noqa: RUF012

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        return _images_only(shape)

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        image = Image.fromarray(frames[0]).resize((224, 224), Image.Resampling.BICUBIC)
        x = _normalized(np.asarray(image)[None], IMAGENET).to(self.device)
        return {"features": _array(self._net(x).pooler_output[0])}


class Clip(TransformersNetwork):
    """CLIP score (any CLIP; its hash is in the protocol), and the frame features of VBench's background consistency."""

    key = "clip"
    architecture = "CLIPModel"
    resizing = (
        "score: Pillow bicubic, shorter side to the model's size, centre crop; consistency: bicubic, no antialiasing"
    )
    expected = {"model_type": "clip"}  # noqa: RUF012
    known_as = "CLIP"
    # VBench's: ViT-B/32.
    vbench = {"vision_config.patch_size": 32, "vision_config.hidden_size": 768}  # noqa: RUF012

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return from_pretrained(AutoTokenizer, self.folder, local_files_only=True)

    @property
    def size(self) -> int:
        return int(self._net.config.vision_config.image_size)

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        found: Rows = {}
        if prompt is not None:
            x = np.stack([_shortest_edge(image, self.size, Image.Resampling.BICUBIC) for image in frames])
            images = self._image_features(_normalized(x, CLIP))
            tokens = self._tokenizer([prompt], truncation=True, return_tensors="pt").to(self.device)
            text = _pooled(self._net.get_text_features(**tokens))
            similarity = F.cosine_similarity(images, text).clamp_min(0).mean()
            found["clip_score"] = _array(100 * similarity[None])
        if len(frames) > 1:
            x = _interpolated(frames, 224, "bicubic")
            top, left = (x.shape[2] - 224) // 2, (x.shape[3] - 224) // 2
            x = _standardized(x[:, :, top : top + 224, left : left + 224] / 255, CLIP)
            found["consistency"] = _consistency(self._image_features(x))
        return found

    def _image_features(self, x: Tensor) -> Tensor:
        return _pooled(
            self._net.get_image_features(
                pixel_values=x.to(self.device), interpolate_pos_encoding=x.shape[-1] != self.size
            )
        )


class Dino(TransformersNetwork):
    """VBench's subject consistency."""

    key = "dino"
    architecture = "ViTModel"
    resizing = "bilinear, shorter side to 224, no antialiasing, as VBench"
    known_as = "DINO ViT-B/16, which defines VBench's subject consistency,"
    expected = {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "patch_size": 16}  # noqa: RUF012

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        return _videos_only(shape)

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        x = _standardized(_interpolated(frames, 224, "bilinear") / 255, IMAGENET).to(self.device)
        states = self._net(x, interpolate_pos_encoding=True).last_hidden_state
        return {"consistency": _consistency(states[:, 0])}


class I3D(FileNetwork):
    """FVD's network: i3d_torchscript.pt of StyleGAN-V, which resizes to 224 and rescales by itself."""

    key = "i3d"
    resizing = "by i3d_torchscript.pt itself: bilinear to 224x224"
    expected_sha256 = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"  # of 51,235,320 bytes
    known_as = "i3d_torchscript.pt, which defines FVD,"

    @property
    def width(self) -> int:
        return 400

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        return None if shape[0] >= 10 else f"I3D takes 10 frames or more, these have {shape[0]}"

    @cached_property
    def _net(self) -> Any:
        try:
            return torch.jit.load(str(self.folder), map_location=self.device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[-1]
            raise NetworkError(f"networks.i3d: {self.folder}: not a TorchScript file ({reason})") from error

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        video = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None].float().to(self.device)
        try:
            features = self._net(video, rescale=True, resize=True, return_features=True)
        except RuntimeError as error:
            raise NetworkError(
                f"networks.i3d: {self.folder}: expected forward(video, rescale, resize, return_features) of i3d_torchscript.pt"
            ) from error
        if features.shape != (1, 400):
            raise NetworkError(f"networks.i3d: {self.folder}: gives features {tuple(features.shape)}, I3D (1, 400)")
        return {"features": _array(features[0])}


class VideoMAE(TransformersNetwork):
    key = "videomae"
    architecture = "VideoMAEModel"
    resizing = "16 frames evenly spaced; Pillow bilinear, shorter side to 224, centre crop"
    expected = {"model_type": "videomae"}  # noqa: RUF012
    known_as = "VideoMAE"

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        count = int(self.config.get("num_frames", 16))
        return None if shape[0] >= count else f"this VideoMAE takes {count} frames, these have {shape[0]}"

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        config = self._net.config
        x = _video(frames, config.num_frames, config.image_size, IMAGENET).to(self.device)
        return {"features": _array(self._net(x).last_hidden_state.mean(1)[0])}


class VJEPA2(TransformersNetwork):
    key = "vjepa2"
    architecture = "VJEPA2Model"
    resizing = (
        "at most frames_per_clip frames, evenly spaced; Pillow bilinear, shorter side to the model's size, centre crop"
    )
    expected = {"model_type": "vjepa2"}  # noqa: RUF012
    known_as = "V-JEPA 2"

    def limits(self, shape: tuple[int, int, int]) -> str | None:
        least = int(self.config.get("tubelet_size", 2))
        return None if shape[0] >= least else f"V-JEPA 2 takes {least} frames or more, these have {shape[0]}"

    @torch.no_grad()
    def rows(self, frames: Frames, prompt: str | None) -> Rows:
        config = self._net.config
        count = min(len(frames), config.frames_per_clip) // config.tubelet_size * config.tubelet_size
        x = _video(frames, count, config.crop_size, IMAGENET).to(self.device)
        return {"features": _array(self._net(x, skip_predictor=True).last_hidden_state.mean(1)[0])}


NETWORKS: dict[str, type[Network]] = {
    network.key: network for network in (NoNetwork, Inception, DinoV2, Clip, Dino, I3D, VideoMAE, VJEPA2)
}


def find_network(key: str, paths: NetworkPaths, device: str = "cpu") -> Network:
    """MissingWeights: no path, or nothing there. NetworkError: other weights than the ones that define its scores."""
    path = None if key == NoNetwork.key else getattr(paths, key)
    if path is None and key != NoNetwork.key:
        raise MissingWeights(f"no weights: networks.{key} is not set")
    network = NETWORKS[key](path, device)
    network.check()
    return network


# ---------------------------------------------------------------------------------------- pixels


def _images_only(shape: tuple[int, int, int]) -> str | None:
    return None if shape[0] == 1 else f"of images; these are videos of {shape[0]} frames"


def _videos_only(shape: tuple[int, int, int]) -> str | None:
    return None if shape[0] > 1 else "of videos; these are images"


def _array(x: Tensor) -> NDArray[np.float32]:
    return x.float().cpu().numpy()


def _channels_first(frames: Frames) -> Tensor:
    return torch.from_numpy(frames.copy()).permute(0, 3, 1, 2)


def _normalized(frames: Frames, moments: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """uint8 (T, H, W, 3) -> float32 (T, 3, H, W), standardized."""
    return _standardized(_channels_first(frames).float() / 255, moments)


def _standardized(x: Tensor, moments: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    mean, std = (torch.tensor(m, device=x.device)[:, None, None] for m in moments)
    return (x - mean) / std


def _interpolated(frames: Frames, size: int, mode: str) -> Tensor:
    """Shorter side to `size`, in floating point and without antialiasing: (T, 3, h, w), 0 to 255."""
    height, width = frames.shape[1:3]
    short = min(height, width)
    return F.interpolate(
        _channels_first(frames).float(),
        (int(size * height / short), int(size * width / short)),
        mode=mode,
        align_corners=False,
    )


def _shortest_edge(image: NDArray[np.uint8], size: int, resample: Image.Resampling) -> NDArray[np.uint8]:
    """Shorter side to `size` by Pillow, then the centre (size, size, 3)."""
    height, width = image.shape[:2]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    resized = np.asarray(Image.fromarray(image).resize((width, height), resample))
    top, left = (height - size) // 2, (width - size) // 2
    return resized[top : top + size, left : left + size]


def _video(frames: Frames, count: int, size: int, moments: tuple[tuple[float, ...], tuple[float, ...]]) -> Tensor:
    """`count` evenly spaced frames, (1, count, 3, size, size)."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    return _normalized(np.stack([_shortest_edge(frames[i], size, Image.Resampling.BILINEAR) for i in chosen]), moments)[
        None
    ]


def _pooled(output: Any) -> Tensor:
    """The embedding of get_image_features or get_text_features."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _consistency(features: Tensor) -> NDArray[np.float32]:
    return np.array([video_quality.consistency(features.double().cpu().numpy())], np.float32)
