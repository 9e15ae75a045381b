"""Scores of one or more runs over the same held-out captions, in one table.

    python -m pipelines.evaluate_runs --runs runs/demo/images runs/demo/clips --manifest runs/demo/clips/manifest.jsonl \\
        --out scores --set class_name=digit

For each run OUT/NAME holds the prompts, the videos and their scores.json. The same command again makes only what is
missing. With --workers above 1 videos are drawn under Ray, by as many pipelines at a time; they are the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.html import number, percent
from stdit.config import (
    Bucket,
    ConfigError,
    EvaluationConfig,
    Frozen,
    GenerateConfig,
    NonNegative,
    Positive,
    apply_override,
    validate,
)
from stdit.files import atomic_write


class Drawing(Frozen):
    """What to draw of every run: `count` captions that `seed` chooses, and settings as in GenerateConfig."""

    count: Positive = 100
    seed: NonNegative = 0
    frames: Positive | None = None
    height: Positive | None = None
    width: Positive | None = None


def evaluate_run(
    run: Path,
    manifest: Path,
    out: Path,
    drawing: Drawing | None = None,
    scores: EvaluationConfig | None = None,
    cache: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Makes videos of `run` for held-out captions of `manifest` in out/videos, scores them, and returns the scores.

    settings: what GenerateConfig takes besides run, prompts, out and sizes (weights, steps, guidance_scale, batch_size,
    workers, threads, fps, device, overwrite, …). cache: where the trained reader is kept (default: out).
    ValueError: a run, a manifest or a folder that cannot be used.
    """
    from stdit.evaluate import evaluate
    from stdit.evaluation.held_out import held_out_prompts, write_prompts

    drawing = drawing or Drawing()
    sizes = shape_of(run, settings.get("weights", "ema"), drawing)
    prompts = out / "prompts.jsonl"
    write_prompts(prompts, held_out_prompts(manifest, drawing.count, sizes, drawing.seed, scores))
    asked = {**settings, **sizes.model_dump(), "run": str(run), "prompts": str(prompts), "out": str(out / "videos")}
    _generate(validate(asked, GenerateConfig, f"evaluation of {run}"))
    return evaluate(out / "videos", manifest, scores, cache or out)


def shape_of(run: Path, weights: Any, drawing: Drawing) -> Bucket:
    """The shape to draw: what is asked for, the rest as in the largest bucket that the run was trained on."""
    from stdit.inference.job import find_source

    largest = find_source(run, weights).largest
    known = {
        **(largest.model_dump() if largest else {}),
        **drawing.model_dump(include={"frames", "height", "width"}, exclude_none=True),
    }
    if absent := [key for key in ("frames", "height", "width") if key not in known]:
        raise ConfigError(f"{run}: a saved pipeline does not say what it was trained on; give {', '.join(absent)}")
    return Bucket(**known)


def _generate(config: GenerateConfig) -> None:
    """Makes what is missing: here with one worker, else under Ray."""
    if config.workers > 1:
        from pipelines.generate_videos import generate_videos

        generate_videos(config)
        return
    from stdit.generate import finish, job_of, run_groups

    job = job_of(config)
    finish(job, run_groups(job, config.device, progress=sys.stderr.isatty()))


def evaluate_runs(
    runs: Sequence[Path], manifest: Path, out: Path, drawing: Drawing, scores: EvaluationConfig, **settings: Any
) -> dict[str, dict[str, Any] | str]:
    """Scores of each run by its name, or what was wrong with it; written to out/scores.json as well."""
    from stdit.data import manifest as manifests

    manifests.read(manifest)  # What is wrong with it is wrong for all runs.
    found: dict[str, dict[str, Any] | str] = {}
    for name, run in names(runs).items():
        try:
            found[name] = evaluate_run(run, manifest, out / name, drawing, scores, out, **settings)
        except (ValueError, OSError, RuntimeError) as error:
            found[name] = str(error)
    whole = {name: {"error": s} if isinstance(s, str) else _without_clips(s) for name, s in found.items()}
    atomic_write(out / "scores.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    return found


def _without_clips(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in scores.items() if key != "clips"}


def names(runs: Sequence[Path]) -> dict[str, Path]:
    """Each run under the last part of its path, or as many parts as tell it from the others. ConfigError: given twice."""
    parts = {run: [part for part in run.resolve().parts if part != "/"] for run in runs}
    if len({tuple(p) for p in parts.values()}) < len(runs):
        raise ConfigError(f"a run is given twice: {', '.join(map(str, runs))}")
    for length in range(1, max(map(len, parts.values())) + 1):
        found = {"-".join(p[-length:]): run for run, p in parts.items()}
        if len(found) == len(runs):
            return found
    raise ConfigError(f"runs whose paths, joined by hyphens, are the same: {', '.join(map(str, runs))}")


def table(found: Mapping[str, dict[str, Any] | str]) -> str:
    """A line for each run; the ceiling, real held-out clips, in brackets."""
    good = [s for s in found.values() if not isinstance(s, str)]
    called = good[0]["class_name"] if good else "class"
    rows: list[tuple[str, ...]] = [
        ("run", "step", "weights", "shape", "clips", called, "direction", "Fréchet", "KID", "classifier")
    ]
    for name, scores in found.items():
        if isinstance(scores, str):
            continue
        real, protocol = scores["real"], scores["protocol"]
        shape = f"{protocol['frames']}x{protocol['height']}x{protocol['width']}"
        shares = [f"{percent(scores[k])} [{percent(real[k])}]" for k in ("class_accuracy", "direction_accuracy")]
        distances = [f"{number(scores[k])} [{number(real[k])}]" for k in ("frechet_distance", "kernel_distance")]
        how = (str(protocol.get("step")), str(protocol.get("weights")), shape, str(scores["counts"]["generated"]))
        rows.append((name, *how, *shares, *distances, percent(scores["classifier_accuracy"])))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if good:
        lines.append("in brackets: real held-out clips, at the same shape and number")
    lines += [f"{name}: {scores}" for name, scores in found.items() if isinstance(scores, str)]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------- command line

_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("count", int, "captions of the held-out split (default: 100)"),
    ("seed", int, "what draws the captions, and the first video's seed (default: 0)"),
    ("frames", int, "frames (default: of the largest bucket that the run was trained on)"),
    ("height", int, "pixels (default likewise)"),
    ("width", int, "pixels (default likewise)"),
    ("weights", str, "ema or model (default: ema)"),
    ("scheduler", str, "flow_euler, ddim, ddpm, dpm_solver or unipc (default: the run's)"),
    ("steps", int, "sampling steps (default: the run's)"),
    ("guidance_scale", float, "1 for none (default: the run's)"),
    ("fps", float, "frames a second of the files (default: 8)"),
    ("batch_size", int, "videos drawn at a time (default: 8)"),
    ("workers", int, "pipelines at work at a time, under Ray if more than 1 (default: 1)"),
    ("threads", int, "CPU threads of each worker (default: 1)"),
    ("device", str, "cpu or cuda (default: cuda where there is one)"),
)


def arguments(prog: str = "pipelines.evaluate_runs") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="run directories, checkpoints or pipelines")
    parser.add_argument("--manifest", type=Path, required=True, help="the data's manifest")
    parser.add_argument("--out", type=Path, required=True, help="folder for videos and scores")
    for key, kind, text in _FLAGS:
        flag = {"guidance_scale": "guidance"}.get(key, key).replace("_", "-")
        parser.add_argument(f"--{flag}", dest=key, type=kind, help=text, metavar=flag.upper().replace("-", "_"))
    parser.add_argument("--overwrite", action="store_true", help="remove videos of another request from OUT")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key of EvaluationConfig")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all runs scored; 1: some could not be; 2: nothing could be done."""
    options = arguments().parse_args(argv)
    given = {key: getattr(options, key) for key, _, _ in _FLAGS if getattr(options, key) is not None}
    drawing = {key: given.pop(key) for key in list(given) if key in Drawing.model_fields}
    overrides: dict[str, Any] = {}
    try:
        for text in options.set:
            overrides = apply_override(overrides, text)
        scores = validate(overrides, EvaluationConfig, "command line")
        wanted = validate(drawing, Drawing, "command line")
        found = evaluate_runs(
            options.runs, options.manifest, options.out, wanted, scores, overwrite=options.overwrite, **given
        )
    except (ValueError, OSError) as error:
        print(f"evaluate_runs: {error}", file=sys.stderr)
        return 2
    print(table(found))
    failed = [name for name, result in found.items() if isinstance(result, str)]
    print(f"scores of {len(found) - len(failed)} of {len(found)} runs are in {options.out}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
