"""Image-text similarity: cosine of the caption's embedding with those of the frames (CLIP score), mean over them.

null: the clip has no caption of its own.
"""

from __future__ import annotations

from typing import Any

from stdit.curation.clips import ClipView
from stdit.curation.vision import fingerprint, image_text_model

VERSION = 1
READS = ("caption",)


class Similarity:
    """path: folder or hub id of an image-text model."""

    def __init__(self, path: str) -> None:
        self.model = image_text_model(path)

    @staticmethod
    def fingerprint(path: str) -> str:
        return fingerprint(path)

    def __call__(self, clip: ClipView) -> dict[str, Any]:
        assert clip.pictures is not None
        embeddings = self.model.images(clip.pictures)
        found = None if not clip.caption else float((embeddings @ self.model.texts([clip.caption]).T).mean())
        return {"": found, "embedding": embeddings.mean(0).numpy()}
