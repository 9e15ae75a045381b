"""Batch generation under Ray: how many work at it changes nothing but the time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.generate_videos import generate_videos, main
from pipelines.workers import connect, disconnect
from stdit.config import GenerateConfig
from stdit.data.decode import open_clip
from tests.made_runs import TEXT, make_run, model_config

pytestmark = pytest.mark.ray
PROMPTS = ["a seven", "../../etc/passwd", "左へ", "", "bad \ud800", "word " * 300, "b"]


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    """One local Ray for this file."""
    started = connect(4)
    yield
    if started == "started":
        disconnect()


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


@pytest.mark.usefixtures("ray")
def test_generation_is_the_same_with_one_worker_and_two_and_without_ray(
    run: Path, prompts: Path, tmp_path: Path
) -> None:
    from stdit.generate import finish, job_of, run_groups

    results = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        rows, outcomes = generate_videos(config(run, prompts, out, workers=workers), progress=False)
        assert [row["index"] for row in rows if row["file"] is None] == [4]
        assert "not valid Unicode" in rows[4]["error"]
        assert [o.note for o in outcomes if o.note] == ["caption of 1500 tokens cut to 24"]
        results.append((videos(out), [{k: v for k, v in row.items()} for row in rows]))
    job = job_of(config(run, prompts, tmp_path / "here"))
    results.append((videos(job.out), finish(job, run_groups(job, "cpu"))))
    results[2] = (videos(job.out), results[2][1])
    for others, rows in results[1:]:
        assert rows == results[0][1]
        assert others.keys() == results[0][0].keys()
        assert all(np.array_equal(others[name], frames) for name, frames in results[0][0].items())


@pytest.mark.usefixtures("ray")
def test_a_second_command_makes_only_what_is_missing(run: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    command = [
        "--run",
        str(run),
        "--prompts",
        str(prompts),
        "--out",
        str(tmp_path),
        "--steps",
        "2",
        "--batch-size",
        "2",
    ]
    command += ["--workers", "2", "--device", "cpu"]
    assert main(command) == 1
    before = videos(tmp_path)
    times = {name: (tmp_path / name).stat().st_mtime_ns for name in before}
    gone = sorted(before)[1]
    (tmp_path / gone).unlink()
    assert main(command) == 1
    assert np.array_equal(videos(tmp_path)[gone], before[gone])
    assert {n for n in times if (tmp_path / n).stat().st_mtime_ns != times[n]} == {gone}
    assert capsys.readouterr().out.count("6 of 7 videos") == 2
    assert main([*command, "--guidance", "2"]) == 2
    assert "guidance_scale: 4.0 then, 2.0 now" in capsys.readouterr().err


@pytest.mark.usefixtures("ray")
def test_a_worker_that_can_not_start_says_why(run: Path, prompts: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["--run", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "out"), "--steps", "2"]
    assert main([*command, "--device", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err


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
