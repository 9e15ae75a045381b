"""Metrics as text: numbers, and a table with one line a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def percent(fraction: float | None) -> str:
    return "n/a" if fraction is None else f"{100 * fraction:.1f} %"


def number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}"


def metrics_table(results: Mapping[str, dict[str, Any] | str]) -> str:
    """A line a run, with real held-out clips (the upper bound) in brackets; then the errors (str) of failed runs."""
    metrics = {name: m for name, m in results.items() if not isinstance(m, str)}
    class_name = next((m["class_name"] for m in metrics.values()), "class")
    rows: list[tuple[str, ...]] = [
        ("run", "step", "weights", "shape", "clips", class_name, "direction", "Fréchet", "KID", "classifier")
    ]
    for name, m in metrics.items():
        real, protocol = m["real"], m["protocol"]
        shape = f"{protocol['frames']}x{protocol['height']}x{protocol['width']}"
        accuracies = [f"{percent(m[k])} [{percent(real[k])}]" for k in ("class_accuracy", "direction_accuracy")]
        distances = [f"{number(m[k])} [{number(real[k])}]" for k in ("frechet_distance", "kernel_distance")]
        sampling = (str(protocol.get("step")), str(protocol.get("weights")), shape, str(m["counts"]["generated"]))
        rows.append((name, *sampling, *accuracies, *distances, percent(m["classifier_accuracy"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if metrics:
        lines.append("in brackets: real held-out clips, at the same shape and count")
    lines += [f"{name}: {error}" for name, error in results.items() if isinstance(error, str)]
    return "\n".join(lines)
