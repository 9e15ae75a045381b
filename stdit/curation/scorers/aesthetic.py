"""Aesthetic score: CLIP or SigLIP embeddings through a linear head, mean over the frames (LAION's
improved-aesthetic-predictor).

`head`: .safetensors, or .pth of tensors: one linear layer, or several in a row without anything between, as LAION's
are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stdit.curation.clips import ClipView
from stdit.curation.vision import fingerprint, image_text_model
from stdit.weights.state_dict import read_file

VERSION = 1
READS = ()


class Aesthetic:
    """path: folder or hub id of the image-text model; head: its linear head. Also gives the clip's mean embedding, for
    `duplicates.embedding_similarity`."""

    def __init__(self, path: str, head: str) -> None:
        self.model = image_text_model(path)
        self.weight, self.bias = read_head(head)

    @staticmethod
    def fingerprint(path: str, head: str) -> str:
        return fingerprint(path, head)

    def __call__(self, clip: ClipView) -> dict[str, Any]:
        assert clip.pictures is not None
        embeddings = self.model.images(clip.pictures)
        if embeddings.shape[1] != self.weight.shape[1]:
            raise ValueError(f"the head takes {self.weight.shape[1]} features, the model gives {embeddings.shape[1]}")
        scores = embeddings @ self.weight.T + self.bias
        return {"": float(scores.mean()), "embedding": embeddings.mean(0).numpy()}


def read_head(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight (1, D), bias (1,)) of a linear head.

    ValueError: a damaged file, other content than tensors, layers that don't follow one another, or more than one
    output.
    """
    tensors = read_file(Path(path))
    if not isinstance(tensors, dict) or not all(
        isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()
    ):
        raise ValueError(f"head {path}: expected tensors by name")
    names = sorted(
        (n for n in tensors if n.endswith("weight")), key=lambda n: [int(p) if p.isdigit() else p for p in n.split(".")]
    )
    if not names:
        raise ValueError(f"head {path}: no weight in it; tensors: {', '.join(tensors)}")
    weight, bias = None, None
    for name in names:
        w = tensors[name].float()
        if w.ndim != 2:
            raise ValueError(f"head {path}: {name} has shape {tuple(w.shape)}, expected (outputs, features)")
        b = tensors.get(f"{name.removesuffix('weight')}bias", torch.zeros(len(w))).float()
        if b.shape != w.shape[:1]:
            raise ValueError(f"head {path}: {name} has {len(w)} outputs, its bias shape {tuple(b.shape)}")
        if weight is not None and w.shape[1] != len(weight):
            raise ValueError(f"head {path}: {name} takes {w.shape[1]} features, the layer before gives {len(weight)}")
        weight, bias = (w, b) if weight is None or bias is None else (w @ weight, w @ bias + b)
    assert weight is not None
    assert bias is not None
    if len(weight) != 1:
        raise ValueError(f"head {path}: {len(weight)} outputs, expected 1")
    return weight, bias
