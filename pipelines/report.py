"""The report of a plan: report.json, report.html, and pictures of clips and losses.

    write_report(Path("runs/demo"), "demo", stages, seconds)

Reads and writes only: metrics are computed before (stdit.evaluation).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.html import Pictures, render_html
from stdit.files import atomic_write

REPORT, HTML, PICTURES = "report.json", "report.html", "report"
# Clips on the contact sheet of the last stage, and of earlier ones.
LAST_CLIPS, EARLIER_CLIPS = 24, 12

Stage = Mapping[str, Any]


def write_report(
    out: Path, plan: str, stages: Sequence[Stage], seconds: float, data: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """Writes out/report.json, out/report.html and pictures in out/report/; returns the paths by what they are.

    stages, in training order: `name`, `steps`, `seconds`, and optionally `run` (the run directory), `checkpoint`,
    `videos` (a folder of stdit.generate) and `metrics` (of stdit.evaluate). seconds: of the whole plan. data: further
    sections by heading (forecast, …).
    """
    if not stages:
        raise ValueError("a report needs at least one stage, found 0")
    pictures = _draw(out / PICTURES, stages)
    last = stages[-1]["name"]
    paths = {"report": out / REPORT, "html": out / HTML, "curves": pictures.curves}
    if last in pictures.sheets:
        paths |= {"sheet": pictures.sheets[last], "animation": pictures.animations[last]}
    report = {
        "plan": plan,
        "seconds": round(seconds, 1),
        "stages": [stage_report(stage) for stage in stages],
        "data": dict(data or {}),
        "files": {name: str(path) for name, path in paths.items()},
    }
    atomic_write(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    atomic_write(out / HTML, render_html(report, pictures))
    return paths


def stage_report(stage: Stage) -> dict[str, Any]:
    """A stage in report.json. A metric that was not measured is null, never absent; class accuracy has the name of the
    class: digit_accuracy. `previous`: metrics of the stage before at this stage's shape."""
    metrics: Mapping[str, Any] = stage.get("metrics") or {}
    previous = metrics.get("previous")
    return {
        "name": stage["name"],
        "steps": stage["steps"],
        "seconds": None if stage["seconds"] is None else round(stage["seconds"], 1),
        **_metrics(metrics),
        "confusion": metrics.get("confusion"),
        "previous": {"name": previous["name"], **_metrics(previous)} if previous else None,
        **{key: None if stage.get(key) is None else str(stage[key]) for key in ("run", "checkpoint", "videos")},
    }


def _metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    name = metrics.get("class_name", "class")
    real: Mapping[str, Any] = metrics.get("real") or {}
    renamed = {"class_accuracy": f"{name}_accuracy", "class_confidence": f"{name}_confidence"}
    keys = ("class_accuracy", "class_confidence", "direction_accuracy", "frechet_distance", "kernel_distance")
    intervals: Mapping[str, Any] = metrics.get("intervals") or {}
    return {
        **{renamed.get(key, key): metrics.get(key) for key in keys},
        "classifier_accuracy": metrics.get("classifier_accuracy"),
        "class_name": name,
        "intervals": {f"{name if key == 'class' else key}_accuracy": value for key, value in intervals.items()},
        "real": {renamed.get(key, key): real.get(key) for key in keys} if real else None,
        "counts": metrics.get("counts"),
        "protocol": metrics.get("protocol"),
    }


def _draw(folder: Path, stages: Sequence[Stage]) -> Pictures:
    """Draws all pictures into `folder`; none for a stage without videos."""
    from stdit.evaluation.generated import read_generated
    from stdit.evaluation.pictures import cell_of, loss_curves
    from stdit.media import contact_sheet, moving_sheet, write_gif, write_png

    runs = [(stage["name"], Path(stage["run"]) / "metrics.jsonl") for stage in stages if stage.get("run")]
    pictures = Pictures(folder / "loss.png", folder / "loss-dark.png", {}, {})
    for path, dark in ((pictures.curves, False), (pictures.curves_dark, True)):
        atomic_write(path, loss_curves(runs, dark))
    for i, stage in enumerate(stages):
        if not stage.get("videos"):
            continue
        name, last = stage["name"], i == len(stages) - 1
        clips, _ = read_generated(Path(stage["videos"]), LAST_CLIPS if last else EARLIER_CLIPS)
        rows = {row["file"]: row for row in (stage.get("metrics") or {}).get("clips", [])}
        cells = [cell_of(clip.frames, rows.get(clip.file, {"prompt": clip.prompt})) for clip in clips]
        pictures.sheets[name] = folder / f"{name}.png"
        pictures.animations[name] = folder / f"{name}.gif"
        write_png(pictures.sheets[name], contact_sheet(cells))
        write_gif(pictures.animations[name], moving_sheet(cells), float(clips[0].row.get("fps") or 8))
    return pictures
