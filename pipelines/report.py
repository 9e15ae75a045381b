"""The report of a plan: report.json, report.html, and pictures of clips and losses.

    write_report(Path("runs/demo"), "demo", stages, seconds)

Reads and writes only: metrics are computed before (stdit.evaluation).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.html import Pictures, render_html
from stdit.files import atomic_write

REPORT, HTML, PICTURES = "report.json", "report.html", "report"
# What a plan writes directly into its run_dir, besides plan.json and its parts' folders: claimed before anything is
# begun.
OUTPUTS = (REPORT, HTML, PICTURES, "evaluation", "ray")
# With fewer clips on a side, the kernel distance says nothing: its spread is larger than what it measures.
LEAST_FOR_KERNEL_DISTANCE = 25
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
    """A stage in report.json. A metric that was not measured is null, never absent, and `absent` says why; class
    accuracy has the name of the class: digit_accuracy. `previous`: metrics of the stage before at this stage's
    shape."""
    metrics: Mapping[str, Any] = stage.get("metrics") or {}
    previous = metrics.get("previous")
    found = _metrics(metrics)
    return {
        "name": stage["name"],
        "steps": stage["steps"],
        "seconds": None if stage["seconds"] is None else round(stage["seconds"], 1),
        **found,
        "absent": _reasons(metrics, found),
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
    few = (metrics.get("counts") or {}).get("frechet_generated", LEAST_FOR_KERNEL_DISTANCE) < LEAST_FOR_KERNEL_DISTANCE
    return {
        **{renamed.get(key, key): metrics.get(key) for key in keys},
        **({"kernel_distance": None} if few else {}),
        "classifier_accuracy": metrics.get("classifier_accuracy"),
        "class_name": name,
        "intervals": {f"{name if key == 'class' else key}_accuracy": value for key, value in intervals.items()},
        "real": {renamed.get(key, key): real.get(key) for key in keys} if real else None,
        "counts": metrics.get("counts"),
        "protocol": metrics.get("protocol"),
    }


def _reasons(metrics: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """Why each metric that is null was not measured."""
    name = found["class_name"]
    accuracies = (f"{name}_accuracy", "direction_accuracy")
    absent = [
        k for k in (*accuracies, "frechet_distance", "kernel_distance", "classifier_accuracy") if found[k] is None
    ]
    if not metrics:
        return dict.fromkeys(absent, "the plan has no evaluation of this stage")
    settings: Mapping[str, Any] = metrics.get("settings") or {}
    counts: Mapping[str, Any] = metrics.get("counts") or {}
    still = (metrics.get("protocol") or {}).get("frames") == 1
    no_classifier = metrics.get("classifier_accuracy") is None
    unclassified = (
        "class_column is null" if settings and settings.get("class_column") is None
        else "the train split has fewer than two classes to tell apart"
    )  # fmt: skip
    measured = counts.get("frechet_generated", 0)
    few = f"{counts.get('generated', 0)} generated and {counts.get('real', 0)} held-out clips are too few"
    least = f"{measured} clips are fewer than the {LEAST_FOR_KERNEL_DISTANCE} that it takes"
    reasons = {
        f"{name}_accuracy": unclassified if no_classifier else "no prompt has a class",
        "direction_accuracy": "stills do not move" if still
        else "direction_column is null" if settings and settings.get("direction_column") is None
        else "no prompt has a direction",
        "frechet_distance": f"it needs a classifier: {unclassified}" if no_classifier else few,
        "kernel_distance": f"it needs a classifier: {unclassified}" if no_classifier else least if measured >= 2 else few,
        "classifier_accuracy": unclassified,
    }  # fmt: skip
    return {key: reasons[key] for key in absent}


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
        clips, _ = read_generated(Path(stage["videos"]))
        clips = _different_captions_first(clips)[: LAST_CLIPS if last else EARLIER_CLIPS]
        rows = {row["file"]: row for row in (stage.get("metrics") or {}).get("clips", [])}
        cells = [cell_of(clip.frames, rows.get(clip.file, {"prompt": clip.prompt})) for clip in clips]
        pictures.sheets[name] = folder / f"{name}.png"
        pictures.animations[name] = folder / f"{name}.gif"
        write_png(pictures.sheets[name], contact_sheet(cells))
        write_gif(pictures.animations[name], moving_sheet(cells), float(clips[0].row.get("fps") or 8))
    return pictures


def _different_captions_first(clips: Sequence[Any]) -> list[Any]:
    """The first clip of each caption, then the second of each, and so on, in their order: a sheet of many captions."""
    seen: Counter[str] = Counter()
    numbered = []
    for clip in clips:
        numbered.append((seen[clip.prompt], clip))
        seen[clip.prompt] += 1
    return [clip for _, clip in sorted(numbered, key=lambda pair: pair[0])]
