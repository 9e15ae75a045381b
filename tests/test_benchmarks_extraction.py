"""benchmarks/extraction.py runs, on a few clips."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import extraction


@pytest.mark.slow
def test_the_busy_share_of_an_encoder_is_measured_for_each_number_of_decoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SIDE", 64), ("SOURCE_SIDE", 128), ("RESULTS", tmp_path / "results" / "extraction.md")):
        monkeypatch.setattr(extraction, name, value)
    extraction.main(["--clips", "12", "--decoders", "1", "3"])
    rows = re.findall(
        r"^\| (\d) \| .* \| ([\d.]+)% \|$", (tmp_path / "results/extraction.md").read_text(), re.MULTILINE
    )
    assert [decoders for decoders, _ in rows] == ["1", "3"]
    assert all(0 < float(busy) <= 100 for _, busy in rows)
