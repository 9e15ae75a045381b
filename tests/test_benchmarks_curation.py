"""benchmarks/curation.py: its part `scale` measures what `stdit curate` does with thousands of clips."""

from __future__ import annotations

from pathlib import Path

from benchmarks import curation


def test_many_clips_are_curated_and_filtered_again(tmp_path: Path) -> None:
    lines = curation.scale(tmp_path, files=3, shots=2)
    assert lines[0].startswith("3 files; ")
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[-2:])
    assert first[0].startswith("first run")
    assert int(first[2]) == int(second[2]) >= 6
    assert int(second[3]) <= int(first[3])
