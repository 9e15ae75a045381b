"""benchmarks/training.py runs as documented, on tiny sizes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_step_is_compared_with_bare_loops(tmp_path: Path) -> None:
    sizes = ["--hidden", "64", "--depth", "1", "--side", "8", "--steps", "4", "--zero", "1"]
    command = [sys.executable, "benchmarks/training.py", *sizes, "--out", str(tmp_path / "table.md")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in done.stdout
    found = re.findall(
        r"^\| (train|DeepSpeed|PyTorch) \| ([\d.]+) .*\| ([\d.]+) \(.*\| ([\d.]+) \(", table, re.MULTILINE
    )
    assert [name for name, *_ in found] == ["train", "DeepSpeed", "PyTorch"]
    assert all(float(value) > 0 for _, *values in found for value in values)
    assert (found[1][3], found[2][2]) == ("1.000", "1.000")
