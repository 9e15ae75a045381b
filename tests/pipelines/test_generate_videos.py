"""Batch generation under Ray: how many work at it changes nothing but the time."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pipelines.generate_videos import generate_groups, generate_videos, main
from stdit.config import GenerateConfig
from stdit.data.decoding import open_clip
from tests.support.runs import TEXT, make_run, model_config

pytestmark = pytest.mark.ray
PROMPTS = ["a seven", "../../etc/passwd", "左へ", "", "bad \ud800", "word " * 300, "b"]


class Made(NamedTuple):
    out: Path
    rows: list[dict[str, Any]]
    outcomes: list[Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "text", model_config(**TEXT))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


def config(run: Path, prompts: Path, out: Path, **changes: Any) -> GenerateConfig:
    asked = {"run": run, "prompts": prompts, "out": out, "steps": 2, "batch_size": 2, "device": "cpu"}
    return GenerateConfig(**{**asked, **changes})


def videos(out: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(out.glob("*.mp4")):
        with open_clip(path, "pyav") as reader:
            found[path.name] = reader.get(range(reader.frame_count))
    return found


@pytest.fixture(scope="module")
def made(local_ray: None, run: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Made]:
    """What two workers made, and (0) what was made without Ray."""
    from stdit.generate import finish, job_from_config, run_groups

    out = tmp_path_factory.mktemp("by2")
    found = {2: Made(out, *generate_videos(config(run, prompts, out, workers=2), progress=False))}
    job = job_from_config(config(run, prompts, tmp_path_factory.mktemp("here")))
    outcomes = run_groups(job, "cpu")
    found[0] = Made(job.out, finish(job, outcomes), outcomes)
    return found


def check_the_same(one: Made, other: Made) -> None:
    assert one.rows == other.rows
    frames, others = videos(one.out), videos(other.out)
    assert frames.keys() == others.keys()
    assert all(np.array_equal(others[name], video) for name, video in frames.items())
    assert len(frames) == 6


def test_generation_is_the_same_with_two_workers_and_without_ray(made: dict[int, Made]) -> None:
    check_the_same(made[0], made[2])


@pytest.mark.slow
def test_generation_is_the_same_with_one_worker(
    made: dict[int, Made], run: Path, prompts: Path, tmp_path: Path
) -> None:
    one = Made(tmp_path, *generate_videos(config(run, prompts, tmp_path, workers=1), progress=False))
    check_the_same(made[0], one)


def test_a_failing_prompt_is_reported_and_the_rest_is_made(made: dict[int, Made]) -> None:
    for some in made.values():
        assert [row["index"] for row in some.rows if row["file"] is None] == [4]
        assert "not valid Unicode" in some.rows[4]["error"]
        assert [o.note for o in some.outcomes if o.note] == ["caption of 1501 tokens cut to 24"]


@pytest.mark.slow
def test_a_second_command_makes_only_what_is_missing(
    made: dict[int, Made], run: Path, prompts: Path, capsys: Any
) -> None:
    out = made[2].out
    before = videos(out)
    times = {name: (out / name).stat().st_mtime_ns for name in before}
    gone = sorted(before)[1]
    (out / gone).unlink()
    command = ["--run", str(run), "--prompts", str(prompts), "--out", str(out), "--steps", "2", "--batch-size", "2"]
    command += ["--device", "cpu"]
    assert main(command) == 1
    assert np.array_equal(videos(out)[gone], before[gone])
    assert {n for n in times if (out / n).stat().st_mtime_ns != times[n]} == {gone}
    assert "6 of 7 videos" in capsys.readouterr().out
    assert main([*command, "--guidance", "2"]) == 2
    assert "guidance_scale: 4.0 -> 2.0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_a_worker_that_can_not_load_stops_all_and_says_why(run: Path, prompts: Path, tmp_path: Path) -> None:
    from stdit.generate import job_from_config

    job = job_from_config(config(run, prompts, tmp_path))
    gone = replace(job, source=replace(job.source, path=tmp_path / "gone"))
    with pytest.raises(RuntimeError, match="a worker stopped: .*gone"):
        generate_groups(gone, 1, "cpu", progress=False)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("gpus", [0, 8])
def test_a_clusters_workers_decide_in_what_precision_is_generated(
    run: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    asked: list[str | None] = []
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 4.0} | ({"GPU": float(gpus)} if gpus else {}))
    monkeypatch.setattr("stdit.generate.job_from_config", lambda config: asked.append(config.device) or 1 / 0)
    for device in (None, "cpu"):
        with pytest.raises(ZeroDivisionError):
            generate_videos(GenerateConfig(run=run, prompts=prompts, out=tmp_path / "out", device=device))
    assert asked == ["cuda" if gpus else "cpu", "cpu"]


@pytest.mark.usefixtures("local_ray")
def test_gpus_that_are_not_there_are_not_waited_for(run: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    import ray

    if ray.cluster_resources().get("GPU"):
        pytest.skip("this machine has a GPU")
    command = ["--run", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--device", "cuda"]
    assert main(command) == 2
    assert "no GPU on this machine" in capsys.readouterr().err


def test_nothing_is_started_for_a_request_that_can_not_be_met(run: Path, tmp_path: Path, capsys: Any) -> None:
    import ray

    running = ray.is_initialized()
    base = ["--run", str(run), "--prompts", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]
    assert main(base) == 2
    assert "none.txt: cannot be read" in capsys.readouterr().err
    assert main([*base, "--workers", "0"]) == 2
    assert "command line: workers" in capsys.readouterr().err
    assert ray.is_initialized() == running
    assert not (tmp_path / "out").exists()


def test_a_damaged_run_is_input_that_cannot_be_used(prompts: Path, tmp_path: Path, capsys: Any) -> None:
    from stdit.generate import main as one_process

    run = make_run(tmp_path / "run", model_config(**TEXT))
    for file in run.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    command = ["--run", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--device", "cpu"]
    for command_line in (main, one_process):
        assert command_line(command) == 2
        assert "safetensors" in capsys.readouterr().err
