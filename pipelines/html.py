"""report.html: one self-contained file without network access or scripts; light and dark."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.evaluation.tables import number, percent


@dataclass(frozen=True)
class Pictures:
    """Paths of pictures: loss curves (light and dark), and by stage a sheet (PNG) and an animation (GIF)."""

    curves: Path
    curves_dark: Path
    sheets: dict[str, Path]
    animations: dict[str, Path]


_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --faint: #59636e; --ground: #ffffff; --plate: #f4f6f8;
  --line: #d8dee4; --accent: 9, 105, 218; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #9aa3ad; --ground: #14171c; --plate: #20242c;
  --line: #343a44; --accent: 88, 166, 255; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 70rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.25rem; }
p { max-width: 46rem; } .faint { color: var(--faint); font-size: .88rem; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; }
.card { background: var(--plate); border-radius: 8px; padding: .8rem 1.1rem; min-width: 10rem; }
.card b { display: block; font-size: 1.8rem; line-height: 1.25; font-weight: 650; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } th { font-weight: 600; color: var(--faint); }
.grid td, .grid th { border: 0; text-align: center; padding: .3rem .55rem; min-width: 1.3rem; }
img { max-width: 100%; height: auto; border-radius: 8px; display: block; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--faint); }
pre { background: var(--plate); padding: .8rem; border-radius: 8px; overflow-x: auto; font-size: .82rem;
  white-space: pre-wrap; }
"""


def render_html(report: Mapping[str, Any], pictures: Pictures) -> str:
    """HTML of `report`, the content of report.json."""
    stages: Sequence[Mapping[str, Any]] = report["stages"]
    last = stages[-1]
    sections = [_heading(report), _cards(last), _clips(last, pictures), _stage_table(stages)]
    earlier = [_earlier(stage, pictures) for stage in stages[:-1] if stage["name"] in pictures.animations]
    if earlier:
        sections.append("<h2>Earlier stages</h2>" + "".join(earlier))
    sections += [_curves(pictures), _confusion_matrices(last), _protocols(stages), _details(report["data"])]
    title = html.escape(str(report["plan"]))
    return (
        f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(s for s in sections if s) + "\n</body></html>\n"
    )


def _heading(report: Mapping[str, Any]) -> str:
    names = " → ".join(html.escape(stage["name"]) for stage in report["stages"])
    return f"<h1>{html.escape(str(report['plan']))}</h1>\n<p class='faint'>{names} · {duration(report['seconds'])} in all</p>"


def _cards(stage: Mapping[str, Any]) -> str:
    """Metrics of the last stage, each with that of real held-out clips."""
    name, cards = stage["class_name"], []
    real, counts = stage["real"] or {}, stage["counts"] or {}
    for key, label in ((name, f"{name} accuracy"), ("direction", "direction accuracy")):
        value, interval = stage.get(f"{key}_accuracy"), stage["intervals"].get(f"{key}_accuracy")
        count = counts.get("class" if key == name else key)
        below = f"{count} clips, 95 % interval {percent(interval[0])} to {percent(interval[1])}" if interval else ""
        below = html.escape(stage["absent"].get(f"{key}_accuracy", below))
        cards.append((label, percent(value), below, percent(real.get(f"{key}_accuracy"))))
    distance, reference = stage["frechet_distance"], counts.get("frechet_reference")
    below = f"to {reference} held-out clips, in the classifier's features" if reference else ""
    below = html.escape(stage["absent"].get("frechet_distance", below))
    cards.append(("Fréchet distance", number(distance), below, number(real.get("frechet_distance"))))
    return "<div class='cards'>" + "".join(
        f"<div class='card'>{html.escape(label)}<b>{value}</b><span class='faint'>{below}<br>real clips: {ceiling}</span></div>"
        for label, value, below, ceiling in cards
    ) + "</div>"  # fmt: skip


def _clips(stage: Mapping[str, Any], pictures: Pictures) -> str:
    name, counts = stage["name"], stage["counts"] or {}
    if name not in pictures.animations:
        return ""
    shared = counts.get("captions_also_in_train")
    note = f" {shared} of {counts['generated']} held-out captions also occur in the train split." if shared else ""
    return (
        f"<h2>Samples for held-out captions</h2>{_image(pictures.animations[name], 'clips, moving')}"
        "<p class='faint'>The first clips of the prompt file, those of different captions first; not selected. Below each: its caption, predicted class and "
        f"predicted direction.{note}</p>"
        "<details><summary>As strips, from the first frame to the last</summary>"
        f"{_image(pictures.sheets[name], 'clips as strips')}</details>"
    )


def _earlier(stage: Mapping[str, Any], pictures: Pictures) -> str:
    image = _image(pictures.animations[stage["name"]], f"clips after {stage['name']}")
    return f"<details><summary>{html.escape(stage['name'])}</summary>{image}</details>"


def _stage_table(stages: Sequence[Mapping[str, Any]]) -> str:
    """A row a stage, one for the previous stage at its shape if measured, and one for real held-out clips."""
    name = stages[-1]["class_name"]
    heads = ("stage", "steps", "time", name, "direction", "Fréchet", "kernel (KID)", "classifier", "clips")
    rows: list[tuple[str, ...]] = []
    for stage in stages:
        if previous := stage["previous"]:
            label = f"{html.escape(previous['name'])}, at the shape of {html.escape(stage['name'])}"
            rows.append((label, "", "", *_metrics_cells(previous)))
        steps = "n/a" if stage["steps"] is None else f"{stage['steps']:,}"
        rows.append((html.escape(stage["name"]), steps, duration(stage["seconds"]), *_metrics_cells(stage)))
    real = stages[-1]["real"]
    if real:
        scores = [percent(real[f"{name}_accuracy"]), percent(real["direction_accuracy"])]
        distances = [number(real["frechet_distance"]), number(real["kernel_distance"])]
        rows.append(("real held-out clips", "", "", *scores, *distances, "", str(stages[-1]["counts"]["real"])))
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    return (
        f"<h2>Stages</h2><div class='wide'><table><tr>{head}</tr>{body}</table></div>"
        "<p class='faint'>classifier: its accuracy on held-out images, an upper bound of the accuracies. Distances are "
        "in the classifier's features: they compare runs on this dataset and are not the FID or KID of the literature. "
        "The Fréchet distance decreases with the number of clips; real clips are measured at the same number.</p>"
        + _absent(stages)
    )


def _absent(stages: Sequence[Mapping[str, Any]]) -> str:
    """Why metrics of the table were not measured: a line a reason."""
    places: dict[str, list[str]] = {}
    for stage in stages:
        for key, reason in stage["absent"].items():
            label = key.replace("_", " ").replace("frechet", "Fréchet")
            places.setdefault(reason, []).append(f"{label} of {stage['name']}")
    lines = [f"n/a: {', '.join(metrics)}: {reason}." for reason, metrics in places.items()]
    return f"<p class='faint'>{'<br>'.join(map(html.escape, lines))}</p>" if lines else ""


def _metrics_cells(stage: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        percent(stage.get(f"{stage['class_name']}_accuracy")),
        percent(stage["direction_accuracy"]),
        number(stage["frechet_distance"]),
        number(stage["kernel_distance"]),
        percent(stage["classifier_accuracy"]),
        str((stage["counts"] or {}).get("generated", "n/a")),
    )


def _curves(pictures: Pictures) -> str:
    dark, light = _source(pictures.curves_dark), _source(pictures.curves)
    return (
        "<h2>Losses</h2><picture>"
        f'<source srcset="{dark}" media="(prefers-color-scheme: dark)"><img src="{light}" alt="loss curves"></picture>'
    )


def _confusion_matrices(stage: Mapping[str, Any]) -> str:
    """Requested (rows) against predicted (columns) classes and directions."""
    parts = []
    for key, table in (stage["confusion"] or {}).items():
        if not table or len(table["names"]) > 40:
            continue
        most = max(1, *(n for row in table["counts"] for n in row))
        head = "".join(f"<th>{html.escape(name)}</th>" for name in table["names"])
        body = "".join(
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(f"<td style='background: rgba(var(--accent), {0.75 * n / most:.2f})'>{n or ''}</td>" for n in row)
            + "</tr>"
            for name, row in zip(table["names"], table["counts"], strict=True)
        )
        label = stage["class_name"] if key == "class" else key
        parts.append(
            f"<details><summary>{html.escape(label)}: requested (rows), predicted (columns)</summary>"
            f"<div class='wide'><table class='grid'><tr><th></th>{head}</tr>{body}</table></div></details>"
        )
    return "<h2>Confusion matrices</h2>" + "".join(parts) if parts else ""


def _protocols(stages: Sequence[Mapping[str, Any]]) -> str:
    parts = [
        f"<details><summary>{html.escape(stage['name'])}</summary><pre>{_json(settings)}</pre></details>"
        for stage in stages
        if (settings := {key: stage[key] for key in ("protocol", "counts", "checkpoint", "videos") if stage[key]})
    ]
    return "<h2>Evaluation settings</h2>" + "".join(parts) if parts else ""


def _details(data: Mapping[str, Any]) -> str:
    parts = []
    for name, value in data.items():
        text = html.escape(value) if isinstance(value, str) else _json(value)
        parts.append(f"<details><summary>{html.escape(str(name))}</summary><pre>{text}</pre></details>")
    return "<h2>Data</h2>" + "".join(parts) if parts else ""


def _json(value: Any) -> str:
    return html.escape(json.dumps(value, indent=1, ensure_ascii=False, default=str))


def _source(path: Path) -> str:
    kind = "gif" if path.suffix == ".gif" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _image(path: Path, alt: str) -> str:
    return f'<img src="{_source(path)}" alt="{html.escape(alt)}">'


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
