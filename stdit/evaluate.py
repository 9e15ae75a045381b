"""Generates clips of one or more runs for the same held-out captions and computes their metrics.

    python -m stdit.evaluate --run runs/demo/images runs/demo/clips \\
        --manifest runs/demo/sets/digits/data/manifest.jsonl --out metrics --set class_name=digit

OUT/NAME holds the prompts, the videos and the metrics.json of a run; OUT/metrics.json those of all. The same command
again generates only what is missing. `python -m pipelines.evaluate_runs` does the same on several Ray workers.

    python -m stdit.evaluate --config configs/evaluate/media.yaml

scores a folder of images or videos that exist, with published metrics, into OUT/scores.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from stdit.config import (
    Bucket,
    ConfigError,
    EvaluateConfig,
    EvaluationConfig,
    Frames,
    Frozen,
    GenerateConfig,
    NonNegative,
    Samples,
    Url,
    Width,
    apply_override,
    load_config,
    parse_location,
    validate,
)
from stdit.config.identity import FrameSampling
from stdit.console import echo
from stdit.errors import CheckpointError, exit_code
from stdit.files import atomic_write, check_writable
from stdit.outputs import check_outputs, claim_outputs

if TYPE_CHECKING:
    from stdit.inference.job import Source

_Run = TypeVar("_Run", bound=Path | Url)
Generate = Callable[[GenerateConfig], object]
COMMAND, PROMPTS, METRICS = "evaluate", "prompts.jsonl", "metrics.json"


class EvaluationPrompts(Frozen):
    """`count` held-out captions, chosen by `seed`, and the shape of the clips (default: the run's largest bucket)."""

    count: Samples = 100
    seed: NonNegative = 0
    frames: Frames | None = None
    height: Width | None = None
    width: Width | None = None


def generate_missing(config: GenerateConfig) -> None:
    """Generates what is missing, in this process."""
    from stdit.generate import finish, job_from_config, run_groups

    job = job_from_config(config)
    finish(job, run_groups(job, config.device, progress=sys.stderr.isatty()))


def evaluate_run(
    run: Path | Url,
    manifest: Path,
    out: Path,
    prompts: EvaluationPrompts | None = None,
    config: EvaluationConfig | None = None,
    cache: Path | None = None,
    generate: Generate = generate_missing,
    **settings: Any,
) -> dict[str, Any]:
    """Generates clips of `run` for held-out captions of `manifest` into out/videos; returns their metrics.

    cache: folder of the trained classifier (default: out). settings: of GenerateConfig, besides run, prompts, out and
    the shape (weights, steps, guidance_scale, batch_size, workers, threads, fps, device, precision, …).
    ValueError: an unusable run, manifest or folder.
    """
    from stdit.evaluation.evaluator import evaluate_videos
    from stdit.evaluation.validation_clips import validation_prompts, write_prompts
    from stdit.inference.job import find_source

    prompts = prompts or EvaluationPrompts()
    source = find_source(run, settings.get("weights", "ema"))
    shape = clip_shape(source, prompts)
    file = out / PROMPTS
    claim_outputs(out, COMMAND, [PROMPTS])
    check_outputs(out / "videos", COMMAND, [METRICS])
    sampling = FrameSampling.model_validate(source.facts.get("frame_sampling") or {})
    write_prompts(
        file, validation_prompts(manifest, prompts.count, shape, prompts.seed, config, source.classes, sampling)
    )
    job = {**settings, **shape.model_dump(), "run": str(run), "prompts": str(file), "out": str(out / "videos")}
    generate(validate(job, GenerateConfig, f"evaluation of {run}"))
    return evaluate_videos(out / "videos", manifest, config, cache or out)


def clip_shape(source: Source, prompts: EvaluationPrompts) -> Bucket:
    """The shape of the clips: as configured, else of the largest bucket in training."""
    shape = {
        **(source.largest.model_dump() if source.largest else {}),
        **prompts.model_dump(include={"frames", "height", "width"}, exclude_none=True),
    }
    if missing := [key for key in ("frames", "height", "width") if key not in shape]:
        raise ConfigError(f"{source.path}: a saved pipeline has no training buckets; set {', '.join(missing)}")
    return Bucket(**shape)


def evaluate_runs(
    runs: Sequence[Path | Url],
    manifest: Path,
    out: Path,
    prompts: EvaluationPrompts,
    config: EvaluationConfig,
    generate: Generate = generate_missing,
    **settings: Any,
) -> dict[str, dict[str, Any] | str]:
    """Metrics, or the error, of each run by name; also written to out/metrics.json."""
    from stdit.data import manifest as manifests

    check_writable(out)
    manifests.read(manifest)  # An unusable manifest fails for all runs: at once.
    results: dict[str, dict[str, Any] | str] = {}
    named = run_names(runs)
    for name in named:
        check_outputs(out / name, COMMAND, [PROMPTS])
        check_outputs(out / name / "videos", COMMAND, [METRICS])
    claim_outputs(out, COMMAND, [METRICS])
    for name, run in named.items():
        try:
            results[name] = evaluate_run(run, manifest, out / name, prompts, config, out, generate, **settings)
        except (ValueError, OSError, RuntimeError) as error:
            results[name] = str(error)
    summary = {name: {"error": m} if isinstance(m, str) else _without_clips(m) for name, m in results.items()}
    atomic_write(out / METRICS, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return results


def _without_clips(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if key != "clips"}


def run_names(runs: Sequence[_Run]) -> dict[str, _Run]:
    """Each run by the last part of its path, or as many parts as make names unique. ConfigError: duplicates."""
    parts = {run: run.key.split("/") if isinstance(run, Url) else [*run.resolve().parts[1:]] for run in runs}
    if len({tuple(p) for p in parts.values()}) < len(runs):
        raise ConfigError(f"duplicate run: {', '.join(map(str, runs))}")
    for length in range(1, max(map(len, parts.values())) + 1):
        names = {"-".join(p[-length:]): run for run, p in parts.items()}
        if len(names) == len(runs):
            return names
    raise ConfigError(f"runs whose paths, joined by hyphens, are the same: {', '.join(map(str, runs))}")


# ---------------------------------------------------------------------------------- command line

_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("count", int, "captions of the held-out split (default: 100)"),
    ("seed", int, "selects the captions; seed of the first video (default: 0)"),
    ("frames", int, "frames (default: of the largest bucket in training)"),
    ("height", int, "pixels (default: likewise)"),
    ("width", int, "pixels (default: likewise)"),
    ("weights", str, "ema or model (default: ema)"),
    ("scheduler", str, "flow_euler, ddim, ddpm, dpm_solver or unipc (default: the run's)"),
    ("steps", int, "sampling steps (default: the run's)"),
    ("guidance_scale", float, "classifier-free guidance, 1 for none (default: the run's)"),
    ("fps", float, "frames per second of the files (default: of most training videos)"),
    ("batch_size", int, "videos per batch (default: 8)"),
    ("threads", int, "CPU threads of a pipeline (default: 1)"),
    ("device", str, "cpu or cuda (default: cuda where available)"),
    ("precision", str, "auto, fp32 or bf16 (default: auto, as the run was trained)"),
)


def arguments(prog: str = "stdit.evaluate") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", type=Path, help="YAML of EvaluateConfig: scores media that exist; the other flag is --set"
    )
    parser.add_argument(
        "--run", nargs="+", type=parse_location, help="run directories, checkpoints or pipelines, or URLs of runs"
    )
    parser.add_argument("--manifest", type=Path, help="the dataset's manifest")
    parser.add_argument("--out", type=Path, help="folder for videos and metrics")
    for key, kind, text in _FLAGS:
        flag = {"guidance_scale": "guidance"}.get(key, key).replace("_", "-")
        parser.add_argument(f"--{flag}", dest=key, type=kind, help=text, metavar=flag.upper().replace("-", "_"))
    parser.add_argument("--overwrite", action="store_true", help="delete videos of another request in OUT")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of EvaluationConfig; of EvaluateConfig with --config",
    )
    return parser


def evaluate_config(options: argparse.Namespace, workers: int | None = None) -> EvaluateConfig:
    """The config of `--config`. ConfigError: an unusable file, or flags that belong to `--run`."""
    others = ("run", "manifest", "out", "overwrite", *(key for key, _, _ in _FLAGS))
    if given := [key for key in others if (value := getattr(options, key)) is not None and value is not False]:
        raise ConfigError(f"--{given[0].replace('_', '-')} is for --run; with --config give --set KEY=VALUE")
    more = [] if workers is None else [f"workers={workers}"]
    return load_config(options.config, EvaluateConfig, [*options.set, *more])


def score_command(config: EvaluateConfig, compute: Any = None) -> int:
    """Scores media that exist; prints the table. Exit code 0: at least one score; 1: none; ValueError: unusable
    input."""
    from stdit.evaluation.feature_cache import compute_features
    from stdit.evaluation.scores import evaluate_media, scores_table

    result = evaluate_media(config, compute or compute_features)
    echo(f"{scores_table(result)}\n{len(result['scores'])} scores are in {config.out}")
    return 0 if result["scores"] else 1


def run_command(options: argparse.Namespace, generate: Generate, **settings: Any) -> int:
    """Runs parsed `arguments`; prints the table. Exit code as `main`."""
    if absent := [flag for flag in ("run", "manifest", "out") if getattr(options, flag) is None]:
        echo(
            f"evaluate: give --config, or --run, --manifest and --out; --{absent[0]} is missing",
            file=sys.stderr,
        )
        return 2
    flags = {key: getattr(options, key) for key, _, _ in _FLAGS if getattr(options, key) is not None}
    selection = {key: flags.pop(key) for key in list(flags) if key in EvaluationPrompts.model_fields}
    overrides: dict[str, Any] = {}
    try:
        for text in options.set:
            overrides = apply_override(overrides, text)
        config = validate(overrides, EvaluationConfig, "command line")
        prompts = validate(selection, EvaluationPrompts, "command line")
        results = evaluate_runs(
            options.run, options.manifest, options.out, prompts, config, generate,
            overwrite=options.overwrite, **flags, **settings,
        )  # fmt: skip
    except (ValueError, CheckpointError, OSError) as error:
        echo(f"evaluate: {error}", file=sys.stderr)
        return exit_code(error)
    from stdit.evaluation.tables import metrics_table

    echo(metrics_table(results))
    failed = [name for name, result in results.items() if isinstance(result, str)]
    echo(f"metrics of {len(results) - len(failed)} of {len(results)} runs are in {options.out}")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all runs evaluated; 1: some failed, or a write did; 2: unusable arguments or input."""
    options = arguments().parse_args(argv)
    if options.config is None:
        return run_command(options, generate_missing)
    try:
        return score_command(evaluate_config(options))
    except (ValueError, CheckpointError, OSError) as error:
        echo(f"evaluate: {error}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
