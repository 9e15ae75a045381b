"""What `make gpu` measures runs from end to end on tiny sizes, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT


def benchmark(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def half_hour(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts of `make gpu`, the recipes among them, on the CPU."""
    out = tmp_path_factory.mktemp("gpu")
    done = benchmark("gpu.py", "--out", str(out), "--quick")
    assert done.returncode == 0, done.stdout + done.stderr
    return {"out": out, "printed": done.stdout, **json.loads((out / "gpu.json").read_text())}


@pytest.mark.slow
def test_the_gpu_report_has_every_part(half_hour: dict[str, Any]) -> None:
    parts = half_hour["parts"]
    assert list(parts) == ["tests", "attention", "parity", "speed", "recipe"]
    assert not [part["failed"] for part in parts.values() if "failed" in part]
    native = [row for row in parts["attention"]["rows"] if row["backend"] == "native"]
    assert all(row["error"] < 0.02 and row["forward_s"] > 0 for row in native)
    for row in parts["parity"]["rows"]:
        assert row["float32"] < 1e-4
        assert row["bfloat16_ours"] < 2 * row["bfloat16_theirs"] + 1e-3
    assert {row["model"] for row in parts["speed"]["rows"]} == {"DiT-S/2", "PixArt-S/2", "Latte-S/2"}
    assert "| model | float32 |" in (half_hour["out"] / "gpu.md").read_text()


@pytest.mark.slow
def test_without_a_gpu_only_the_quick_report_runs(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = benchmark("gpu.py", "--out", str(tmp_path / "out"), "--parts", "parity")
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
