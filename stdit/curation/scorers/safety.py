"""Unsafe content: an image classifier's probability of the unsafe labels, the largest over the frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from stdit.curation.clips import ClipView
from stdit.curation.vision import fingerprint
from stdit.encoders.pretrained import from_pretrained, load_pretrained

VERSION = 1
READS = ()


class Safety:
    """path: folder or hub id of an image classifier; labels: those of its labels that are unsafe, such as [nsfw]."""

    def __init__(self, path: str, labels: Sequence[str]) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.processor: Any = from_pretrained(AutoImageProcessor, path)
        self.model: Any = load_pretrained(AutoModelForImageClassification, path).to(self.device).eval()
        known = {str(name).lower(): int(i) for i, name in self.model.config.id2label.items()}
        if absent := [label for label in labels if label.lower() not in known]:
            raise ValueError(f"labels: {path} has no {', '.join(absent)}; it has {', '.join(known)}")
        self.unsafe = [known[label.lower()] for label in labels]

    @staticmethod
    def fingerprint(path: str, labels: Sequence[str]) -> str:
        return fingerprint(path)

    @torch.no_grad()
    def __call__(self, clip: ClipView) -> float:
        assert clip.pictures is not None
        inputs = self.processor(images=[Image.fromarray(p) for p in clip.pictures], return_tensors="pt").to(self.device)
        return float(self.model(**inputs).logits.float().softmax(-1)[:, self.unsafe].sum(-1).max())
