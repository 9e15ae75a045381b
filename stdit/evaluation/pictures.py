"""Pictures to judge a run by: clips with their captions and what was read in them, as a sheet and moving; loss curves.

Nothing here opens a window or keeps global state of matplotlib's.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stdit import metrics_log
from stdit.evaluation.classifier import Frames
from stdit.media import GROUND, Cell


def cell_of(frames: Frames, row: Mapping[str, Any]) -> Cell:
    """A cell from a row of metrics["clips"]: predicted class and direction, and whether all are as requested."""
    predictions, correct = [], []
    for key in ("class", "direction"):
        requested, predicted = row.get(key), row.get(f"predicted_{key}")
        if requested is None or predicted is None:
            continue
        correct.append(requested == predicted)
        predictions.append(f"{predicted}" if correct[-1] else f"{predicted} ✗")
    verdict = "predicted: " + " · ".join(predictions) if predictions else ""
    return Cell(frames, str(row.get("prompt") or ""), verdict, all(correct) if correct else None)


# ------------------------------------------------------------------------------------ loss curves


def read_losses(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of `loss` and `validation_loss` in a run's metrics.jsonl; empty where there are none.

    A step that a resumed run logged twice counts once: the later.
    """
    entries = metrics_log.read(path)
    series = {}
    for key in ("loss", "validation_loss"):
        values = {e["step"]: float(e[key]) for e in entries if isinstance(e.get(key), int | float)}
        series[key] = np.array(sorted(values)), np.array([values[step] for step in sorted(values)])
    return series


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """The running mean over the last `window` values, over fewer at the start."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)


def loss_curves(runs: Sequence[tuple[str, Path]], dark: bool = False) -> bytes:
    """PNG: a panel for each (name, metrics.jsonl): training loss, smoothed over 2 % of its steps, and validation
    loss."""
    ink, grid = ("#e6e8eb", "#3a3f47") if dark else ("#24292f", "#d5d9de")
    figure = Figure(figsize=(max(4.2, 3.7 * len(runs)), 3.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
    for axes, (name, path) in zip(panels, runs, strict=True):
        series = read_losses(path)
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
    finite = np.concatenate([read_losses(p)["loss"][1] for _, p in runs] or [np.zeros(0)])
    if len(finite := finite[np.isfinite(finite)]):
        # The first steps are far above all others; they may leave the picture.
        panels[0].set_ylim(max(0.0, float(finite.min()) * 0.9), float(np.quantile(finite, 0.99)) * 1.1)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor=GROUND if dark else "#ffffff")
    return out.getvalue()
