"""The report of a run: report.json for programs, report.html for people, with pictures of both clips and losses.

    write_report(Path("runs/demo"), "demo", stages, seconds)

Pure reading and writing: scores were computed before (stdit.evaluation), pictures are drawn there as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.html import Pictures, page
from stdit.files import atomic_write

REPORT, PAGE, PICTURES = "report.json", "report.html", "report"
# Clips on the last stage's sheet, and on each earlier stage's.
LAST_CLIPS, EARLIER_CLIPS = 24, 12

Stage = Mapping[str, Any]


def write_report(
    out: Path, plan: str, stages: Sequence[Stage], seconds: float, data: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """Writes out/report.json, out/report.html and pictures in out/report/; returns the paths by what they are.

    stages, in the order of training: `name`, `steps`, `seconds`, and where there is one `run` (the run directory),
    `checkpoint`, `videos` (a folder of stdit.generate) and `scores` (of stdit.evaluate). seconds: the
    whole, from start to here. data: what else the reader should know, by heading (clips kept, forecast, …).
    """
    if not stages:
        raise ValueError("a report needs at least one stage, found 0")
    pictures = _draw(out / PICTURES, stages)
    last = stages[-1]["name"]
    paths = {"report": out / REPORT, "page": out / PAGE, "curves": pictures.curves}
    if last in pictures.sheets:
        paths |= {"sheet": pictures.sheets[last], "animation": pictures.animations[last]}
    report = {
        "plan": plan,
        "seconds": round(seconds, 1),
        "stages": [stage_scores(stage) for stage in stages],
        "data": dict(data or {}),
        "files": {name: str(path) for name, path in paths.items()},
    }
    atomic_write(out / REPORT, json.dumps(report, indent=1, ensure_ascii=False, default=str) + "\n")
    atomic_write(out / PAGE, page(report, pictures))
    return paths


def stage_scores(stage: Stage) -> dict[str, Any]:
    """A stage as report.json tells it. A score that was not or cannot be taken is null, never left out.

    The class's accuracy bears the name that the evaluation gave the class: digit_accuracy, say.
    """
    scores: Mapping[str, Any] = stage.get("scores") or {}
    name = scores.get("class_name", "class")
    real: Mapping[str, Any] = scores.get("real") or {}
    renamed = {"class_accuracy": f"{name}_accuracy"}
    keys = ("class_accuracy", "direction_accuracy", "frechet_distance", "kernel_distance")
    intervals: Mapping[str, Any] = scores.get("intervals") or {}
    return {
        "name": stage["name"],
        "steps": stage["steps"],
        "seconds": None if stage["seconds"] is None else round(stage["seconds"], 1),
        **{renamed.get(key, key): scores.get(key) for key in keys},
        "classifier_accuracy": scores.get("classifier_accuracy"),
        "class_name": name,
        "intervals": {f"{name if key == 'class' else key}_accuracy": value for key, value in intervals.items()},
        "real": {renamed.get(key, key): real.get(key) for key in keys} if real else None,
        "counts": scores.get("counts"),
        "confusion": scores.get("confusion"),
        "protocol": scores.get("protocol"),
        **{key: None if stage.get(key) is None else str(stage[key]) for key in ("run", "checkpoint", "videos")},
    }


def _draw(folder: Path, stages: Sequence[Stage]) -> Pictures:
    """Draws all pictures into `folder`; a stage without videos has none of its own."""
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
        verdicts = {row["file"]: row for row in (stage.get("scores") or {}).get("clips", [])}
        cells = [cell_of(clip.frames, verdicts.get(clip.file, {"prompt": clip.prompt})) for clip in clips]
        pictures.sheets[name] = folder / f"{name}.png"
        pictures.animations[name] = folder / f"{name}.gif"
        write_png(pictures.sheets[name], contact_sheet(cells))
        write_gif(pictures.animations[name], moving_sheet(cells), float(clips[0].row.get("fps") or 8))
    return pictures
