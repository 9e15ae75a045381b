"""Ranks with another code or config than rank 0 are named before anything is trained."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from stdit.config import merge
from stdit.training import agreement
from tests.support.rank_jobs import run, settings
from tests.support.rank_pool import Pool, RankError


def run_unlike(data: dict[str, Any], other: dict[str, Any], code: str) -> dict[str, Any]:
    """Trains with other settings, and with another code, on rank 1."""
    if os.environ["RANK"] == "0":
        return run(data)
    with patch.object(agreement, "code_digest", lambda package: code):
        return run(merge(data, other))


@pytest.mark.distributed
def test_another_config_on_a_rank_is_named_with_both_values(pair: Pool, tmp_path: Path) -> None:
    data = settings(tmp_path / "run")
    other = {"seed": 5, "train": {"optimizer": {"learning_rate": 0.5}}}
    with pytest.raises(RankError, match=r"rank 1 on \S+ has another config than rank 0 on ") as error:
        pair(run_unlike, data, other, agreement.code_digest(agreement.PACKAGE))
    assert error.value.kind == "ConfigError"
    for text in ("(0 -> 1): seed: 0 -> 5", "train.optimizer.learning_rate: 0.003 -> 0.5"):
        assert text in error.value.message
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.distributed
def test_another_code_on_a_rank_is_named(pair: Pool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 on \S+ runs another code of stdit than rank 0 on "):
        pair(run_unlike, settings(tmp_path / "run"), {}, "0" * 64)


def test_a_codes_digest_is_of_its_files_and_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("y")
    before = agreement.code_digest(tmp_path)
    (tmp_path / "notes.txt").write_text("z")
    assert agreement.code_digest(tmp_path) == before
    (tmp_path / "a.py").write_text("x = 2\n")
    changed = agreement.code_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({before, changed, agreement.code_digest(tmp_path)}) == 3
