"""A run on several feature sets: stopped and resumed on other ranks it sees the same samples, and it says what each set
gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.plan import Plan, resolve
from stdit import extract
from stdit.config import ConfigError, validate
from stdit.training.data import describe_data, open_data
from stdit.training.derive import complete
from tests.support import clip_folder
from tests.support.rank_jobs import config_of, run_recorded, settings
from tests.support.rank_pool import Pool, RankError


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two feature sets of 12 and 24 clips, the smaller one with three quarters of the samples."""
    found: list[dict[str, Any]] = []
    for name, count, weight in (("a", 12, 0.75), ("b", 24, 0.25)):
        home = tmp_path_factory.mktemp(name)
        out = extract.run(clip_folder.config(home, clip_folder.rows(home, count), buckets=clip_folder.BUCKETS[:2]))
        found.append({"path": str(out), "weight": weight})
    return found


def mixed(run_dir: Path, sets: list[dict[str, Any]], **train: Any) -> dict[str, Any]:
    data = settings(run_dir, train={"steps": 6, "zero_stage": 1, **train})
    data["model"] = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": [1, 4, 4]}
    data["diffusion"] = {"caption_dropout": 0.3}
    data["data"] = {"features": sets}
    return data


@pytest.mark.distributed
def test_a_mixture_is_resumed_by_other_ranks_and_counts_its_sets(
    pair: Pool, solo: Pool, sets: list[dict[str, Any]], tmp_path: Path
) -> None:
    budget = {"tokens_per_step": 160, "samples_multiple_of": 2}
    whole = solo(run_recorded, mixed(tmp_path / "whole", sets, **budget))
    again = [solo(run_recorded, mixed(tmp_path / "again", sets, **budget), 3) for _ in range(2)]
    data = mixed(tmp_path / "parts", sets, **budget)
    parts = [pair(run_recorded, data, 3), solo(run_recorded, data)]

    def samples(runs: list[Any]) -> dict[tuple[Any, ...], Any]:
        return {entry[:3]: entry[3:] for ranks in runs for rank in ranks for entry in rank["samples"]}

    assert samples(parts) == samples(again) == samples([whole])
    losses = [m["loss"] for m in whole[0]["metrics"]]
    # Bit for bit on as many ranks, up to rounding on others.
    assert [m["loss"] for m in again[-1][0]["metrics"]] == losses
    assert [m["loss"] for m in parts[-1][0]["metrics"]] == pytest.approx(losses, rel=1e-5)
    counts: list[int] = []
    for metrics in (whole[0]["metrics"], parts[-1][0]["metrics"]):
        for entry in metrics:
            counts = [entry[f"samples_seen/{each['path']}"] for each in sets]
            assert sum(counts) == entry["samples_seen"]
    ids = [entry[3] for entry in whole[0]["samples"]]
    assert counts == [sum(i < 12 for i in ids), sum(i >= 12 for i in ids)]
    assert f"samples by set: {sets[0]['path']} {counts[0]} (" in whole[0]["said"]
    assert f"sets: {sets[0]['path']} 75.0% of the samples (9 clips)" in whole[0]["said"]
    other = [sets[0], {**sets[1], "weight": 0.5}]
    with pytest.raises(RankError, match=r"data.features.1.weight: 0.25 -> 0.5") as error:
        solo(run_recorded, mixed(tmp_path / "parts", other, **budget))
    assert error.value.kind == "ConfigError"


def test_what_a_config_leaves_out_follows_from_all_sets(sets: list[dict[str, Any]], tmp_path: Path) -> None:
    config = complete(config_of(mixed(tmp_path / "run", sets)))
    assert (config.model.in_channels, config.model.text_dim, config.model.max_text_tokens) == (3, 16, 24)
    assert [b.key for b in config.data.buckets] == ["1x16x16", "5x16x16"]
    data = open_data(config)
    assert data.frame_rates == {"24": 9}
    assert "25.0% of the samples (18 clips)" in describe_data(config, data)
    assert data.empty_caption is None


def test_a_plan_says_that_it_trains_on_its_own_features(sets: list[dict[str, Any]]) -> None:
    plan = {
        "name": "a", "run_dir": "runs/a", "extraction": {"manifest": "clips", "buckets": [{"frames": 1, "height": 16, "width": 16}]},
        "stages": {"one": {"overrides": {"data": {"features": sets}, "train": {"steps": 1}, "model": {"size": "S"}}}},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=r"stages.one: data.features lists several sets, but a plan's stages"):
        resolve(validate(plan, Plan, "plan.yaml"))
