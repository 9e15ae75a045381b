"""Videos for a file of prompts, by several pipelines at a time under Ray.

    python -m pipelines.generate_videos --run runs/demo/clips --prompts prompts.txt --out videos --workers 4

Every worker holds one pipeline and draws whole groups of prompts, which are cut from the file alone: the same command
gives the same videos with any number of workers, and a second one makes only what is missing. OUT must be a folder that
all of them see.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.workers import connect, disconnect
from stdit.config import ConfigError, GenerateConfig
from stdit.prompts import arguments, settings

if TYPE_CHECKING:
    from stdit.generate import Job, Outcome


class Worker:
    """An actor of Ray Data: one pipeline, and groups to draw with it."""

    def __init__(self, job: Job, device: str | None) -> None:
        from stdit import generate

        self.job = job
        self.draw = generate.draw_group
        self.pipe = generate.load(job, device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"group": [numbers]} -> {"outcomes": [a list for each]}. What fails in a group is in its outcomes."""
        outcomes = [self.draw(self.pipe, self.job, int(number)) for number in batch["group"]]
        return {"outcomes": [[(o.file, o.error, o.note) for o in some] for some in outcomes]}


def draw(job: Job, workers: int, device: str | None = None, progress: bool = True) -> list[Outcome]:
    """Draws the job's missing groups with `workers` actors of the Ray that is connected; waits for all of them.

    device: None takes a GPU for each worker where the cluster has any. RuntimeError: a worker could not start or write.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.exceptions import RayError
    from tqdm import tqdm

    from stdit.generate import Outcome

    missing = job.missing()
    if not missing:
        return []
    DataContext.get_current().enable_progress_bars = False
    have = ray.cluster_resources()
    device = device or ("cuda" if have.get("GPU") else "cpu")
    # As many as there is room for at once; an autoscaler may make room for the rest. A pool of fixed size would wait.
    room = int(have.get("CPU", 1) // job.threads if device == "cpu" else have.get("GPU", 1))
    workers = min(workers, len(missing))
    groups = ray.data.from_items([{"group": n} for n in missing], override_num_blocks=len(missing))
    results = groups.map_batches(
        Worker,
        fn_constructor_kwargs={"job": job, "device": device},
        batch_size=1,
        compute=ActorPoolStrategy(min_size=1, max_size=workers, initial_size=max(1, min(workers, room))),
        num_cpus=job.threads,
        num_gpus=0 if device == "cpu" else 1,
    )
    outcomes: list[Outcome] = []
    try:
        for row in tqdm(results.iter_rows(), total=len(missing), desc="generate", unit="batch", disable=not progress):
            outcomes += [Outcome(*found) for found in row["outcomes"]]
    except RayError as error:
        raise RuntimeError(f"a worker stopped: {last_line(error)}") from error
    return outcomes


def last_line(error: Exception) -> str:
    """What was raised in the worker, without Ray's trace around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def generate_videos(config: GenerateConfig, progress: bool = True) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """Makes what is missing, writes the manifest; its rows and what failed. Joins the Ray that is connected, or one of
    its own (pipelines.workers.connect). ValueError, CheckpointError, OSError, RuntimeError: nothing more can be made."""
    from stdit.generate import finish, job_of

    job = job_of(config)
    outcomes: list[Outcome] = []
    if job.missing():
        started = connect(config.workers * config.threads)
        try:
            outcomes = draw(job, config.workers, config.device, progress)
        finally:
            if started == "started":
                disconnect()
    return finish(job, outcomes), outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all made; 1: some prompts failed; 2: nothing (more) could be done."""
    options = arguments(__doc__).parse_args(argv)
    try:
        config = settings(options)
        rows, outcomes = generate_videos(config)
    except (ConfigError, ValueError, OSError, RuntimeError) as error:
        print(f"generate_videos: {error}", file=sys.stderr)
        return 2
    from stdit.generate import report

    return report(rows, outcomes, config.out)


if __name__ == "__main__":
    sys.exit(main())
