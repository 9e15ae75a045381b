"""Laws of the report: what it must say is there by name, nothing of it lies elsewhere, and captions cannot write
HTML."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.html import duration
from pipelines.report import _different_captions_first, write_report
from stdit.evaluation.generated import read_generated
from stdit.evaluation.pictures import cell_of, loss_curves, read_losses, smooth
from stdit.evaluation.tables import number, percent


def clip_of(frames: int = 4, side: int = 8) -> np.ndarray:
    """A bright pixel that walks."""
    clip = np.zeros((frames, side, side, 3), np.uint8)
    for t in range(frames):
        clip[t, 2, t % side] = 255
    return clip


def save_videos(folder: Path, prompts: list[str], frames: int = 4) -> Path:
    """As stdit.generate leaves them: one of the prompts failed."""
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"prompt": "x", "file": None, "error": "boom"}]
    for i, prompt in enumerate(prompts):
        images = [Image.fromarray(f) for f in clip_of(frames)]
        if frames > 1:
            images[0].save(folder / f"{i}.png", save_all=True, append_images=images[1:])
        else:
            images[0].save(folder / f"{i}.png")
        rows.append({"prompt": prompt, "file": f"{i}.png", "seed": i, "fps": 8, "protocol": {"step": 3}})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_metrics(run: Path, steps: int) -> Path:
    run.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": s, "loss": 1 / s, "learning_rate": 0.1} for s in range(1, steps + 1)]
    rows.append({"step": steps, "validation_loss": 0.5})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def metrics_of(prompts: list[str], moving: bool = True) -> dict[str, Any]:
    """What evaluate() returns, for clips of which the first is right and the others are not."""
    both = {"class": [0.1, 0.9], "direction": [0.2, 0.8] if moving else None}
    accuracies = {"class_accuracy": 0.5, "direction_accuracy": 0.25 if moving else None}
    distances = {"frechet_distance": 12.5, "kernel_distance": -0.25}
    table = {"names": ["1", "7"], "counts": [[1, 0], [1, 0]]}
    return {
        "class_name": "digit",
        **accuracies,
        **distances,
        "classifier_accuracy": 0.99,
        "intervals": both,
        "counts": {"class": 2, "direction": 2, "generated": len(prompts), "real": 40, "frechet_reference": 20},
        "confusion": {"class": table, "direction": None},
        "real": {**accuracies, **distances, "intervals": both},
        "protocol": {"steps": 20, "guidance_scale": 3.0, "weights": "ema", "seeds": {"first": 0}},
        "clips": [
            {"file": f"{i}.png", "prompt": p, "class": "7", "predicted_class": "7" if i == 0 else "1"}
            | {"direction": "left" if moving else None, "predicted_direction": "left" if moving else None}
            for i, p in enumerate(prompts)
        ],
    }


@pytest.fixture
def stages(tmp_path: Path) -> list[dict[str, Any]]:
    prompts = ["a seven", "<script>alert(1)</script> & 七"]
    made = []
    for name, frames in (("images", 1), ("clips", 4)):
        run, videos = save_metrics(tmp_path / name, 30), save_videos(tmp_path / name / "videos", prompts, frames)
        made.append({"name": name, "steps": 30, "seconds": 61.23, "run": run, "videos": videos})
        made[-1] |= {"metrics": metrics_of(prompts, frames > 1), "checkpoint": run / "checkpoints/step-00000030"}
    return made


def test_every_stage_has_every_metric_under_its_name(stages, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "out", "demo", stages, 777.77, {"clips": {"kept": 3}})
    report = json.loads(paths["report"].read_text())
    assert (report["plan"], report["seconds"], report["data"]) == ("demo", 777.8, {"clips": {"kept": 3}})
    images, clips = report["stages"]
    for stage in (images, clips):
        assert stage | {"steps": 30, "seconds": 61.2, "digit_accuracy": 0.5, "classifier_accuracy": 0.99} == stage
        assert stage["frechet_distance"] == 12.5
        assert stage["counts"]["generated"] == 2
        assert stage["protocol"]["guidance_scale"] == 3.0
        assert stage["checkpoint"].endswith("step-00000030")
    assert images["direction_accuracy"] is None
    assert clips["direction_accuracy"] == 0.25
    assert clips["intervals"] == {"digit_accuracy": [0.1, 0.9], "direction_accuracy": [0.2, 0.8]}
    assert clips["real"]["digit_accuracy"] == 0.5


def test_the_paths_returned_are_the_files_written(stages, tmp_path: Path) -> None:
    paths = write_report(tmp_path / "out", "demo", stages, 1.0)
    assert set(paths) == {"report", "html", "curves", "sheet", "animation"}
    assert all(path.stat().st_size > 0 for path in paths.values())
    assert not list((tmp_path / "out").rglob("*.part*"))
    before = {path: path.read_bytes() for path in paths.values()}
    write_report(tmp_path / "out", "demo", stages, 1.0)
    assert {path: path.read_bytes() for path in paths.values()} == before


def test_the_page_stands_by_itself(stages, tmp_path: Path) -> None:
    text = write_report(tmp_path / "out", "demo", stages, 1.0)["html"].read_text()
    assert not re.search(r'(?:src|srcset|href)="(?!data:image/(?:png|gif);base64,)', text)
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    # Two animations, a sheet, two curves.
    assert text.count("data:image/gif") == 2
    assert text.count("data:image/png") == 3


def test_text_from_outside_is_text_in_the_page(stages, tmp_path: Path) -> None:
    stages[1]["name"] = "<b>bold</b>"
    page = write_report(tmp_path / "out", "<i>plan</i>", stages, 1.0, {"<u>": "<s>"})["html"].read_text()
    for tag in ("<b>bold", "<i>plan", "<u>", "<s>", "<script"):
        assert tag not in page


def test_a_plan_without_metrics_says_so(stages, tmp_path: Path) -> None:
    bare = [{k: v for k, v in stage.items() if k != "metrics"} for stage in stages]
    paths = write_report(tmp_path / "out", "own", bare, 1.0)
    for stage in json.loads(paths["report"].read_text())["stages"]:
        for key in ("class_accuracy", "direction_accuracy", "frechet_distance", "classifier_accuracy", "real"):
            assert stage[key] is None
    assert "n/a" in paths["html"].read_text()
    assert paths["sheet"].is_file()


def test_every_metric_that_is_not_there_has_its_reason(stages, tmp_path: Path) -> None:
    stages[0]["metrics"] |= {"direction_accuracy": None, "protocol": {"frames": 1}}
    stages[1]["metrics"]["counts"] |= {"frechet_generated": 5}
    stages.append({**stages[1], "name": "last", "metrics": None, "videos": None})
    paths = write_report(tmp_path / "out", "plan", stages, 1)
    images, clips, last = json.loads(paths["report"].read_text())["stages"]
    assert images["absent"] == {"direction_accuracy": "stills do not move"}
    assert clips["kernel_distance"] is None
    assert clips["absent"] == {"kernel_distance": "5 clips are fewer than the 25 that it takes"}
    assert set(last["absent"].values()) == {"the plan has no evaluation of this stage"}
    page = paths["html"].read_text()
    assert "n/a: direction accuracy of images: stills do not move." in page
    assert "kernel distance of clips: 5 clips are fewer" in page
    for stage in (images, clips, last):
        nulls = [k for k, v in stage.items() if v is None and k.endswith(("_accuracy", "_distance"))]
        assert set(nulls) == set(stage["absent"])


def test_a_sheet_shows_different_captions_first(tmp_path: Path) -> None:
    folder = save_videos(tmp_path / "videos", ["a", "a", "a", "b", "b", "c"])
    clips, _ = read_generated(folder)
    assert [clip.prompt for clip in _different_captions_first(clips)] == ["a", "b", "c", "a", "b", "a"]


def test_a_plan_without_videos_has_curves_alone(stages, tmp_path: Path) -> None:
    bare = [{k: stage[k] for k in ("name", "steps", "seconds", "run")} for stage in stages]
    paths = write_report(tmp_path / "out", "own", bare, 1.0)
    assert set(paths) == {"report", "html", "curves"}


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        write_report(tmp_path, "demo", [], 1.0)


# --------------------------------------------------------------------------------------- pictures


def opened(picture: bytes) -> Image.Image:
    return Image.open(io.BytesIO(picture))


def test_a_verdict_names_predictions_and_marks_what_is_wrong() -> None:
    row = {"prompt": "p", "class": "7", "predicted_class": "1", "direction": "left", "predicted_direction": "left"}
    cell = cell_of(clip_of(), row)
    assert (cell.verdict, cell.right) == ("predicted: 1 ✗ · left", False)
    assert cell_of(clip_of(), row | {"predicted_class": "7"}).right is True
    assert cell_of(clip_of(), {"prompt": "p"}).right is None


def test_metrics_survive_a_cut_line_and_a_resumed_run(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 9}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    steps, losses = read_losses(path)["loss"]
    assert steps.tolist() == [1, 2]
    assert losses.tolist() == [3, 2]
    assert opened(loss_curves([("a", path), ("b", tmp_path / "none.jsonl")])).size[0] > 300


def test_smoothing_is_a_running_mean() -> None:
    assert smooth(np.array([1.0, 3.0, 5.0, 7.0]), 2).tolist() == [1, 2, 4, 6]


def test_figures_are_written_as_people_write_them() -> None:
    assert [percent(0.9), percent(None), number(12.345), number(None)] == ["90.0 %", "n/a", "12.3", "n/a"]
    assert [duration(x) for x in (3.21, 61, 3600, None)] == ["3.2 s", "1 min 01 s", "1 h 00 min", "n/a"]
