"""The top share of a column: of all clips, per class, per duration; in manifests and in features alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from stdit.config import Where
from stdit.data import manifest
from stdit.data.filters import check_where, filtered


def read(tmp_path: Path, rows: list[dict[str, Any]]) -> manifest.Manifest:
    lines = [json.dumps({"path": f"{i}.mp4", "caption": "", **row}) + "\n" for i, row in enumerate(rows)]
    (tmp_path / "m.jsonl").write_text("".join(lines))
    return manifest.read(tmp_path / "m.jsonl")


def kept(found: manifest.Manifest, *where: Where) -> list[int]:
    check_where(found, where)
    return [int(clip.key.removesuffix(".mp4")) for clip in filtered(found, where)]


ROWS = [
    {"score": 9, "class": "a", "frames": 1},
    {"score": 8, "class": "a", "frames": 1},
    {"score": 1, "class": "b", "frames": 1},
    {"score": 2, "class": "b", "frames": 16},
    {"score": 7, "class": "a", "frames": 16},
    {"score": None, "class": "b", "frames": 16},
]


def test_the_top_share_is_of_all_per_class_or_per_duration(tmp_path: Path) -> None:
    found = read(tmp_path, ROWS)
    assert kept(found, Where(column="score", top=0.4)) == [0, 1]
    assert kept(found, Where(column="score", top=0.5, per="class")) == [0, 1, 3]
    assert kept(found, Where(column="score", top=0.34, per="duration")) == [0, 4]


def test_the_share_is_of_what_passes_the_other_filters_whatever_their_order(tmp_path: Path) -> None:
    found = read(tmp_path, ROWS)
    top, other = Where(column="score", top=0.5), Where(column="class", one_of=("b",))
    assert kept(found, top, other) == kept(found, other, top) == [3]


def test_a_group_keeps_at_least_one_and_of_equals_the_first(tmp_path: Path) -> None:
    found = read(tmp_path, [{"score": 5}] * 3)
    assert kept(found, Where(column="score", top=0.01)) == [0]


def test_top_of_text_and_groups_of_no_column_are_errors(tmp_path: Path) -> None:
    found = read(tmp_path, ROWS)
    with pytest.raises(manifest.ManifestError, match="holds text"):
        kept(found, Where(column="class", top=0.5))
    with pytest.raises(manifest.ManifestError, match="per: no column 'kind'"):
        kept(found, Where(column="score", top=0.5, per="kind"))
    with pytest.raises(ValidationError, match="needs top"):
        Where(column="score", at_least=1, per="class")
    with pytest.raises(ValidationError):
        Where(column="score", top=0.0)
