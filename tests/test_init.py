"""`stdit init`: a plan for a folder of clips that train-stages takes as it is; nothing is ever overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from pipelines import plan as plans
from pipelines import train_stages
from stdit import generate as generation
from stdit import init, media
from tests.support.paths import ROOT


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "my clips: all"
    folder.mkdir()
    for i in range(8):
        height, width = (24, 32) if i % 2 else (32, 24)
        frames = np.random.default_rng(i).integers(0, 256, (6, height, width, 3), np.uint8)
        media.write_video(folder / f"clip{i}.mp4", frames, 12.0)
        if i:
            (folder / f"clip{i}.txt").write_text(f"clip number {i}")
    (folder / "notes.pdf").write_bytes(b"not a clip")
    return folder


def test_the_plan_fits_the_clips_and_forecasts(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run #1"
    assert init.main([str(out), "--clips", str(clips), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "8 videos and 0 images, from 24x32 to 32x24 px" in said
    assert "note: 1 clip has no caption" in said
    assert "\n1 clip is held out for validation" in said
    assert "1 clips" not in said
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows].count("validation") == 1
    assert {row["fps"] for row in rows} == {12.0}
    assert (out / "prompts.txt").read_text().splitlines() == [f"clip number {i}" for i in range(1, 8)]
    plan = plans.read(out / "plan.yaml")
    assert {b.key for b in plan.reference.extract.buckets} == {"6x24x32", "6x32x24"}
    assert train_stages.main(["--plan", str(out / "plan.yaml"), "--forecast"]) == 0
    assert "stage model: 2 steps" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["plan.yaml", "prompts.txt", "manifest.jsonl", "clips"])
def test_nothing_is_overwritten(name: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("mine")
    assert init.main([str(tmp_path), "--clips", str(clips)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("where", ["inside", "absent"])
def test_folders_that_cannot_work_are_refused(
    where: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, source = (clips / "out", clips) if where == "inside" else (tmp_path / "out", tmp_path / "absent")
    assert init.main([str(out), "--clips", str(source)]) == 2
    assert ("is inside" if where == "inside" else "no such folder") in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("inside", ["", "vae"])
@pytest.mark.parametrize("kind", ["image", "video"])
def test_autoencoders_of_images_and_of_videos_are_told_apart(
    kind: str, inside: str, clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if kind == "image":
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    else:
        vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
    vae.save_pretrained(tmp_path / "encoder" / inside)
    out = tmp_path / "run"
    assert init.main([str(out), "--clips", str(clips), "--video-encoder", str(tmp_path / "encoder")]) == 0, (
        capsys.readouterr().err
    )
    encoder = plans.read(out / "plan.yaml").reference.extract.video_encoder
    assert (encoder.kind, encoder.subfolder) == (kind, inside or None)


def test_a_manifest_is_used_where_it_lies(clips: Path, tmp_path: Path) -> None:
    assert init.main([str(tmp_path / "a"), "--clips", str(clips)]) == 0
    manifest = tmp_path / "a" / "manifest.jsonl"
    assert init.main([str(tmp_path / "b"), "--clips", str(manifest)]) == 0
    assert plans.read(tmp_path / "b" / "plan.yaml").reference.extract.manifest == manifest
    assert not (tmp_path / "b" / "manifest.jsonl").exists()


def test_own_clips_needs_nothing_but_paths(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--plan", str(ROOT / "configs" / "plans" / "own-clips.yaml"), "--forecast"]
    # Pixels and a random text encoder stand for Wan's and T5's weights, and buckets for the size of these clips.
    for change in (
        f"run_dir={tmp_path}", f"extraction.manifest={json.dumps(str(clips))}",
        "extraction.video_encoder={kind: pixels, path: null, subfolder: null}",
        "extraction.text_encoder={path: null, byte_t5: {width: 32}}",
        "extraction.buckets=[{frames: 5, height: 24, width: 32}, {frames: 5, height: 32, width: 24}, {frames: 1, height: 24, width: 24}]",
    ):  # fmt: skip
        command += ["--set", change]
    assert train_stages.main(command) == 0
    said = capsys.readouterr().out
    assert "5x24x32" in said
    assert "captions of 200 tokens" in said


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_from_a_folder_of_clips_to_a_trained_model(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert init.main([str(out), "--clips", str(clips), "--steps", "2"]) == 0
    tiny = ["--set", "stages.model.overrides.samples.sampler.steps=2"]
    assert train_stages.main(["--plan", str(out / "plan.yaml"), *tiny]) == 0
    assert json.loads((out / "model" / "done.json").read_text())["step"] == 2
    generate = ["--run", str(out / "model"), "--prompts", str(out / "prompts.txt"), "--out", str(out / "videos")]
    assert generation.main([*generate, "--steps", "2"]) == 0
    made = [json.loads(line) for line in (out / "videos" / "manifest.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in made] == (out / "prompts.txt").read_text().splitlines()
    assert all((out / "videos" / row["file"]).is_file() for row in made)
