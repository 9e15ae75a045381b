"""Curation on a Ray cluster: files, clips and captions go to Ray Data actors, which run the functions of
`stdit curate`.

    python -m pipelines.curate_clips --config configs/curate/footage.yaml --set workers=16

Footage has the same paths on every node, or is in an object store; the driver alone writes `out`. The result equals
that of `stdit curate`; the same command again resumes. Scorers and captioners get a GPU each where the cluster has
them.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from pipelines.workers import connect, disconnect
from stdit.config import CurateConfig, validate
from stdit.errors import WorkFailed, exit_code


class Worker:
    """An actor: tasks as stdit.curation.work has them, {"task": JSON} -> {"result": JSON, "content": bytes, "error":
    …}."""

    def __init__(self, kind: str, config: dict[str, Any], directory: str, beside: int) -> None:
        if os.path.isdir(directory):
            os.chdir(directory)
        self.kind, self.config = kind, validate(config, CurateConfig, "curation")
        self.beside, self.worker = beside, cast(Any, None)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        from stdit.curation.work import make_worker

        try:
            # Not in the constructor: weights that are not there would be reported as Ray's own traceback.
            self.worker = self.worker or make_worker(self.kind, self.config, beside=self.beside)
            result = self.worker(json.loads(row["task"]))
        except (OSError, ValueError) as error:
            failed = exit_code(error) == 1
            return {"result": "", "content": b"", "error": f"{type(error).__name__}: {error}", "failed": failed}
        content = result.pop("content", None)
        return {
            "result": json.dumps({**result, "analysed": content is not None}),
            "content": content or b"",
            "error": "",
            "failed": False,
        }


def ray_mapper(kind: str, config: CurateConfig, tasks: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """As stdit.curation.work.local_mapper, on actors. ValueError: an error of a worker; WorkFailed, where a later call
    may do better."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    gpus = ray.cluster_resources().get("GPU", 0) if kind != "analyse" else 0
    # A model is loaded by as many actors as there are GPUs; on CPUs alone, by one.
    workers = min(len(tasks), config.workers if kind == "analyse" else max(1, int(gpus)))
    machines = sum(node["Alive"] for node in ray.nodes())
    rows = ray.data.from_items([{"task": json.dumps(task)} for task in tasks], override_num_blocks=len(tasks))
    done = rows.map(
        cast(Any, Worker),
        fn_constructor_args=(kind, config.model_dump(mode="json"), os.getcwd(), math.ceil(workers / machines)),
        compute=ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=1 if gpus else None,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise (WorkFailed if row["failed"] else ValueError)(row["error"])
        result = json.loads(row["result"])
        content = row["content"] if result.pop("analysed") else None
        yield {**result, "content": content} if kind == "analyse" else result


def curate_clips(config: CurateConfig) -> Path:
    """The curation on `config.workers` actors; the path of the manifest. Raises as stdit.curate.run."""
    from stdit.curate import run

    how = connect(config.workers)
    try:
        return run(config, ray_mapper)
    finally:
        if how == "started":
            disconnect()


def curate_footage(config: CurateConfig) -> Path:
    """The curation of a plan: in the driver with one worker, else on actors."""
    from stdit.curate import run

    return run(config) if config.workers == 1 else curate_clips(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as those of `stdit curate`."""
    from stdit.curate import main as curate_main

    return curate_main(argv, "python -m pipelines.curate_clips", curate_clips)


if __name__ == "__main__":
    sys.exit(main())
