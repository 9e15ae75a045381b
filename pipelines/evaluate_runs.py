"""As `python -m stdit.evaluate`, with videos generated, or features computed, by several Ray workers; results are the
same.

python -m pipelines.evaluate_runs --run runs/demo/clips --manifest runs/demo/sets/digits/data/manifest.jsonl \\
    --out metrics --workers 4
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from stdit.console import echo, printable
from stdit.errors import exit_code
from stdit.files import Closable

if TYPE_CHECKING:
    from stdit.evaluation.feature_cache import FeatureJob


def arguments(prog: str = "pipelines.evaluate_runs") -> argparse.ArgumentParser:
    from stdit import evaluate

    parser = evaluate.arguments(prog)
    parser.add_argument(
        "--workers", type=int, help="pipelines that generate, or compute features, at a time (default: 1)"
    )
    return parser


class FeatureWorker:
    """A Ray actor that computes chunks of one job; the network is loaded once."""

    def __init__(self, job: FeatureJob) -> None:
        self.job = job

    def compute(self, number: int) -> None:
        from stdit.evaluation.feature_cache import compute_chunk

        compute_chunk(self.job, number)


class FeaturePool(Closable):
    """Computes features with `workers` actors of a Ray that is joined, or started at the first job and stopped by
    `close`."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._started = False

    def close(self) -> None:
        """Stops the Ray that was started for this, if any."""
        from pipelines.workers import disconnect

        if self._started:
            self._started = False
            disconnect()

    def __call__(self, job: FeatureJob) -> None:
        """Computes the job's missing chunks. ValueError: a worker's error."""
        import ray
        from ray.exceptions import RayTaskError
        from ray.util import ActorPool
        from tqdm import tqdm

        from pipelines.workers import connect

        missing = job.missing()
        if not missing:
            return
        self._started |= connect(self.workers * job.threads) == "started"
        try:
            gpus = 1 if job.network.device == "cuda" else 0
            actor: Any = ray.remote(num_cpus=job.threads, num_gpus=gpus)(FeatureWorker)
            shared = ray.put(job)
            pool = ActorPool([actor.remote(shared) for _ in range(min(self.workers, len(missing)))])
            done = pool.map_unordered(lambda one, number: one.compute.remote(number), missing)
            for _ in tqdm(
                done, total=len(missing), desc=printable(job.network.key), unit="chunk", disable=not sys.stderr.isatty()
            ):
                pass
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, ValueError) else RuntimeError(str(error.cause)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code as `stdit.evaluate.main`."""
    from pipelines.generate_videos import generate_videos
    from stdit.evaluate import evaluate_config, generate_missing, run_command, score_command

    options = arguments().parse_args(argv)
    if options.config is not None:
        try:
            config = evaluate_config(options, options.workers)
            with FeaturePool(config.workers) as pool:
                return score_command(config, pool if config.workers > 1 else None)
        except (ValueError, OSError, RuntimeError) as error:
            echo(f"evaluate: {error}", file=sys.stderr)
            return exit_code(error)
    workers = options.workers or 1
    generate = generate_videos if workers > 1 else generate_missing
    return run_command(options, generate, workers=workers)


if __name__ == "__main__":
    sys.exit(main())
