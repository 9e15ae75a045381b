"""Laws of the evaluation of runs, end to end on a model that has learned nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.evaluate_runs import FeaturePool
from stdit.config import ConfigError, DiffusionConfig, ModelConfig, SamplerConfig, Url
from stdit.diffusion.schedulers import make_scheduler
from stdit.encoders.video import PixelAutoencoder
from stdit.evaluate import main, run_names
from stdit.inference.pipeline import STDiTPipeline
from stdit.models.stdit import STDiT

CLASSES = ("bright", "dark")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 x 8 images of two classes."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i in range(24):
        image = np.full((8, 8, 3), 10, np.uint8)
        image[2:6, 2:5] = 250 if i % 2 == 0 else 120
        Image.fromarray(image).save(folder / f"{i}.png")
        name, split = CLASSES[i % 2], "train" if i < 12 else "validation"
        rows.append({"path": f"{i}.png", "caption": f"a {name} one", "class": name, "split": split})
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row | {"frames": 1, "height": 8, "width": 8}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline that draws classes."""
    torch.manual_seed(0)
    settings = ModelConfig(hidden_size=16, depth=1, num_heads=2, in_channels=3, num_classes=2)
    scheduler = make_scheduler(SamplerConfig(steps=2), DiffusionConfig(), (1, 1, 1))
    pipe = STDiTPipeline(
        STDiT.from_settings(settings), scheduler, PixelAutoencoder(latent_channels=3), classes={"bright": 0, "dark": 1}
    )
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    pipe.save_pretrained(folder)
    return folder


def call(run: Path, manifest: Path, out: Path, *more: str) -> int:
    flags = ["--count", "6", "--frames", "1", "--height", "8", "--width", "8", "--steps", "2"]
    sets = ["--set", "class_name=shade", "--set", "classifier_steps=5"]
    return main(["--run", str(run), "--manifest", str(manifest), "--out", str(out), *flags, *sets, *more])


def test_a_run_is_generated_and_measured_in_one_call(run, manifest, tmp_path: Path, capsys) -> None:
    assert call(run, manifest, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "shade" in printed
    assert "metrics of 1 of 1 runs" in printed
    metrics = json.loads((tmp_path / "metrics.json").read_text())["tiny"]
    assert metrics["counts"]["generated"] == 6
    assert metrics["protocol"] | {"steps": 2, "frames": 1, "height": 8, "width": 8} == metrics["protocol"]
    assert metrics["direction_accuracy"] is None
    assert len(list((tmp_path / "tiny" / "videos").glob("*-seed*.png"))) == 6


def test_a_second_call_makes_nothing(run, manifest, tmp_path: Path) -> None:
    assert call(run, manifest, tmp_path) == 0
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*-seed*.png")}
    measured = (tmp_path / "tiny/videos/metrics.json").stat().st_mtime_ns
    assert call(run, manifest, tmp_path) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*-seed*.png")} == before
    assert (tmp_path / "tiny/videos/metrics.json").stat().st_mtime_ns == measured


def test_one_run_that_cannot_be_used_does_not_stop_the_others(run, manifest, tmp_path: Path, capsys) -> None:
    absent = tmp_path / "absent"
    assert call(run, manifest, tmp_path / "out", "--run", str(absent), str(run)) == 1
    printed = capsys.readouterr().out
    assert re_line(printed, "absent:")
    assert "metrics of 1 of 2 runs" in printed


def re_line(text: str, start: str) -> bool:
    return any(line.startswith(start) for line in text.splitlines())


def test_other_settings_do_not_overwrite_videos_unasked(run, manifest, tmp_path: Path, capsys) -> None:
    assert call(run, manifest, tmp_path) == 0
    assert call(run, manifest, tmp_path, "--guidance", "2") == 1
    assert "other settings" in capsys.readouterr().out
    assert call(run, manifest, tmp_path, "--guidance", "2", "--overwrite") == 0


def test_a_manifest_that_is_not_there_is_an_error_at_once(run, tmp_path: Path, capsys) -> None:
    assert call(run, tmp_path / "none.jsonl", tmp_path) == 2
    assert "no such manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--count", "0"], "count"), (["--set", "clas_name=x"], "clas_name: unknown key"), (["--set", "x"], "key=value")],
)
def test_bad_settings_are_named(run, manifest, tmp_path: Path, capsys, flags: list[str], message: str) -> None:
    assert call(run, manifest, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


def test_runs_are_named_by_as_many_path_parts_as_makes_them_unique() -> None:
    assert list(run_names([Path("/a/x/one"), Path("/a/y/two")])) == ["one", "two"]
    assert list(run_names([Path("/a/x/one"), Path("/a/y/one")])) == ["x-one", "y-one"]
    far = Url("s3://bucket/runs/one")
    assert run_names([Path("/a/one"), far]) == {"a-one": Path("/a/one"), "runs-one": far}
    with pytest.raises(ConfigError, match="duplicate run"):
        run_names([Path("/a"), Path("/a")])


def test_a_pool_of_features_starts_ray_once_and_stops_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    import ray.util

    calls: list[str] = []

    def connect(cpus: int) -> str:
        calls.append(found := "already" if calls else "started")
        return found

    class Pool:
        def __init__(self, actors: list[object]) -> None: ...

        def map_unordered(self, function: object, values: list[int]) -> list[int]:
            return values

    monkeypatch.setattr("pipelines.workers.connect", connect)
    monkeypatch.setattr("pipelines.workers.disconnect", lambda: calls.append("stopped"))
    monkeypatch.setattr(ray, "remote", lambda **_: lambda kind: SimpleNamespace(remote=lambda job: job))
    monkeypatch.setattr(ray, "put", lambda job: job)
    monkeypatch.setattr(ray.util, "ActorPool", Pool)
    job: Any = SimpleNamespace(missing=lambda: [0, 1], threads=1, network=SimpleNamespace(device="cpu", key="x"))
    with FeaturePool(2) as pool:
        for _ in range(3):
            pool(job)
    assert calls == ["started", "already", "already", "stopped"]
