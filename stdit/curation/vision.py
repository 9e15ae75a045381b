"""Image-text models (CLIP, SigLIP, …) of transformers by path, as scorers use them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stdit.encoders.pretrained import from_pretrained, load_pretrained
from stdit.files import fingerprint_files


class ImageTextModel:
    """Embeddings of frames and texts, float32 on the CPU, of length 1."""

    def __init__(self, path: str) -> None:
        from transformers import AutoModel, AutoProcessor

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = from_pretrained(AutoProcessor, path)
        self.model: Any = load_pretrained(AutoModel, path).to(self.device).eval()
        if not hasattr(self.model, "get_image_features") or not hasattr(self.model, "get_text_features"):
            raise ValueError(f"{path}: {type(self.model).__name__} has no image and text features")

    @torch.no_grad()
    def images(self, pictures: np.ndarray) -> Tensor:
        """uint8 (N, H, W, 3) -> (N, D)."""
        inputs = self.processor(images=[Image.fromarray(p) for p in pictures], return_tensors="pt").to(self.device)
        return _unit(self.model.get_image_features(**inputs))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(N, D); longer texts are cut at the model's limit."""
        # SigLIP was trained with all texts padded to its limit.
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        inputs = self.processor(text=list(texts), padding=padding, truncation=True, return_tensors="pt").to(self.device)
        return _unit(self.model.get_text_features(**inputs))


@lru_cache(maxsize=2)
def image_text_model(path: str) -> ImageTextModel:
    """One model for all scorers of a process that name the same path."""
    return ImageTextModel(path)


def fingerprint(*paths: str) -> str:
    """Of weights in files or folders; a hub id stands for itself. ValueError: a file that is not there."""
    found = []
    for path in map(Path, paths):
        if path.suffix in (".safetensors", ".pth", ".pt", ".bin") and not path.is_file():
            raise ValueError(f"{path}: no such file")
        files = sorted(f for f in path.glob("*") if f.is_file()) if path.is_dir() else [path] if path.is_file() else []
        found.append(fingerprint_files(files) if files else str(path))
    return " ".join(found)


def _unit(features: Any) -> Tensor:
    features = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
