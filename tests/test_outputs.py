"""No command overwrites or removes a file that it has not written: refused in one line, before work, and nothing is
touched."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from stdit import compare, extract, plan_compute
from stdit.config import ConfigError, CurateConfig, EvaluateConfig, EvaluationConfig, validate
from stdit.data.digit_films import make_films
from stdit.data.digits import make_digits
from stdit.evaluate import EvaluationPrompts, evaluate_runs
from stdit.evaluation.evaluator import evaluate_videos
from stdit.evaluation.scores import evaluate_media
from stdit.media import write_video
from stdit.outputs import check_outputs, claim_outputs, own_outputs
from tests.support import clip_folder
from tests.support.paths import ROOT


def test_a_name_is_a_commands_own_once_it_has_claimed_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    claim_outputs(out, "compare", ["a.json", "b"])
    (out / "a.json").write_text("ours")
    claim_outputs(out, "compare", ["a.json", "c"])
    assert own_outputs(out, "compare") == {"a.json", "b", "c"}
    with pytest.raises(ConfigError, match=r"holds a\.json that stdit curate has not written; nothing was changed"):
        check_outputs(out, "curate", ["a.json", "d"])
    (out / "dangling").symlink_to("gone")
    with pytest.raises(ConfigError, match="holds dangling"):
        claim_outputs(out, "compare", ["dangling"])
    assert own_outputs(out, "compare") == {"a.json", "b", "c"}


def test_a_list_of_own_files_that_was_edited_claims_nothing(tmp_path: Path) -> None:
    claim_outputs(tmp_path, "compare", ["a.json"])
    file = tmp_path / ".stdit-compare.json"
    file.write_text(file.read_text().replace("a.json", "thesis.json"))
    (tmp_path / "thesis.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"stdit-compare\.json: was changed after it was written"):
        claim_outputs(tmp_path, "compare", ["thesis.json"])


def _media(folder: Path) -> Path:
    folder.mkdir()
    for i in range(2):
        write_video(folder / f"{i}.mp4", np.full((3, 16, 16, 3), 90 * i, np.uint8), 8)
    return folder


def _evaluate(out: Path, home: Path) -> object:
    manifest = clip_folder.write(home, clip_folder.rows(home, 2))
    return evaluate_runs([home / "run"], manifest, out, EvaluationPrompts(), EvaluationConfig())


def _score(out: Path, home: Path) -> object:
    data = {"generated": str(_media(home / "media")), "out": str(out), "save_samples": False}
    return evaluate_media(validate(data, EvaluateConfig, "test"))


def _curate(out: Path, home: Path) -> object:
    from stdit.curate import run

    out.joinpath("cache.sqlite").touch()  # of whatever program
    return run(validate({"footage": str(_media(home / "media")), "out": str(out)}, CurateConfig, "test"))


def _ladder(out: Path, home: Path) -> object:
    given = ["--config", str(ROOT / "configs/debug.yaml"), "--budget", "1e15", "--out", str(out)]
    for text in ("train.steps=400", "model={hidden_size: 96, depth: 4, num_heads: 6, num_classes: 10, text_dim: null}"):
        given += ["--set", text]

    def no_run(*_: object) -> int:
        raise AssertionError("a run was begun")

    return plan_compute.plan(plan_compute.arguments().parse_args(given), no_run)


def _plan(out: Path, home: Path) -> object:
    from pipelines.train_stages import run_plan

    plan = {
        "name": "small",
        "run_dir": str(out),
        "extraction": {
            "manifest": str(home / "none.jsonl"),
            "buckets": [{"frames": n, "height": 16, "width": 16} for n in (1, 4)],
        },
        "stages": {"one": {"config": str(ROOT / "configs/debug.yaml")}},
    }
    (home / "plan.yaml").write_text(yaml.safe_dump(plan))
    return run_plan(home / "plan.yaml")


def _extract(out: Path, home: Path) -> object:
    config = clip_folder.config(home, clip_folder.rows(home, 2)).model_copy(update={"out": out})
    return extract.run(config, overwrite=True)


COMMANDS: list[tuple[str, Callable[[Path, Path], object]]] = [
    ("metrics.json", _evaluate),
    ("run/prompts.jsonl", _evaluate),
    ("run/videos/metrics.json", _evaluate),
    ("scores.json", _score),
    ("manifest.jsonl", _curate),
    ("report.json", _curate),
    ("curation.html", _curate),
    ("proposal.yaml", _ladder),
    ("ladder.json", _ladder),
    ("report.json", _plan),
    ("report.html", _plan),
    ("report/loss.png", _plan),
    ("extraction.json", _extract),
    ("films/plain.mp4", lambda out, home: make_films(out)),
    ("digits.json", lambda out, home: make_digits(out, overwrite=True)),
]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_a_file_of_another_program_is_refused_and_kept(
    name: str, command: Callable[[Path, Path], object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    file = out / name
    file.parent.mkdir(parents=True)
    file.write_text('{"mine": 1}')
    (home := tmp_path / "home").mkdir()
    with pytest.raises(ValueError, match=r"has not written|not made by this program") as caught:
        command(out, home)
    assert "\n" not in str(caught.value)
    assert file.read_text() == '{"mine": 1}'
    left = {path for path in out.rglob("*") if path.is_file()}
    assert left <= {file, out / "cache.sqlite", out / ".lock"}


def test_metrics_and_pages_of_another_program_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for file in (videos / "metrics.json", tmp_path / "compare.html", tmp_path / "votes.jsonl"):
        file.write_text('{"mine": 1}')
    monkeypatch.setattr(compare, "open_runs", lambda paths: [])
    with pytest.raises(ConfigError, match=r"compare\.html that stdit compare has not written"):
        compare.compare([], tmp_path)
    manifest = clip_folder.write(tmp_path, clip_folder.rows(tmp_path, 2))
    (videos / "manifest.jsonl").write_text(json.dumps({"file": None, "prompt": "", "seed": 0}) + "\n")
    monkeypatch.setattr("stdit.evaluation.evaluator.fingerprint_videos", lambda folder: "")
    config = EvaluationConfig(class_column=None, direction_column=None)
    with pytest.raises(ConfigError, match=r"metrics\.json that stdit evaluate has not written"):
        evaluate_videos(videos, manifest, config)
    assert {path.read_text() for path in (videos / "metrics.json", tmp_path / "compare.html")} == {'{"mine": 1}'}
