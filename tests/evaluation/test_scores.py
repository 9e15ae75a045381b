"""Laws of `stdit evaluate --config`: what is scored, what is refused, what a score carries; no download, random
networks."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.ndimage import gaussian_filter

from pipelines import evaluate_runs
from stdit import extract
from stdit.config import EvaluateConfig, ExtractBucket, ReferenceConfig, validate
from stdit.config.extract import WindowsConfig
from stdit.config.identity import FrameSampling
from stdit.data.features import FeatureSet
from stdit.data.transforms import to_pixels
from stdit.evaluation import feature_cache, networks, scores
from stdit.evaluation.adm import read_adm, write_samples
from stdit.evaluation.feature_cache import FeatureJob, compute_features, load_features
from stdit.evaluation.media_set import open_generated, open_reference, overlap
from stdit.evaluation.scores import ProtocolMismatch, check_comparable, evaluate_media
from stdit.files import sha256
from stdit.media import write_video
from tests.support import clip_folder
from tests.support.feature_networks import save_inception, save_video_net
from tests.support.shapes_dataset import save_clip, save_generated
from tests.support.videos import lossless, smooth

FRAMES, SIDE = 10, 16


def clips(seed: int, count: int) -> list[np.ndarray]:
    """Videos of a bright square that moves over a gradient."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        video = np.zeros((FRAMES, SIDE, SIDE, 3)) + np.linspace(0, 90, SIDE)[:, None]
        top, left, colour = rng.integers(0, SIDE - 5), rng.integers(0, 3), rng.uniform(120, 255, 3)
        for t in range(FRAMES):
            video[t, top : top + 5, left + t : left + t + 5] = colour
        found.append(video.clip(0, 255).astype(np.uint8))
    return found


def save_clips(folder: Path, videos: list[np.ndarray], **protocol: Any) -> Path:
    """A folder as stdit.generate leaves it, with `protocol` in every row."""
    folder.mkdir(parents=True)
    rows = []
    for i, video in enumerate(videos):
        write_video(folder / f"{i:03d}.mp4", video, 8)
        rows.append(
            {"file": f"{i:03d}.mp4", "prompt": f"clip {i}", "class": None, "seed": i, "fps": 8, "protocol": protocol}
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_images(folder: Path, seed: int, count: int, side: int = 12) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_video_net(tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt")


@pytest.fixture(autouse=True)
def defines_fvd(i3d: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The random network in place of the one that defines FVD."""
    monkeypatch.setattr(networks.I3D, "expected_sha256", sha256(i3d))


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_inception(tmp_path_factory.mktemp("inception") / "pt_inception.pth")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clips(tmp_path_factory.mktemp("real") / "clips", clips(0, 24))


@pytest.fixture
def score(tmp_path: Path, reference: Path, i3d: Path):
    """Scores videos against the reference by FVD and the measures that need no network."""

    def run(generated: Path | list[np.ndarray], name: str = "out", **settings: Any) -> dict[str, Any]:
        if isinstance(generated, list):
            generated = save_clips(tmp_path / f"{name}-videos", generated)
        data = {
            "generated": str(generated), "reference": {"path": str(reference)}, "out": str(tmp_path / name), "bootstrap": 5,
            "networks": {"i3d": str(i3d)}, "cache": str(tmp_path / "cache"),
        }  # fmt: skip
        return evaluate_media(validate({**data, **settings}, EvaluateConfig, "test"))

    return run


# ------------------------------------------------------------------------------------ what is scored


def test_a_set_is_at_no_distance_from_itself(score, reference: Path) -> None:
    found = score(reference)["scores"]
    assert abs(found["fvd"]["value"]) < 1e-9
    assert "singular covariance: 24 generated and 24 reference samples in 400 dimensions" in found["fvd"]["notes"][0]


@pytest.mark.parametrize("damage", ["blur", "noise", "shuffle", "freeze"])
def test_worse_videos_are_farther(score, damage: str) -> None:
    rng = np.random.default_rng(1)
    noise, order = rng.normal(size=(FRAMES, SIDE, SIDE, 3)), rng.permutation(FRAMES)

    def worsened(video: np.ndarray, amount: int) -> np.ndarray:
        if damage == "blur":
            return gaussian_filter(video, (0, amount, amount, 0)) if amount else video
        if damage == "noise":
            return (video + 30 * amount * noise).clip(0, 255).astype(np.uint8)
        if damage == "shuffle":  # of ever more frames
            chosen = np.arange(FRAMES)
            chosen[: 3 * amount + 1] = np.random.default_rng(0).permutation(3 * amount + 1)
            return video[chosen]
        kept = FRAMES - 3 * amount
        return video[np.minimum(np.arange(FRAMES), kept - 1)]

    assert len(order) == FRAMES
    videos = clips(0, 24)
    values = [score([worsened(v, a) for v in videos], f"{damage}{a}")["scores"]["fvd"]["value"] for a in range(4)]
    assert values == sorted(values)
    assert values[3] > values[0] + 1e-6


def test_order_names_and_workers_do_not_change_a_score(score, tmp_path: Path, reference: Path) -> None:
    videos = clips(5, 20)
    first = score(videos, "one")
    order = np.random.default_rng(0).permutation(20)
    second = score(save_clips(tmp_path / "renamed", [videos[i] for i in order]), "two", cache=str(tmp_path / "other"))
    for name, found in first["scores"].items():
        assert found["value"] == second["scores"][name]["value"], name
        assert found["interval"] == second["scores"][name]["interval"], name


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_size_of_a_chunk_does_not_change_features(
    reference: Path, i3d: Path, tmp_path: Path, chunk: int, monkeypatch
) -> None:
    network, media = networks.I3D(i3d), open_generated(reference)
    expected = FeatureJob(network, media, tmp_path / "a")
    compute_features(expected)
    features = load_features(expected)["features"]
    monkeypatch.setattr(feature_cache, "CHUNK", chunk)
    other = FeatureJob(network, media, tmp_path / "b")
    compute_features(other)
    np.testing.assert_array_equal(load_features(other)["features"], features)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_workers_give_the_statistics_of_one(reference: Path, i3d: Path, tmp_path: Path) -> None:
    videos = save_clips(tmp_path / "many", clips(6, feature_cache.CHUNK + 6))
    data = {
        "generated": str(videos), "reference": {"path": str(reference)}, "networks": {"i3d": str(i3d)}, "bootstrap": 2,
        "scores": ["fvd"],
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(data))
    for workers in (1, 2):
        out = f"--set=out={tmp_path / str(workers)}"
        assert evaluate_runs.main(["--config", str(config), out, "--workers", str(workers)]) == 0
    one, two = (json.loads((tmp_path / n / "scores.json").read_text())["scores"] for n in "12")
    assert one == two


def test_features_are_computed_once_and_only_those_that_are_missing(score, tmp_path: Path, monkeypatch) -> None:
    videos = save_clips(tmp_path / "videos", clips(7, 6))
    score(videos)
    calls = []
    monkeypatch.setattr(feature_cache, "compute_chunk", lambda *args: calls.append(args))
    assert score(videos, "again")["scores"]["fvd"]
    assert not calls


def test_a_damaged_file_of_features_is_named(reference: Path, i3d: Path, tmp_path: Path) -> None:
    job = FeatureJob(networks.I3D(i3d), open_generated(reference), tmp_path)
    compute_features(job)
    whole = job.file(0).read_bytes()
    for damaged in (b"damaged", whole[:-1] + bytes([whole[-1] ^ 1])):  # the second at equal length, in a tensor
        job.file(0).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{job.file(0).name}: damaged .*; remove it"):
            load_features(job)


def test_every_score_carries_its_protocol_and_interval(score, tmp_path: Path, i3d: Path) -> None:
    sampling = {
        "run": "runs/a",
        "step": 9,
        "weights": "ema",
        "scheduler": "flow_euler",
        "steps": 20,
        "guidance_scale": 3.0,
    }
    result = score(save_clips(tmp_path / "v", clips(1, 12), **sampling))
    assert result["subject"] | {"run": "runs/a", "step": 9} == result["subject"]
    for found in result["scores"].values():
        low, high = found["interval"]
        assert low <= found["value"] <= high
        generated = found["protocol"]["generated"]
        expected = {
            "count": 12,
            "shape": [FRAMES, SIDE, SIDE],
            "steps": 20,
            "guidance_scale": 3.0,
            "weights": "ema",
            "fps": 8,
        }
        assert generated | expected == generated
        assert len(generated["prompts_sha256"]) == 64
        assert generated["seeds"][:2] == [0, 11]
        assert "run" not in generated
    fvd = result["scores"]["fvd"]["protocol"]
    assert fvd["network"] == {"network": "i3d", "sha256": sha256(i3d), "resizing": networks.I3D.resizing}
    assert fvd["reference"]["count"] == 24


def test_results_of_other_protocols_are_not_compared(score, tmp_path: Path) -> None:
    videos = clips(1, 12)
    a, b, c = (
        score(save_clips(tmp_path / str(i), videos, run=f"runs/{i}", steps=steps, guidance_scale=3.0), f"out{i}")
        for i, steps in enumerate((20, 20, 50))
    )
    check_comparable({"a": a, "b": b})  # another run is what one compares
    with pytest.raises(ProtocolMismatch, match=r"a -> c: generated\.steps: 20 -> 50 \(fvd, .*vmaf_motion\)"):
        check_comparable({"a": a, "c": c})


# --------------------------------------------------------------------------------- networks and files


def test_a_missing_network_skips_its_scores_and_the_rest_runs(score) -> None:
    result = score(clips(1, 4), networks={"clip": "/nowhere"})
    assert result["skipped"]["fvd"] == "no weights: networks.i3d is not set"
    assert result["skipped"]["clip_score"] == "networks.clip: /nowhere: no such file or folder"
    assert "AMT-S" in result["skipped"]["vbench_motion_smoothness"]
    assert set(result["scores"]) == {"vbench_temporal_flickering", "linear_motion_smoothness", "vmaf_motion"}


def test_a_score_is_not_computed_with_another_network(tmp_path: Path, inception: Path) -> None:
    data = {
        "generated": str(save_images(tmp_path / "a", 0, 3)),
        "out": str(tmp_path / "out"),
        "networks": {"inception": str(inception)},
    }
    result = evaluate_media(validate(data, EvaluateConfig, "test"))
    assert "refused: networks.inception" in result["skipped"]["inception_score"]
    assert not result["scores"]
    with pytest.raises(ValueError, match=r"inception_score: networks\.inception: .* SHA-256 .* defines FID"):
        evaluate_media(validate(data | {"scores": ["inception_score"]}, EvaluateConfig, "test"))


@pytest.mark.slow
def test_images_are_scored_by_inception_and_through_adms_files(tmp_path: Path, inception: Path, monkeypatch) -> None:
    monkeypatch.setattr(networks.Inception, "expected_sha256", sha256(inception)[:8])
    monkeypatch.setattr("stdit.evaluation.inception.SIZE", 107)  # 299 takes ten times as long
    real, made = save_images(tmp_path / "real", 0, 6), save_images(tmp_path / "made", 1, 5)
    data = {
        "generated": str(made), "reference": {"path": str(real)}, "out": str(tmp_path / "out"), "splits": 2, "bootstrap": 2,
        "networks": {"inception": str(inception)}, "save_samples": True,
    }  # fmt: skip
    first = evaluate_media(validate(data, EvaluateConfig, "test"))
    assert set(first["scores"]) == {"fid", "kid", "inception_score", "precision", "recall"}
    # The samples that were written, against the statistics that were written: the same FID.
    statistics = tmp_path / "out" / "statistics-inception-reference.npz"
    again = data | {
        "generated": str(tmp_path / "out" / "samples.npz"), "reference": {"path": str(statistics)},
        "out": str(tmp_path / "again"), "scores": ["fid", "kid"],
    }  # fmt: skip
    second = evaluate_media(validate(again, EvaluateConfig, "test"))
    assert second["scores"]["fid"]["value"] == pytest.approx(first["scores"]["fid"]["value"], rel=1e-4)
    assert second["skipped"]["kid"] == "the reference holds statistics, not samples"
    assert read_adm(statistics).statistics is not None
    # The same statistics without our note on the network, as ADM's are: still the original Inception's.
    with np.load(statistics) as arrays:
        np.savez(tmp_path / "adm.npz", mu=arrays["mu"], sigma=arrays["sigma"])
        np.savez(tmp_path / "narrow.npz", mu=arrays["mu"][:64], sigma=arrays["sigma"][:64, :64])
        np.savez(tmp_path / "other.npz", mu=arrays["mu"], sigma=arrays["sigma"], network=np.array("f" * 64))
    for file, message in (("narrow", "64 dimensions, inception has 2048"), ("other", "ffff")):
        bad = again | {"reference": {"path": str(tmp_path / f"{file}.npz")}, "scores": ["fid"]}
        with pytest.raises(ValueError, match=rf"fid: .*{file}\.npz: statistics of another network.*{message}"):
            evaluate_media(validate(bad, EvaluateConfig, "test"))


def test_fvd_is_that_of_one_file_alone(score, monkeypatch) -> None:
    monkeypatch.setattr(networks.I3D, "expected_sha256", "0" * 64)
    assert re.search(r"refused: networks\.i3d: .* defines FVD, has 0000", score(clips(1, 3))["skipped"]["fvd"])
    with pytest.raises(ValueError, match=r"fvd: networks\.i3d: .* has SHA-256"):
        score(clips(1, 3), "named", scores=["fvd"])


# -------------------------------------------------------------------------------------------- bad input


def config_of(generated: Path, **more: Any) -> EvaluateConfig:
    return validate({"generated": str(generated), "out": str(generated.parent / "out"), **more}, EvaluateConfig, "test")


def test_an_empty_folder_and_one_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no clip in this folder"):
        evaluate_media(config_of(tmp_path / "empty"))
    with pytest.raises(ValueError, match="holds 1 of the 2 or more media"):
        evaluate_media(config_of(save_images(tmp_path / "one", 0, 1)))
    with pytest.raises(ValueError, match="absent: no such file or folder"):
        evaluate_media(config_of(tmp_path / "absent"))


def test_media_of_several_shapes_are_refused_and_unequal_counts_are_said(
    score, tmp_path: Path, reference: Path
) -> None:
    mixed = save_images(tmp_path / "mixed", 0, 2)
    Image.new("RGB", (9, 9)).save(mixed / "x.png")
    with pytest.raises(ValueError, match=r"2 shapes .*: 2 of 1x12x12, 1 of 1x9x9"):
        evaluate_media(config_of(mixed))
    small = save_images(tmp_path / "small", 0, 2, 8)
    big = {"path": str(save_images(tmp_path / "big", 0, 2, 12))}
    with pytest.raises(ValueError, match=r"big: 2 of 1x12x12; generated media are 1x8x8: set reference\.crop"):
        evaluate_media(config_of(small, reference=big))
    assert evaluate_media(config_of(small, reference=big | {"crop": True}))["scores"] == {}
    assert "12 generated against 24 reference media" in score(clips(1, 12))["warnings"][0]


def test_a_reference_of_several_shapes_gives_what_fits_and_counts_the_rest(tmp_path: Path) -> None:
    mixed = save_images(tmp_path / "mixed", 0, 3, 12)
    for i, side in enumerate((12, 16, 16, 20, 8)):
        Image.new("RGB", (side, side)).save(mixed / f"x{i}.png")
    config = ReferenceConfig(path=mixed, crop=True)
    fitting = open_reference(config, (1, 12, 12))
    assert (len(fitting), fitting.left_out) == (4, 4), "half of those that are large enough have the very shape"
    larger = open_reference(config, (1, 10, 10))
    assert (len(larger), larger.left_out) == (7, 1)
    assert {frames.shape for frames in larger.frames(larger.media)} == {(1, 10, 10, 3)}
    with pytest.raises(ValueError, match=r"mixed: .* none is as large and as long as the generated 2x64x64"):
        open_reference(config, (2, 64, 64))


@pytest.mark.timeout(20)
def test_a_pipe_among_media_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")  # opened, it would wait for ever
    with pytest.raises(ValueError, match=r"x.mp4: cannot be read \(not a regular file\)"):
        open_generated(tmp_path)


def test_rows_of_a_reference_are_read_as_parts_and_as_the_runs_extraction_read_its_clips(tmp_path: Path) -> None:
    film = np.arange(12, dtype=np.uint8)[:, None, None, None] * 20 + np.zeros((12, 16, 16, 3), np.uint8)
    film[:, :, 8:] += 5
    save_clip(tmp_path / "film.png", film)
    part = {"path": "film.png", "caption": "", "end_frame": 10, "crop": [0, 8, 16, 8]}
    rows = [
        {**part, "start_frame": 3},
        {**part, "start_frame": 1, "end_frame": 3},
        {**part, "start_frame": 4, "split": "validation"},
    ]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ReferenceConfig(path=manifest, split="train", crop=True)

    def first_pixels(*sampling: FrameSampling) -> list[int]:
        found = open_reference(config, (3, 8, 8), *sampling)
        assert (len(found), found.left_out) == (1, 1), "one row is too short, though the file is not"
        fingerprints.add(found.fingerprint)
        return next(found.frames(found.media))[:, 0, 0, 0].tolist()

    fingerprints: set[str] = set()
    assert first_pixels() == [65, 85, 105]
    assert first_pixels(FrameSampling(frame_stride=2)) == [65, 105, 145]
    assert first_pixels(FrameSampling(target_fps=4.0, clip_window="center")) == [85, 125, 165]
    assert len(fingerprints) == 3, "features of other frames are others"
    whole = open_reference(ReferenceConfig(path=manifest, split="validation", crop=True), (3, 8, 8))
    assert overlap(whole, ReferenceConfig(path=manifest, split="train")) == 0, "other parts of the same film"
    assert overlap(whole, ReferenceConfig(path=manifest)) == 1
    made = [np.zeros((3, 8, 8, 3), np.uint8)] * 2
    videos = save_generated(tmp_path / "v", [{"prompt": "a"}] * 2, made, frame_sampling={"frame_stride": 2})
    scored = EvaluateConfig(generated=videos, out=tmp_path / "o", reference=ReferenceConfig(path=manifest, crop=True))
    media = scores._open_reference(scored, open_generated(videos)).media
    assert media is not None
    assert media.sampling == FrameSampling(frame_stride=2), "as the generated rows say"


def test_a_reference_has_the_samples_that_extraction_makes_of_the_same_manifest_and_says_what_it_drops(
    tmp_path: Path,
) -> None:
    rows = []
    for name, frames, fps in (("a", 5, 24), ("b", 12, 24), ("c", 30, 48), ("slow", 30, 10)):
        lossless(tmp_path / f"{name}.mp4", smooth(frames, 16, 16))
        size = {"frames": frames, "height": 16, "width": 16, "fps": fps}
        rows.append({"path": f"{name}.mp4", "caption": name, **size})
    buckets = (ExtractBucket(frames=5, height=16, width=16, min_fps=20), ExtractBucket(frames=1, height=16, width=16))
    for window in ("first", "center"):
        folder = tmp_path / window
        settings = clip_folder.config(
            tmp_path, rows, buckets=buckets, windows=WindowsConfig(stride=4, max=3), clip_window=window, out=folder
        )
        features = FeatureSet(extract.run(settings))
        config = ReferenceConfig(path=tmp_path / "manifest.jsonl", crop=True)
        reference = open_reference(config, (5, 16, 16), features.frame_sampling)
        made = sorted(features.sample(id).mean.numpy().tobytes() for id in features.ids.tolist())
        assert len(made) == 1 + 2 + 3, "windows of three clips"
        assert sorted(to_pixels(frames).tobytes() for frames in reference.frames(reference.media)) == made
        assert len({medium.fingerprint for medium in reference.media}) == len(made)
        assert reference.dropped == {"10 frames a second, which no bucket takes (min_fps, max_fps)": 1}
        assert overlap(reference, config) == len(made)


def test_scores_against_other_windows_of_the_same_clips_are_not_compared(tmp_path: Path) -> None:
    rows = []
    for i, fps in enumerate((24, 24, 10)):
        save_clip(tmp_path / f"{i}.png", clips(i, 1)[0])
        size = {"frames": FRAMES, "height": SIDE, "width": SIDE, "fps": fps}
        rows.append({"path": f"{i}.png", "caption": "", "split": "train", **size})
    manifest = tmp_path / "m.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = [video[:4] for video in clips(7, 3)]
    found = {}
    for stride in (2, 3):
        bucket = {"frames": 4, "height": SIDE, "width": SIDE, "min_fps": 20.0}
        told = FrameSampling.of({"windows": {"stride": stride, "max": 2}, "buckets": [bucket]}).changed
        videos = save_generated(tmp_path / f"v{stride}", [{"prompt": ""}] * 3, generated, frame_sampling=told)
        reference = {"path": str(manifest), "crop": True}
        config = EvaluateConfig(generated=videos, out=tmp_path / "o", reference=ReferenceConfig(**reference))
        opened = scores._open_reference(config, open_generated(videos))
        assert opened.media is not None
        assert opened.protocol["count"] == 4
        assert opened.protocol["dropped"] == 1
        (warning,) = (text for text in scores._warnings(config, open_generated(videos), opened) if "dropped" in text)
        assert "(1: 10 frames a second, which no bucket takes (min_fps, max_fps))" in warning
        found[f"s{stride}"] = {"scores": {"fvd": {"protocol": {"reference": opened.protocol}}}}
    with pytest.raises(ProtocolMismatch, match=r"reference\.frame_sampling\.windows\.stride: 2 -> 3"):
        check_comparable(found)


def test_a_half_written_video_is_named(score, tmp_path: Path) -> None:
    folder = save_clips(tmp_path / "v", clips(0, 3))
    content = (folder / "001.mp4").read_bytes()
    (folder / "001.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"1 of 3 files cannot be decoded: .*001\.mp4"):
        score(folder)


def test_features_that_are_not_finite_name_the_file(score, tmp_path: Path, monkeypatch) -> None:
    def broken(self, frames, prompt):
        return {"features": np.full(400, np.nan, np.float32)}

    monkeypatch.setattr(networks.I3D, "rows", broken)
    with pytest.raises(ValueError, match=r"000\.mp4: features of i3d are not finite"):
        score(clips(8, 3))


def test_a_reference_within_the_training_set_is_counted(tmp_path: Path) -> None:
    images = save_images(tmp_path / "data", 0, 6)
    shutil.copy(images / "0.png", images / "copy.png")
    rows = [{"path": f"{i}.png", "caption": "", "split": "train" if i < 3 else "validation"} for i in range(6)]
    rows.append({"path": "copy.png", "caption": "", "split": "validation"})
    manifest = images / "list.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    generated = save_images(tmp_path / "made", 1, 4)
    found = evaluate_media(config_of(generated, reference={"path": str(manifest), "split": "validation"}))
    assert any("1 of 4 reference media are also in the training set" in text for text in found["warnings"])


def test_the_command_names_what_is_wrong_and_exits_with_2(tmp_path: Path, capsys) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"generated: {tmp_path / 'absent'}\nout: {tmp_path / 'out'}\n")
    assert evaluate_runs.main(["--config", str(config)]) == 2
    assert "absent: no such file" in capsys.readouterr().err
    assert evaluate_runs.main(["--config", str(config), "--set", "scores=[fidd]"]) == 2
    assert "scores.0" in capsys.readouterr().err
    assert evaluate_runs.main(["--config", str(config), "--manifest", "m.jsonl"]) == 2
    assert "--manifest is for --run" in capsys.readouterr().err
    assert evaluate_runs.main(["--config", str(config), "--seed", "0"]) == 2
    assert "--seed is for --run" in capsys.readouterr().err
    assert evaluate_runs.main([]) == 2
    assert "give --config, or --run" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_samples_of_an_npz_are_scored(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    write_samples(tmp_path / "x.npz", iter(images), 4)
    media = open_generated(tmp_path / "x.npz")
    assert (len(media), media.shape) == (4, (1, 8, 8))
    np.testing.assert_array_equal(np.stack([f[0] for f in media.frames(media.media[1:3])]), images[1:3])
    assert ReferenceConfig(path=tmp_path / "x.npz").split is None
