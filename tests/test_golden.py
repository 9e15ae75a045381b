"""Golden losses: a refactoring leaves the losses of every kind of stage as they are (`make golden` rewrites them)."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support import forked
from tests.support.golden import GOLDEN, TOLERANCE, names


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All golden runs, in one process of one thread."""
    folder = tmp_path_factory.mktemp("golden")
    done = forked.run("tests.support.golden", folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout_s=240)
    assert done.returncode == 0, done.stderr
    return folder


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", names())
def test_losses_are_the_golden_ones(results: Path, name: str) -> None:
    golden, found = read(GOLDEN / f"{name}.json"), read(results / f"{name}.json")
    if found["machine"] == golden["machine"]:
        assert found["losses"] == golden["losses"]
    assert found["losses"] == pytest.approx(golden["losses"], rel=TOLERANCE)


def test_every_golden_file_has_a_run() -> None:
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(names())
