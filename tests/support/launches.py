"""What tests share that start stdit/train.py as people do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What the tests' own environment may say of ranks and threads is not for the runs.
LEFT_OUT = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "DS_ACCELERATOR",
    "TORCH_FORCE_WEIGHTS_ONLY_LOAD",
)


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in LEFT_OUT} | {"OMP_NUM_THREADS": "1"}


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], Any], timeout_s: float = 250.0, every_s: float = 0.1) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(every_s)
