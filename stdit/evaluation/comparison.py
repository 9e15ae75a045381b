"""Several runs side by side: their scores, loss curves over steps, samples, FLOPs and hours, and clips of the same
requests.

A run is named by any folder of its results: what `stdit evaluate --config` wrote (scores.json), what stdit.generate
wrote (manifest.jsonl), or the run directory itself; the others are found from it.
"""

from __future__ import annotations

import io
import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from stdit import metrics_log
from stdit.config import Bucket, ConfigError, latent_shape, read_json, token_grid
from stdit.evaluation.generated import MANIFEST, read_rows
from stdit.evaluation.media_set import read_frames
from stdit.evaluation.pictures import smooth
from stdit.evaluation.scores import SCORES, ScoresFile
from stdit.media import Cell, moving_sheet, write_gif
from stdit.models.cost import model_cost
from stdit.training import checkpoint
from stdit.training.run_dir import read_config

AXES = ("step", "samples", "FLOPs", "hours")


@dataclass(frozen=True)
class RunResults:
    """What is there of one run; each of run_dir, videos and scores may be absent. notes: why something is."""

    name: str
    run_dir: Path | None
    videos: Path | None
    scores: dict[str, Any] | None
    notes: tuple[str, ...] = field(default=())


def find_results(path: Path, name: str) -> RunResults:
    """The results that `path` leads to. ValueError: it holds none, or a damaged scores.json."""
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder")
    scores = _read_scores(path / SCORES)
    run_dir = videos = None
    if scores is not None:
        subject = scores["subject"]
        videos, run_dir = _recorded(subject.get("generated"), path, MANIFEST), _run_of(subject.get("run"), path)
    elif (path / metrics_log.FILE).is_file():
        run_dir = path
        # As a plan lays them out, or beside the run's own files.
        for folder in (path.parent / "evaluation" / path.name, path):
            videos = videos or _if_there(folder / "videos")
            scores = scores or _read_scores(folder / "scores" / SCORES)
    elif (path / MANIFEST).is_file():
        videos = path
        scores = _read_scores(path.parent / "scores" / SCORES)
        protocols = [row.get("protocol") or {} for row in read_rows(path)]
        run_dir = _run_of(next((p["run"] for p in protocols if "run" in p), None), path)
    else:
        raise ValueError(
            f"{path}: holds no {SCORES}, no {metrics_log.FILE} of a run and no {MANIFEST} of generated media"
        )
    return RunResults(name, run_dir, videos if videos and (videos / MANIFEST).is_file() else None, scores)


def _recorded(recorded: Any, folder: Path, file: str) -> Path | None:
    """A folder, known by the `file` in it, that results in `folder` name; None if it is not there.

    The path may be relative to another working directory than this one, which then is most often above `folder`.
    """
    bases = (Path(), *folder.resolve().parents) if isinstance(recorded, str) else ()
    return next((base / recorded for base in bases if (base / recorded / file).is_file()), None)


def _read_scores(path: Path) -> dict[str, Any] | None:
    return read_json(path, ScoresFile) if path.is_file() else None


def _run_of(recorded: Any, folder: Path) -> Path | None:
    """The run directory of a recorded path, which may be that of a checkpoint; None if it is not there."""
    if not isinstance(recorded, str):
        return None
    return _recorded(recorded, folder, metrics_log.FILE) or _recorded(
        str(Path(recorded).parent), folder, metrics_log.FILE
    )


def _if_there(path: Path) -> Path | None:
    return path if path.is_dir() else None


# ------------------------------------------------------------------------------------------ losses


@dataclass(frozen=True)
class Curve:
    """Losses of one run, and for each logged step the value of every axis that is known."""

    name: str
    axes: dict[str, NDArray[np.float64]]
    loss: NDArray[np.float64]
    validation: tuple[NDArray[np.int64], NDArray[np.float64]]  # indices into `axes`, losses
    notes: tuple[str, ...] = ()


def loss_curve(run: RunResults) -> Curve | None:
    """None: the run has no log. Between logged steps, the time and the bucket are those of the next logged one."""
    if run.run_dir is None:
        return None
    entries = {e["step"]: e for e in metrics_log.read(run.run_dir / metrics_log.FILE) if _is_number(e.get("loss"))}
    rows = [entries[step] for step in sorted(entries)]
    if not rows:
        return None
    steps = np.array([row["step"] for row in rows], float)
    axes, notes = {"step": steps}, []
    if all(_is_number(row.get("samples_seen")) for row in rows):
        axes["samples"] = np.array([row["samples_seen"] for row in rows], float)
        try:
            per_sample = flops_by_bucket(run.run_dir)
            cost = np.array([per_sample[row["bucket"]] * row.get("flops_ratio", 1.0) for row in rows])
            axes["FLOPs"] = np.cumsum(np.diff(axes["samples"], prepend=0) * cost)
        except (ValueError, OSError, KeyError) as error:
            notes.append(f"{run.name}: FLOPs are not known ({error})")
    if all(_is_number(row.get("seconds")) for row in rows):
        seconds = np.array([row["seconds"] for row in rows], float)
        axes["hours"] = np.cumsum(np.diff(steps, prepend=0) * seconds) / 3600
    validation = [(i, row["validation_loss"]) for i, row in enumerate(rows) if _is_number(row.get("validation_loss"))]
    found = np.array([i for i, _ in validation], np.int64), np.array([loss for _, loss in validation], float)
    return Curve(run.name, axes, np.array([row["loss"] for row in rows], float), found, tuple(notes))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def flops_by_bucket(run_dir: Path) -> dict[str, float]:
    """Training FLOPs (forward and backward) of one sample of each bucket, with captions of full length.

    ConfigError, ValueError: no readable config or checkpoint.
    """
    config = read_config(run_dir)
    latest = checkpoint.find_latest(run_dir)
    if latest is None:
        raise ConfigError(f"{run_dir} has no checkpoint")
    t, h, w = checkpoint.read_identity(latest)["video_encoder"]["compression"]
    model, found = config.model, {}
    for bucket in config.data.buckets:
        latent = latent_shape(Bucket(frames=bucket.frames, height=bucket.height, width=bucket.width), (t, h, w))
        grid = token_grid(latent, model.patch_size, bucket.key, model.pad_latents)
        cost = model_cost(model, grid, model.max_text_tokens or 0, train=config.train)
        found[bucket.key] = float(cost.training_flops)
    return found


def comparison_curves(curves: Sequence[Curve], dark: bool = False) -> bytes:
    """PNG: training (smoothed) and validation losses of all runs, a panel for each axis that every run has."""
    shared = [axis for axis in AXES if all(axis in curve.axes for curve in curves)]
    ink, grid = ("#e6e8eb", "#3a3f47") if dark else ("#24292f", "#d5d9de")
    colours = ("#4c8dff", "#f0883e", "#3fb950", "#bc8cff", "#f778ba", "#8b949e")
    figure = Figure(figsize=(3.6 * len(shared), 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shared), sharey=True, squeeze=False)[0]
    for axes, axis in zip(panels, shared, strict=True):
        for curve, colour in zip(curves, itertools.cycle(colours)):
            x = curve.axes[axis]
            smoothed = smooth(curve.loss, max(1, len(curve.loss) // 50))
            axes.plot(x, smoothed, color=colour, linewidth=1.4, label=curve.name)
            at, losses = curve.validation
            axes.plot(x[at], losses, "o--", color=colour, markersize=3.5, linewidth=1)
        axes.set_xlabel(axis, color=ink)
        axes.tick_params(colors=ink, labelsize=8)
        axes.grid(color=grid, linewidth=0.6)
        axes.set_facecolor("none")
        for spine in axes.spines.values():
            spine.set_color(grid)
    panels[0].set_ylabel("loss", color=ink)
    panels[0].legend(labelcolor=ink, facecolor="none", edgecolor=grid, fontsize=8)
    finite = np.concatenate([c.loss[np.isfinite(c.loss)] for c in curves])
    if len(finite):  # the first steps, far above all others, may leave the picture
        panels[0].set_ylim(max(0.0, float(finite.min()) * 0.9), float(np.quantile(finite, 0.98)) * 1.1)
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="#14171c" if dark else "#ffffff")
    return out.getvalue()


# ------------------------------------------------------------------------------------------- clips


@dataclass(frozen=True)
class Pair:
    """A request that all runs answered: its prompt, class and seed, and each run's file."""

    prompt: str
    seed: int | None
    files: Mapping[str, Path]


def same_requests(runs: Sequence[RunResults]) -> list[Pair]:
    """Requests (prompt, class, seed) that every run with media answered, in the first run's order."""
    listings = [(run.name, dict(_requests(run.videos))) for run in runs if run.videos is not None]
    if not listings:
        return []
    shared = [key for key in listings[0][1] if all(key in files for _, files in listings)]
    return [
        Pair(
            key[0] or ("" if key[1] is None else f"class {key[1]}"),
            key[2],
            {name: files[key] for name, files in listings},
        )
        for key in shared
    ]


def _requests(videos: Path) -> Iterator[tuple[tuple[str, Any, int | None], Path]]:
    for row in read_rows(videos):
        if row["file"] is not None:
            yield (row.get("prompt") or "", row.get("class"), row.get("seed")), videos / row["file"]


def frames_of(file: Path) -> NDArray[np.uint8]:
    """All frames of a generated file. ValueError: damaged."""
    from stdit.data.decoding import open_clip

    with open_clip(file, "pyav") as reader:
        shape = reader.frame_count, reader.height, reader.width
    return read_frames(file, shape, False)


def gif_of(cells: Sequence[Cell], fps: float = 8.0) -> bytes:
    """A looping GIF of clips side by side."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clips.gif"
        write_gif(path, moving_sheet(cells, side=192), fps)
        return path.read_bytes()
