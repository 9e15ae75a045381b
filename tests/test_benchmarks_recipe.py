"""The ablation of recipes runs from end to end on tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two recipes of one seed."""
    folder = tmp_path_factory.mktemp("recipe")
    options = ("--quick", "--recipes", "today", "token routing", "--seeds", "0", "--fractions", "1.0")
    done = subprocess.run(
        [sys.executable, "benchmarks/recipe.py", "--out", str(folder), *options],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_recipes_spend_the_same_flops_and_a_routed_one_more_steps(out: Path) -> None:
    result = json.loads((out / "recipe.json").read_text())
    today, routed = result["rows"]
    assert (today["recipe"], routed["recipe"]) == ("today", "token routing")
    assert today["flops"] == result["budget_flops"]
    assert today["steps"] == 8
    assert routed["steps"] > 8
    assert 0.7 * result["budget_flops"] < routed["flops"] <= result["budget_flops"]
    for row in result["rows"]:
        assert 0 < row["validation_loss"] < 10
        assert row["digits_count"] == 10
        assert row["frechet_distance"] > 0
    assert "| token routing | 0." in (out / "recipe.md").read_text()


def test_intervals_are_students_over_seeds_and_differences_are_paired() -> None:
    from benchmarks.recipe import interval, summarize

    rows = [
        {"recipe": name, "fraction": 1.0, "seed": seed, "steps": 5, "flops": 7.0, "validation_loss": loss + seed, "digits_correct": 8, "digits_count": 10, "frechet_distance": None}
        for name, loss in (("today", 1.0), ("wsd", 0.5))
        for seed in (0, 1, 2)
    ]  # fmt: skip
    today, wsd = summarize(rows)
    assert today["validation_loss"] == pytest.approx((2.0, 4.303 * 1 / 3**0.5), rel=1e-3)
    assert today["validation_loss_difference"] is None
    assert wsd["validation_loss_difference"] == pytest.approx((-0.5, 0.0))
    assert wsd["frechet_distance"] is None
    assert wsd["digits"][0] == pytest.approx(0.8)
    assert 0.6 < wsd["digits"][1] < 0.8 < wsd["digits"][2] < 0.95
    assert interval([3.0]) == (3.0, None)
