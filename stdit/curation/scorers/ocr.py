"""Text on screen, watermarks: share of the picture's area that text covers, and the text, by RapidOCR
(`pip install '.[ocr]'`).

Its models (PP-OCR) ship inside the package, so that it runs offline.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stdit.curation.clips import ClipView

VERSION = 1
READS = ()


class TextOnScreen:
    """min_score: least confidence of a line of text. Columns NAME_area (median over the frames) and NAME_text (of the
    middle one)."""

    def __init__(self, min_score: float = 0.6) -> None:
        try:
            from rapidocr import RapidOCR  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(f"needs RapidOCR: pip install '.[ocr]' ({error})") from error
        self.engine: Any = RapidOCR(params={"Global.log_level": "error"})
        self.min_score = min_score

    def __call__(self, clip: ClipView) -> dict[str, Any]:
        assert clip.pictures is not None
        areas, texts = [], []
        for picture in clip.pictures:
            found = self.engine(np.ascontiguousarray(picture[..., ::-1]))  # BGR
            lines = [] if found.boxes is None else zip(found.boxes, found.txts, found.scores, strict=True)
            kept = [(np.asarray(box), text) for box, text, score in lines if score >= self.min_score]
            areas.append(sum(_area(box) for box, _ in kept) / (picture.shape[0] * picture.shape[1]))
            texts.append(" ".join(text for _, text in kept))
        return {"area": float(np.median(areas)), "text": texts[len(texts) // 2]}


def _area(box: np.ndarray) -> float:
    """Of a polygon (4, 2), by the shoelace formula."""
    x, y = box[:, 0], box[:, 1]
    return 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
