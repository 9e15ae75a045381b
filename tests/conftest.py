"""How the suite runs in parallel (pytest-xdist): workers and threads by the cores there are, and what shares a
process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.support.object_store import ObjectStore

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # `tests.support` is importable however pytest is started
    sys.path.insert(0, ROOT)

# More workers than this gain nothing: the longest group takes longer than their share.
MAX_WORKERS = 8
# Groups run in one worker each, so that Ray, rank pools and trained readers start once; the longest ones begin first.
# The one called "ray" shares the fixture `local_ray`.
GROUPS: dict[str, tuple[str, ...]] = {
    "training": ("tests/training/",),
    "plan": (
        "tests/pipelines/test_train_stages.py::test_a_plan_survives",
        "tests/pipelines/test_train_stages.py::test_a_plan_goes",
    ),
    "ray": (
        "tests/pipelines/test_generate_videos.py",
        "tests/pipelines/test_extract_features.py",
        "tests/evaluation/test_scores.py::test_workers",
    ),
    "train": ("tests/test_train.py",),
    "compile": ("tests/models/test_compile.py",),
    "golden": ("tests/test_golden.py",),
    "evaluation": ("tests/evaluation/",),
    "evaluate_runs": ("tests/pipelines/test_evaluate_runs.py",),
    "pipeline": ("tests/inference/test_pipeline.py",),
    "pipeline_lora_control": ("tests/inference/test_pipeline_lora_control.py",),
    "pipeline_text": ("tests/inference/test_pipeline_text.py",),
    "generate": ("tests/test_generate.py",),
    "extract": ("tests/test_extract.py",),
    "data": ("tests/data/",),
    "encoders": ("tests/encoders/",),
    # Many short tests: one message to the worker instead of hundreds.
    "transfer": ("tests/weights/test_transfer.py",),
    "convert": ("tests/weights/test_convert",),
    "parity": ("tests/weights/test_parity",),
    "architecture": ("tests/test_architecture.py",),
    "config": ("tests/config/",),
    "diffusion": ("tests/diffusion/",),
    "cluster": ("tests/cluster/",),
}


# Of a slow test: several times what it takes on an idle machine.
SLOW_TIMEOUT_S = 900


def cores() -> int:
    from stdit.cores import available_cores

    return available_cores()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a worker per core that this process may use, and one for the time in which tests wait for their
    processes."""
    return min(cores() + 1, MAX_WORKERS)


def pytest_configure(config: pytest.Config) -> None:
    """Divides the cores between the workers; what a test starts inherits its share."""
    # Ray gives its workers niceness 15: beside another test worker's processes they would hardly run.
    os.environ.setdefault("RAY_worker_niceness", "0")
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        threads = max(1, cores() // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray of two CPUs, started once."""
    from pipelines.workers import connect, disconnect

    started = connect(2)
    yield
    if started == "started":
        disconnect()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3 server on loopback with bucket `bucket`, started once; tests take `s3`."""
    from tests.support.object_store import ObjectStore

    folder = tmp_path_factory.mktemp("store")
    (folder / "bucket").mkdir()
    with ObjectStore(folder) as store:
        yield store


@pytest.fixture
def s3(s3_server: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """The S3 server, whose failures last milliseconds."""
    from stdit.data import objects

    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(objects, "LONGEST_WAIT_S", 0.02)
    s3_server.heal()
    yield s3_server
    s3_server.heal()


@pytest.fixture(autouse=True)
def _scheduled_as_before() -> Iterator[None]:
    """No test leaves its worker, and all that later tests start, at real-time priority (tests/support/videos.py)."""
    yield
    if hasattr(os, "sched_getscheduler"):
        assert os.sched_getscheduler(0) not in (os.SCHED_FIFO, os.SCHED_RR)


@pytest.fixture(autouse=True)
def _no_rank() -> Iterator[None]:
    """No test trains in its worker: all that later tests start would take themselves for one of its ranks."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    before = [os.environ.get(name) for name in names]
    yield
    assert [os.environ.get(name) for name in names] == before


def _group(item: pytest.Item) -> str | None:
    return next((name for name, prefixes in GROUPS.items() if item.nodeid.startswith(prefixes)), None)


# Before pytest-xdist's own, which reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the groups, and runs them before all other tests; those are handed out one by one."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TIMEOUT_S))
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
    order = {name: i for i, name in enumerate((*GROUPS, None))}
    items.sort(key=lambda item: order[groups[item]])
