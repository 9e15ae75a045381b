"""Generates videos for a file of prompts with several pipelines in parallel, under Ray.

    python -m pipelines.generate_videos --run runs/demo/clips --prompts prompts.txt --out videos --workers 4

Each worker has one pipeline and generates groups of prompts. Groups depend on the file alone: any number of workers
gives the same videos, and a second run generates only what is missing. OUT must be visible to all workers.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Literal, cast

from pipelines.workers import connect, disconnect, in_cluster
from stdit.config import ConfigError, GenerateConfig
from stdit.console import echo
from stdit.errors import exit_code

if TYPE_CHECKING:
    from stdit.generate import Job, Outcome


class Worker:
    """A Ray Data actor with one pipeline that generates groups of prompts."""

    def __init__(self, job: Job, device: str | None) -> None:
        self.job, self.device = job, device
        self.pipe: Any = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"group": [numbers]} -> {"outcomes": [a list for each], "stop": ["" or the error that stops the job]}."""
        from stdit import generate

        found, stop = [], ""
        try:
            # Not in the constructor: Ray retries a failing one for ever.
            self.pipe = self.pipe or generate.load(self.job, self.device)
            for number in batch["group"]:
                outcomes = generate.draw_group(self.pipe, self.job, int(number))
                found.append([(o.file, o.error, o.note) for o in outcomes])
        except (ValueError, OSError, RuntimeError) as error:
            stop = f"{type(error).__name__}: {error}"
        return {"outcomes": found or [[]], "stop": [stop]}


def generate_groups(job: Job, workers: int, device: str | None = None, progress: bool = True) -> list[Outcome]:
    """Generates the job's missing groups with `workers` actors of the connected Ray; waits for all of them.

    device: "cuda" takes a GPU for each worker; None does if the cluster has any. RuntimeError: a worker could not load
    the pipeline or write a file. ValueError: GPUs are requested on a machine without any.
    """
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from tqdm import tqdm

    from stdit.generate import Outcome

    missing = job.missing()
    if not missing:
        return []
    # The progress bar below replaces those of Ray Data.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    have = ray.cluster_resources()
    device = device or cluster_device()
    if device == "cuda" and not have.get("GPU"):
        if "RAY_ADDRESS" not in os.environ:
            raise ValueError("device: cuda, but Ray finds no GPU on this machine")
        echo("generate_videos: the cluster has no GPU now; without an autoscaler this waits for ever", file=sys.stderr)
    # Start with as many as fit now; an autoscaler may add nodes for the rest. A pool of fixed size would wait.
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
    bar = tqdm(total=len(missing), desc="generate", unit="batch", disable=not progress)
    # Closed, so that an error here does not keep workers running for as long as its traceback is referenced.
    with bar, closing(cast(Any, iter(results.iter_rows()))) as rows:
        for row in rows:
            if row["stop"]:
                raise RuntimeError(f"a worker stopped: {row['stop']}")
            outcomes += [Outcome(*found) for found in row["outcomes"]]
            bar.update()
    return outcomes


def cluster_device() -> Literal["cpu", "cuda"]:
    """cuda if the connected cluster has GPUs."""
    import ray

    return "cuda" if ray.cluster_resources().get("GPU") else "cpu"


def generate_videos(config: GenerateConfig, progress: bool = True) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """Makes what is missing, writes the manifest; its rows and what failed. Joins the Ray that is connected, or one of
    its own (pipelines.workers.connect). ValueError, CheckpointError, OSError, RuntimeError: nothing more can be
    made."""
    from stdit.generate import finish, job_from_config

    # The driver may have no GPU: the workers' device decides about bfloat16.
    if config.device is None and in_cluster():
        connect()
        config = config.model_copy(update={"device": cluster_device()})
    job = job_from_config(config)
    outcomes: list[Outcome] = []
    if job.missing():
        started = connect(config.workers * config.threads)
        try:
            outcomes = generate_groups(job, config.workers, config.device, progress)
        finally:
            if started == "started":
                disconnect()
    return finish(job, outcomes), outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all generated; 1: some prompts failed, or the job could not continue; 2: a job that cannot be
    run."""
    from stdit.inference.prompts import arguments, settings

    options = arguments(__doc__).parse_args(argv)
    try:
        config = settings(options)
        rows, outcomes = generate_videos(config)
    except (ConfigError, ValueError, OSError, RuntimeError) as error:
        echo(f"generate_videos: {error}", file=sys.stderr)
        return exit_code(error)
    from stdit.generate import report

    return report(rows, outcomes, config.out)


if __name__ == "__main__":
    sys.exit(main())
