"""benchmarks/loader.py runs, on a few samples."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from benchmarks import loader


@pytest.mark.slow
def test_loaders_are_compared_locally_and_over_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("IMAGES", 40), ("BATCH", 8), ("WIDTH", 16), ("RESULTS", tmp_path / "results" / "loader.md")):
        monkeypatch.setattr(loader, name, value)
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # put back afterwards
    loader.main(["--step-s", "0.01", "--latency-s", "0.01"])
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \|", (tmp_path / "results/loader.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    assert all(int(rate.replace(",", "")) > 0 for _, rate in rows)
