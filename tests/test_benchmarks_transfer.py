"""The transfer curve of learning rates: its table, and that it runs."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def test_the_table_marks_the_best_rate_and_what_the_narrow_models_costs() -> None:
    from benchmarks.transfer import table

    losses = {(64, 1e-3): 0.5, (64, 2e-3): 0.4, (128, 1e-3): 0.3, (128, 2e-3): math.inf}
    rows = [{"width": w, "rate": r, "loss": loss, "mup": False} for (w, r), loss in losses.items()]
    rows += [{**row, "mup": True, "loss": row["rate"]} for row in rows]
    found = table(
        {"date": "d", "device": "c", "torch": "t", "base": "b", "set": [], "steps": 1, "seed": 0, "rows": rows}
    )
    assert "| plain | 64 | 0.5000 | **0.4000** | 0.0000 |" in found
    assert "| plain | 128 | **0.3000** | inf | inf |" in found
    assert "| µP | 128 | **0.0010** | 0.0020 | 0.0000 |" in found


@pytest.mark.slow
def test_it_runs_on_tiny_sizes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/transfer.py", "--quick", "--out", str(tmp_path)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "transfer.json").read_text())["rows"]
    assert [(row["width"], row["mup"]) for row in rows[::2]] == [(32, False), (32, True), (64, False), (64, True)]
    plain, scaled = ([row["loss"] for row in rows[i : i + 2]] for i in (4, 6))
    assert plain != scaled
    assert all(0 < row["loss"] < 10 for row in rows)
