"""Curation on Ray actors, and as the first part of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import plan as plans
from stdit.config import CaptionConfig, ConfigError, CurateConfig, dump
from stdit.data.digit_films import make_films
from tests.support.videos import lossless, smooth

RULES = CaptionConfig(name="rules", function="stdit.curation.rule_based:rule_based_caption")


@pytest.mark.ray
@pytest.mark.slow
def test_actors_write_the_manifest_of_one_process(tmp_path: Path) -> None:
    from pipelines.curate_clips import curate_clips
    from stdit.curate import run

    make_films(tmp_path / "films")
    local = CurateConfig(footage=str(tmp_path / "films" / "films"), out=tmp_path / "local", captions=(RULES,))
    cluster = local.model_copy(update={"out": tmp_path / "cluster", "workers": 2})
    assert run(local).read_bytes() == curate_clips(cluster).read_bytes()


def plan(tmp_path: Path, **changes: object) -> plans.Plan:
    data = {
        "name": "films",
        "run_dir": tmp_path / "run",
        "curation": {"footage": str(tmp_path / "films")},
        "extraction": {"buckets": [{"frames": n, "height": 16, "width": 16} for n in (1, 4, 8)]},
        "stages": {"model": {"config": "configs/debug.yaml"}},
        **changes,
    }
    return plans.Plan.model_validate(data)


def test_a_plan_extracts_what_its_curation_writes(tmp_path: Path) -> None:
    found = plan(tmp_path)
    assert found.reference.curate is not None
    assert found.reference.curate.out == tmp_path / "run" / "curated"
    assert found.reference.extract.manifest == tmp_path / "run" / "curated" / "manifest.jsonl"


def test_the_footage_of_a_plan_is_what_it_prepares(tmp_path: Path) -> None:
    prepare = {"module": "stdit.data.digit_films", "manifest": "films.json"}
    found = plan(tmp_path, prepare=prepare, curation={})
    assert found.reference.curate is not None
    assert found.reference.curate.footage == str(tmp_path / "run" / "data")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curation": {}}, "curation.footage is needed"),
        (
            {"extraction": {"manifest": "m.jsonl", "buckets": [{"frames": 1, "height": 8, "width": 8}]}},
            "with `curation` it is",
        ),
        ({"stages": {"curated": {"config": "configs/debug.yaml"}}}, "can't be called 'curated'"),
    ],
)
def test_contradictory_plans_are_errors(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plan(tmp_path, **changes)


def test_a_plan_curates_before_it_derives_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import checks, train_stages

    (tmp_path / "films").mkdir()
    lossless(tmp_path / "films" / "a.mp4", smooth(40, 24, 32))
    (tmp_path / "plan.yaml").write_text(dump(plan(tmp_path)))

    def stop(own: plans.Plan, stages: object) -> None:
        assert Path(own.reference.extract.manifest).is_file()
        raise ConfigError("far enough")

    monkeypatch.setattr(checks, "complete", stop)
    with pytest.raises(ConfigError, match="far enough"):
        train_stages.run_plan(tmp_path / "plan.yaml")
