"""How the suite runs in parallel (pytest-xdist): workers and threads by the cores there are, and what shares a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # `tests.support` is importable however pytest is started
    sys.path.insert(0, ROOT)

# More workers than this gain nothing: the longest group takes longer than their share.
MAX_WORKERS = 8
# Groups run in one worker each, so that Ray, rank pools and trained readers start once; the longest ones begin first.
GROUPS = (
    "tests/pipelines/test_train_stages.py::test_a_plan_survives",
    "tests/training/",
    "tests/pipelines/test_generate_videos.py",
    "tests/test_train.py",
    "tests/test_golden.py",
    "tests/pipelines/test_extract_features.py",
    "tests/evaluation/",
    "tests/pipelines/test_evaluate_runs.py",
    "tests/inference/test_pipeline.py",
    "tests/inference/test_pipeline_lora_control.py",
    "tests/inference/test_pipeline_text.py",
    "tests/test_generate.py",
    "tests/test_extract.py",
    "tests/data/",
    "tests/encoders/",
    # Many short tests: one message to the worker instead of hundreds.
    "tests/weights/test_transfer.py",
    "tests/weights/test_convert",
    "tests/weights/test_parity",
    "tests/test_architecture.py",
    "tests/config/",
    "tests/diffusion/",
    "tests/cluster/",
)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a worker per core that this process may use."""
    return min(cores(), MAX_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Divides the cores between the workers; what a test starts inherits its share."""
    # Ray gives its workers niceness 15: beside another test worker's processes they would hardly run.
    os.environ.setdefault("RAY_worker_niceness", "0")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, cores() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


def _group(item: pytest.Item) -> int:
    return next((i for i, prefix in enumerate(GROUPS) if item.nodeid.startswith(prefix)), len(GROUPS))


# Before pytest-xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the groups, and runs them before all other tests; those are handed out one by one."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    for item in items:
        if (group := _group(item)) < len(GROUPS):
            item.add_marker(pytest.mark.xdist_group(GROUPS[group]))
    items.sort(key=_group)
