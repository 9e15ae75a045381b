"""Feature extraction by a pool of Ray Data actors, each with its own encoders.

    python -m pipelines.extract_features --config configs/extract/digits.yaml --set workers=4

Actors receive rows of the manifest, read clips and write shards: manifest, encoders and `out` have the same paths
on every node, or are URLs. The result equals that of `python -m stdit.extract` except for the last bits of latents,
which depend on a worker's threads. The same command again resumes.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipelines.workers import connect, disconnect
from stdit.config import ExtractConfig, Url, load_config, validate
from stdit.console import echo
from stdit.cores import available_cores

if TYPE_CHECKING:
    from stdit.data.records import ShardResult, ShardSpec


class Worker:
    """An actor with encoders and the processes that decode for them; maps shard specs to results.

    beside: actors of this machine, itself included; clips: that it will extract, about.
    """

    def __init__(self, config: dict[str, Any], directory: str, beside: int, clips: int) -> None:
        # The driver's, on this machine or a shared disk; elsewhere paths must be absolute.
        if os.path.isdir(directory):
            os.chdir(directory)
        import torch

        torch.set_num_threads(max(1, available_cores() // beside))
        self.clips, self.beside = clips, beside
        self.config = validate(config, ExtractConfig, "extraction")
        self.extractor: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"spec": pickled ShardSpec} -> {"result": pickled ShardResult, "error": ""}, or the error that stops the
        extraction."""
        import torch

        from stdit.extract import load_extractor

        try:
            # Not in the constructor: a missing encoder would be reported as Ray's own traceback.
            self.extractor = self.extractor or load_extractor(self.config, self.clips, self.beside)
            result = self.extractor.extract(pickle.loads(row["spec"]))
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            # As a value: Ray would retry after an exception, and wrap it in its own traceback.
            return {"result": b"", "error": f"{type(error).__name__}: {error}"}
        return {"result": pickle.dumps(result), "error": ""}


def extract_features(config: ExtractConfig, overwrite: bool = False, summary: bool = True) -> Path | Url:
    """The extraction on `config.workers` actors; the folder of features, or their URL. A second call does nothing.
    summary: prints what became of the clips.

    Raises as `stdit.extract.run`; OSError or ValueError also for errors of a worker.
    """
    from stdit.extract import collect, prepare

    plan, todo = prepare(config, overwrite)
    if not todo:
        return collect(plan, (), ())
    how = connect(config.workers)
    try:
        return collect(plan, todo, _results(config, todo), summary)
    finally:
        if how == "started":
            disconnect()


def _results(config: ExtractConfig, todo: Sequence[ShardSpec]) -> Iterator[ShardResult]:
    """Results of shards as they complete."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # extract() has its own progress bar.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    workers = min(config.workers, len(todo))
    available = ray.cluster_resources()
    # Actors share GPUs where there are fewer of them than workers.
    gpus = min(1.0, available.get("GPU", 0) / workers)
    # Ray spreads the actors over the machines.
    machines = sum(node["Alive"] for node in ray.nodes())
    beside, clips = math.ceil(workers / machines), sum(len(spec.clips) for spec in todo) // workers
    specs = ray.data.from_items([{"spec": pickle.dumps(spec)} for spec in todo], override_num_blocks=len(todo))
    done = specs.map(
        cast(Any, Worker),
        fn_constructor_args=(config.model_dump(mode="json"), os.getcwd(), beside, clips),
        compute=ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise OSError(row["error"])
        yield pickle.loads(row["result"])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code as `stdit.extract.main`."""
    from stdit.extract import arguments, report_error

    options = arguments("python -m pipelines.extract_features").parse_args(argv)
    try:
        out = extract_features(load_config(options.config, ExtractConfig, options.set), options.overwrite)
    except (ValueError, OSError) as error:
        return report_error(error)
    echo(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
