"""Pictures to judge a run by: clips with their captions and what was read in them, as a sheet and moving; loss curves.

Nothing here opens a window or keeps global state of matplotlib's.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from stdit.evaluation.classifier import Frames

# One dark ground, legible on light pages as on dark ones.
GROUND, PLATE, TEXT, FAINT, RIGHT, WRONG = "#14171c", "#20242c", "#e8eaed", "#9aa0a8", "#5fd38a", "#ff7b72"
GAP = 10
CAPTION_LINES = 3


@dataclass(frozen=True)
class Cell:
    """A clip, uint8 (T, H, W, 3), the caption it was made for, and a verdict; right: green or red, None: neither."""

    frames: Frames
    caption: str
    verdict: str = ""
    right: bool | None = None


def cell_of(frames: Frames, row: Mapping[str, Any]) -> Cell:
    """A cell from a row of scores["clips"]: what was read, and whether all that was asked for is there."""
    seen, right = [], []
    for wanted, found in (("class", "read"), ("direction", "moved")):
        if row.get(wanted) is None or row.get(found) is None:
            continue
        right.append(row[wanted] == row[found])
        seen.append(f"{row[found]}" if right[-1] else f"{row[found]} ✗")
    return Cell(
        frames, str(row.get("prompt") or ""), "read: " + " · ".join(seen) if seen else "", all(right) if right else None
    )


def sheet(cells: Sequence[Cell], columns: int = 4, side: int = 72, strip: int = 4) -> bytes:
    """PNG: each clip as a strip of at most `strip` frames from first to last, enlarged to about `side` pixels."""
    return _png(_draw(cells, [_strip(cell.frames, side, strip) for cell in cells], columns))


def animation(cells: Sequence[Cell], fps: float, columns: int = 6, side: int = 128) -> bytes:
    """GIF: all clips running side by side, the last frame held for half a second; shorter clips wait on their last."""
    length = max(len(cell.frames) for cell in cells)
    pages = [
        _draw(cells, [_enlarge(cell.frames[min(t, len(cell.frames) - 1)], side) for cell in cells], columns)
        for t in range(length)
    ]
    # One palette for all: colours would flicker otherwise.
    palette = pages[length // 2].quantize(128)
    pages = [page.quantize(palette=palette, dither=Image.Dither.NONE) for page in pages]
    each = max(20, round(1000 / fps)) if fps > 0 else 500
    durations = [each] * (length - 1) + [each + 500]
    out = io.BytesIO()
    pages[0].save(out, "GIF", save_all=True, append_images=pages[1:], duration=durations, loop=0, disposal=1)
    return out.getvalue()


def _draw(cells: Sequence[Cell], pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    """Plates in rows, each a picture with its caption and verdict below; all plates are of one size."""
    if not cells:
        raise ValueError("a sheet needs at least one clip, found 0")
    font, small = _font(12), _font(11)
    width = max(max(p.width for p in pictures), 110) + 2 * GAP
    tall = max(p.height for p in pictures)
    wrapped = [_wrap(cell.caption, font, width - 2 * GAP) for cell in cells]
    text_height = 16 * max(len(lines) for lines in wrapped)
    verdict_height = 17 if any(cell.verdict for cell in cells) else 0
    height = tall + text_height + verdict_height + 2 * GAP + 6
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + GAP) + GAP), GROUND)
    draw = ImageDraw.Draw(page)
    for i, (cell, picture, lines) in enumerate(zip(cells, pictures, wrapped, strict=True)):
        x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + GAP)
        draw.rounded_rectangle((x, y, x + width - 1, y + height - 1), 6, PLATE)
        page.paste(picture, (x + (width - picture.width) // 2, y + GAP))
        for k, line in enumerate(lines):
            draw.text((x + GAP, y + tall + GAP + 6 + 16 * k), line, TEXT, font)
        colour = FAINT if cell.right is None else RIGHT if cell.right else WRONG
        verdict = _wrap(cell.verdict, small, width - 2 * GAP)[:1]
        draw.text((x + GAP, y + height - GAP - 14), verdict[0] if verdict else "", colour, small)
    return page


def _enlarge(frame: np.ndarray, side: int) -> Image.Image:
    """Nearest neighbour by a whole factor, so that every pixel stays a square; what is larger than `side` is shrunk."""
    image = Image.fromarray(frame)
    longest = max(image.size)
    if longest > side:
        scale = side / longest
        return image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BOX
        )
    factor = max(1, round(side / longest))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _strip(frames: Frames, side: int, count: int) -> Image.Image:
    """At most `count` frames, the first and the last among them, beside each other."""
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    images = [_enlarge(frames[i], side) for i in chosen]
    strip = Image.new("RGB", (sum(i.width for i in images) + 2 * (len(images) - 1), images[0].height), PLATE)
    x = 0
    for image in images:
        strip.paste(image, (x, 0))
        x += image.width + 2
    return strip


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: captions may be in Greek, Cyrillic or Arabic."""
    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """`text` in at most CAPTION_LINES lines of `width` pixels, an ellipsis where it is cut; long words are broken."""
    lines: list[str] = []
    line = ""
    for word in text[:400].split():
        while font.getlength(word) > width:  # No blank to break at: break where it fits.
            fits = max(n for n in range(1, len(word) + 1) if n == 1 or font.getlength(word[:n]) <= width)
            lines, line, word = [*lines, *([line] if line else [])], word[:fits], word[fits:]
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
        else:
            lines, line = [*lines, line], word
    lines = [*lines, line] if line else lines
    if len(lines) <= CAPTION_LINES:
        return lines
    last = lines[CAPTION_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: CAPTION_LINES - 1], last + "…"]


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


# ------------------------------------------------------------------------------------ loss curves


def read_metrics(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of `loss` and `validation_loss` in a run's metrics.jsonl; empty where there are none.

    A last line cut short by a crash is passed over; a step logged twice, by a run that went on, counts once: the later.
    """
    series: dict[str, dict[int, float]] = {"loss": {}, "validation_loss": {}}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        for key, values in series.items():
            if isinstance(row.get(key), (int, float)) and "step" in row:
                values[int(row["step"])] = float(row[key])
    return {key: (np.array(sorted(v)), np.array([v[s] for s in sorted(v)])) for key, v in series.items()}


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The running mean over the last `window` values, over fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def loss_curves(runs: Sequence[tuple[str, Path]], dark: bool = False) -> bytes:
    """PNG: a panel for each (name, metrics.jsonl): training loss, smoothed over 2 % of its steps, and validation loss."""
    ink, grid = ("#e6e8eb", "#3a3f47") if dark else ("#24292f", "#d5d9de")
    figure = Figure(figsize=(max(4.2, 3.7 * len(runs)), 3.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, path) in zip(panels, runs, strict=True):
        series = read_metrics(path)
        steps, losses = series["loss"]
        if len(steps):
            axes.plot(steps, losses, color="#4c8dff", alpha=0.22, linewidth=0.7)
            axes.plot(
                steps, smooth(losses, max(1, len(losses) // 50)), color="#4c8dff", linewidth=1.6, label="training"
            )
        if len(series["validation_loss"][0]):
            axes.plot(
                *series["validation_loss"], "o-", color="#f0883e", markersize=3.5, linewidth=1.2, label="validation"
            )
        if not len(steps):
            axes.text(0.5, 0.5, "no losses logged", transform=axes.transAxes, ha="center", color=ink)
        axes.set_title(name, color=ink, fontsize=11)
        axes.set_xlabel("step", color=ink)
        axes.tick_params(colors=ink, labelsize=8)
        axes.grid(color=grid, linewidth=0.6)
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_color(grid)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(labelcolor=ink, facecolor="none", edgecolor=grid, fontsize=8)
    panels[0].set_ylabel("loss", color=ink)
    finite = np.concatenate([read_metrics(p)["loss"][1] for _, p in runs] or [np.zeros(0)])
    if len(finite := finite[np.isfinite(finite)]):
        # The first steps are far above all others; they may leave the picture.
        panels[0].set_ylim(max(0.0, float(finite.min()) * 0.9), float(np.quantile(finite, 0.99)) * 1.1)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=GROUND if dark else "#ffffff")
    return out.getvalue()
