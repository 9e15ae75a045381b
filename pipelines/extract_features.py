"""Feature extraction on many workers (Ray Data): a pool of actors, each holding the encoders once.

    python -m pipelines.extract_features --config configs/extract/digits.yaml --set workers=4

What is sent is rows of the manifest; clips are read, and shards written, where the actor runs, so
manifest, encoders and `out` must be at the same paths on every node. Same files as
`python -m stdit.extract` but for the last bits of latents, which depend on a worker's threads; the same command again goes on.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipelines.workers import connect, disconnect
from stdit.config import ExtractConfig, load_config, validate

if TYPE_CHECKING:
    from stdit.data.records import ShardResult, ShardSpec


class Worker:
    """An actor with encoders and a decoding subprocess; maps shard specs to results."""

    def __init__(self, config: dict[str, Any], directory: str, threads: int) -> None:
        if os.path.isdir(directory):  # the driver's; elsewhere paths are absolute or mean what they say there
            os.chdir(directory)
        import torch

        torch.set_num_threads(threads)
        self.config = validate(config, ExtractConfig, "extraction")
        self.extractor: Any = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """{"spec": pickled ShardSpec} -> {"result": pickled ShardResult, "error": ""}, or the error that stops the extraction."""
        import torch

        from stdit.extract import load_extractor

        try:
            # Not in the constructor: an encoder that is not there would come back as Ray's own traceback.
            self.extractor = self.extractor or load_extractor(self.config)
            result = self.extractor.extract(pickle.loads(row["spec"]))
        except (OSError, ValueError, torch.OutOfMemoryError) as error:
            # As a value: an exception would be tried again, and come back inside Ray's own traceback.
            return {"result": b"", "error": f"{type(error).__name__}: {error}"}
        return {"result": pickle.dumps(result), "error": ""}


def extract_features(config: ExtractConfig, overwrite: bool = False) -> Path:
    """The extraction on `config.workers` actors; the folder of features. A second call does nothing.

    Raises what `stdit.extract.run` raises; OSError or ValueError also for what a worker met.
    """
    from stdit.extract import collect, prepare

    plan, todo = prepare(config, overwrite)
    if not todo:
        return collect(plan, (), ())
    how = connect(config.workers)
    try:
        return collect(plan, todo, _results(config, todo))
    finally:
        if how == "started":
            disconnect()


def _results(config: ExtractConfig, todo: Sequence[ShardSpec]) -> Iterator[ShardResult]:
    """Results of shards as they come in."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    # The bar over clips is progress enough.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    workers = min(config.workers, len(todo))
    have = ray.cluster_resources()
    # Actors share GPUs where there are fewer of them than workers.
    gpus = min(1.0, have.get("GPU", 0) / workers)
    threads = max(1, (os.cpu_count() or 1) // workers)
    specs = ray.data.from_items([{"spec": pickle.dumps(spec)} for spec in todo], override_num_blocks=len(todo))
    done = specs.map(
        cast(Any, Worker),
        fn_constructor_args=(config.model_dump(mode="json"), os.getcwd(), threads),
        compute=ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise OSError(row["error"])
        yield pickle.loads(row["result"])


def main(argv: Sequence[str] | None = None) -> None:
    from stdit.extract import arguments

    given = arguments("python -m pipelines.extract_features").parse_args(argv)
    try:
        out = extract_features(load_config(given.config, ExtractConfig, given.set), given.overwrite)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(out)


if __name__ == "__main__":
    main()
