"""Laws of an evaluation: real clips are classified right, others wrong, and metrics carry their settings."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from stdit import memory
from stdit.config import Bucket, ConfigError, EvaluationConfig
from stdit.config.identity import FrameSampling
from stdit.data.manifest import ManifestError, read
from stdit.evaluation import evaluator
from stdit.evaluation.evaluator import evaluate_videos
from stdit.evaluation.generated import extracted_frames, read_generated
from stdit.evaluation.validation_clips import load_clip, load_frame, select, validation_prompts, write_prompts
from tests.support.shapes_dataset import SHAPES, STEPS, save_clip, save_generated, wandering

CLIP, IMAGE = Bucket(frames=4, height=16, width=16), Bucket(frames=1, height=16, width=16)
PROTOCOL = {"run": "runs/x", "step": 7, "weights": "ema", "sampler": "flow_euler", "steps": 20, "guidance_scale": 3.0}


def perfect_samples(rows: list[dict], shape: Bucket, seed: int = 9) -> list[np.ndarray]:
    """What a perfect generator would make of the prompts."""
    rng = np.random.default_rng(seed)
    return [wandering(row["class"], shape.width, shape.frames, row["direction"], rng) for row in rows]


def test_real_clips_are_classified_right(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 24, CLIP, 0, settings_for_shapes)
    videos = save_generated(tmp_path / "v", rows, perfect_samples(rows, CLIP), **PROTOCOL)
    metrics = evaluate_videos(videos, manifest, settings_for_shapes, cache)
    assert metrics["class_accuracy"] == metrics["direction_accuracy"] == 1.0
    assert metrics["classifier_accuracy"] >= 0.97
    assert metrics["real"]["class_accuracy"] == metrics["real"]["direction_accuracy"] == 1.0
    assert (
        metrics["counts"] | {"generated": 24, "class": 24, "direction": 24, "failed": 0, "real": 48}
        == metrics["counts"]
    )
    assert metrics["counts"]["frechet_generated"] == metrics["counts"]["frechet_reference"] == 24
    assert metrics["intervals"]["class"][0] > 0.8
    # Drawn from the same distribution: about as far from the reference as real clips are.
    assert metrics["frechet_distance"] < 3 * metrics["real"]["frechet_distance"] + 0.1


def test_clips_other_than_requested_are_counted_as_wrong(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 24, CLIP, 0, settings_for_shapes)
    turned = {"left": "up", "up": "right", "right": "down", "down": "left"}
    following = dict(zip(SHAPES, SHAPES[1:] + SHAPES[:1], strict=True))
    wrong = [row | {"class": following[row["class"]], "direction": turned[row["direction"]]} for row in rows]
    metrics = evaluate_videos(
        save_generated(tmp_path / "v", rows, perfect_samples(wrong, CLIP)), manifest, settings_for_shapes, cache
    )
    assert metrics["class_accuracy"] == metrics["direction_accuracy"] == 0.0
    table = metrics["confusion"]["direction"]
    assert table["names"] == ["left", "right", "up", "down"]
    assert table["counts"][0][2] == sum(table["counts"][0]) == 6
    # One verdict a clip, in the listing's order.
    assert [(c["class"], c["predicted_class"]) for c in metrics["clips"]] == [
        (r["class"], w["class"]) for r, w in zip(rows, wrong, strict=True)
    ]


def test_noise_is_farther_from_real_clips_than_clips_are(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 24, CLIP, 0, settings_for_shapes)
    noise = [np.random.default_rng(i).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8) for i in range(24)]
    good = evaluate_videos(
        save_generated(tmp_path / "a", rows, perfect_samples(rows, CLIP)), manifest, settings_for_shapes, cache
    )
    bad = evaluate_videos(save_generated(tmp_path / "b", rows, noise), manifest, settings_for_shapes, cache)
    for distance in ("frechet_distance", "kernel_distance"):
        assert bad[distance] > 5 * abs(good[distance])


def test_images_have_no_direction(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 12, IMAGE, 0, settings_for_shapes)
    assert all(row["direction"] is None for row in rows)
    metrics = evaluate_videos(
        save_generated(tmp_path / "v", rows, perfect_samples(rows, IMAGE)), manifest, settings_for_shapes, cache
    )
    assert metrics["class_accuracy"] == 1.0
    assert metrics["direction_accuracy"] is None
    assert metrics["intervals"]["direction"] is None
    assert metrics["real"]["direction_accuracy"] is None


def test_a_manifest_without_the_columns_has_no_such_metrics(manifest, tmp_path: Path) -> None:
    config = EvaluationConfig(direction_column=None)  # `class` is no column of this manifest.
    rows = validation_prompts(manifest, 6, CLIP, 0, config)
    assert all(row["class"] is None and row["direction"] is None for row in rows)
    rng = np.random.default_rng(0)
    clips = [wandering("bar", 16, 4, "up", rng) for _ in rows]
    metrics = evaluate_videos(save_generated(tmp_path / "v", rows, clips), manifest, config, tmp_path)
    for key in ("class_accuracy", "direction_accuracy", "frechet_distance", "kernel_distance", "classifier_accuracy"):
        assert metrics[key] is None
    assert metrics["counts"]["generated"] == 6


def test_metrics_carry_their_protocol(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 6, CLIP, 5, settings_for_shapes)
    metrics = evaluate_videos(
        save_generated(tmp_path / "v", rows, perfect_samples(rows, CLIP), **PROTOCOL),
        manifest,
        settings_for_shapes,
        cache,
    )
    protocol = metrics["protocol"]
    assert protocol | PROTOCOL | {"frames": 4, "height": 16, "width": 16} == protocol
    assert protocol["seeds"] == {"first": 5, "last": 10, "different": 6}
    assert metrics["classifier"]["train_frames"] == 156
    assert metrics["manifest"]["path"] == str(manifest)
    # Shapes and words are few here: every held-out caption is also one of the train split's.
    assert metrics["counts"]["captions_also_in_train"] == 6


def test_a_second_call_does_nothing_until_something_changes(
    manifest, settings_for_shapes, cache, tmp_path: Path
) -> None:
    rows = validation_prompts(manifest, 6, CLIP, 0, settings_for_shapes)
    videos = save_generated(tmp_path / "v", rows, perfect_samples(rows, CLIP))
    first = evaluate_videos(videos, manifest, settings_for_shapes, cache)
    written = (videos / "metrics.json").stat().st_mtime_ns
    assert (
        evaluate_videos(videos, manifest, settings_for_shapes, cache)
        == first
        == json.loads((videos / "metrics.json").read_text())
    )
    assert (videos / "metrics.json").stat().st_mtime_ns == written
    stricter = settings_for_shapes.model_copy(update={"min_motion": 0.9})
    assert evaluate_videos(videos, manifest, stricter, cache)["direction_accuracy"] == 0.0
    assert len(list(cache.glob("classifier-*"))) == 1


def test_a_video_generated_again_is_measured_again(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 6, CLIP, 0, settings_for_shapes)
    videos = save_generated(tmp_path / "v", rows, perfect_samples(rows, CLIP))
    assert evaluate_videos(videos, manifest, settings_for_shapes, cache)["class_accuracy"] == 1.0
    save_generated(
        videos, rows, perfect_samples([row | {"class": "bar"} for row in rows], CLIP)
    )  # The listing stays as it was.
    assert evaluate_videos(videos, manifest, settings_for_shapes, cache)["class_accuracy"] < 1.0


def test_a_failed_prompt_is_counted_and_stops_nothing(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 6, CLIP, 0, settings_for_shapes)
    clips = [*perfect_samples(rows, CLIP)[:5], None]
    metrics = evaluate_videos(save_generated(tmp_path / "v", rows, clips), manifest, settings_for_shapes, cache)
    assert (metrics["counts"]["generated"], metrics["counts"]["failed"]) == (5, 1)
    assert "boom" in metrics["failures"][0]


# ------------------------------------------------------------------------------- held-out captions


def test_prompts_are_held_out_captions_of_the_shape_evenly_spread(manifest, settings_for_shapes) -> None:
    rows = validation_prompts(manifest, 24, CLIP, 0, settings_for_shapes)
    assert Counter((r["class"], r["direction"]) for r in rows) == {(s, d): 2 for s in SHAPES for d in STEPS}
    assert all(r["prompt"] == f"a {r['class']} goes {r['direction']}" for r in rows)
    assert len({r["seed"] for r in rows}) == 24
    assert rows == validation_prompts(manifest, 24, CLIP, 0, settings_for_shapes)
    other = validation_prompts(manifest, 24, CLIP, 1, settings_for_shapes)
    assert [r["prompt"] for r in rows] != [r["prompt"] for r in other]


def test_more_prompts_than_captions_come_again_with_other_seeds(manifest, settings_for_shapes) -> None:
    rows = validation_prompts(manifest, 100, IMAGE, 0, settings_for_shapes)
    assert len(rows) == len({r["seed"] for r in rows}) == 100


def test_larger_clips_fill_up_the_count_and_are_cropped(manifest, settings_for_shapes) -> None:
    from stdit.data.manifest import read

    source, shape = read(manifest), Bucket(frames=2, height=8, width=8)
    clips = select(source, "validation", shape, 10, 0)
    assert len(clips) == 10
    assert load_clip(clips[0], shape).shape == (2, 8, 8, 3)
    # Of that very shape there are enough: no other is taken.
    assert {c.frames for c in select(source, "validation", IMAGE, 24, 0)} == {1}


def test_a_shape_that_no_clip_covers_is_an_error(manifest, settings_for_shapes) -> None:
    with pytest.raises(ManifestError, match="can be cropped to, 4x64x64"):
        validation_prompts(manifest, 4, Bucket(frames=4, height=64, width=64), 0, settings_for_shapes)


def with_classes(manifest: Path, folder: Path, classless: str = "") -> Path:
    """The manifest with a column class of other names than its shapes; clips of the shape `classless` have none."""
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        if row["shape"] != classless:
            row["class"] = f"kind of {row['shape']}"
    path = manifest.parent / f"{folder.name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_prompts_of_a_class_conditional_model_have_the_classes_it_was_trained_on(manifest, tmp_path: Path) -> None:
    classes = with_classes(manifest, tmp_path)
    free = EvaluationConfig(class_column=None, direction_column=None)
    rows = validation_prompts(classes, 24, CLIP, 0, free, "required")
    assert Counter(row["class"] for row in rows) == {f"kind of {shape}": 8 for shape in SHAPES}, "balanced over them"
    measured = EvaluationConfig(class_column="shape", direction_column=None)
    rows = validation_prompts(classes, 24, CLIP, 0, measured, "optional")
    assert all(row["class"] == f"kind of {row['measured_class']}" for row in rows)
    clips, _ = read_generated(save_generated(tmp_path / "v", rows, perfect_shapes(rows)))
    assert [clip.class_name for clip in clips] == [row["measured_class"] for row in rows], "what the metrics compare"
    assert "measured_class" not in validation_prompts(classes, 1, CLIP, 0, measured)[0]


def perfect_shapes(rows: list[dict]) -> list[np.ndarray]:
    return perfect_samples([{"class": row["measured_class"], "direction": None} for row in rows], CLIP)


def test_clips_without_a_class_are_no_prompts_of_a_model_of_classes_alone(manifest, tmp_path: Path) -> None:
    classes = with_classes(manifest, tmp_path, "disc")
    free = EvaluationConfig(class_column=None, direction_column=None)
    rows = validation_prompts(classes, 12, CLIP, 0, free, "required")
    assert {row["class"] for row in rows} == {"kind of cross", "kind of bar"}
    with pytest.raises(ManifestError, match="class-conditional, but 72 of 72 clips have no class"):
        validation_prompts(manifest, 12, CLIP, 0, free, "required")


def test_a_clip_that_is_a_part_of_a_file_is_read_as_that_part(tmp_path: Path) -> None:
    film = np.arange(9, dtype=np.uint8)[:, None, None, None] * 20 + np.zeros((9, 16, 16, 3), np.uint8)
    film[:, :, 8:] += 5
    save_clip(tmp_path / "film.png", film)
    row = {
        "path": "film.png",
        "caption": "",
        "split": "validation",
        "start_frame": 4,
        "end_frame": 8,
        "crop": [0, 8, 16, 8],
    }
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    (clip,) = read(tmp_path / "m.jsonl")
    shape = Bucket(frames=3, height=8, width=8)
    assert load_clip(clip, shape)[:, 0, 0, 0].tolist() == [85, 105, 125]
    frame = load_frame(clip, np.random.default_rng(0))
    assert frame is not None
    assert frame.shape == (1, 16, 8, 3)
    assert int(frame[0, 0, 0, 0]) in (85, 105, 125, 145)
    assert select(read(tmp_path / "m.jsonl"), "validation", Bucket(frames=5, height=8, width=8), 1, 0) == []


def test_real_clips_are_read_as_the_runs_extraction_read_its_own(
    manifest, settings_for_shapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = np.arange(9, dtype=np.uint8)[:, None, None, None] * 20 + np.zeros((9, 16, 16, 3), np.uint8)
    rows = []
    for i, (length, fps) in enumerate(((9, 8), (9, 4), (7, 8), (4, 8))):
        save_clip(tmp_path / f"{i}.png", film[:length])
        size = {"frames": length, "height": 16, "width": 16, "fps": fps}
        rows.append({"path": f"{i}.png", "caption": str(i), "split": "validation", **(size if i else {})})
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen: list[list[int]] = []

    def look(frames: list[np.ndarray], *args: object) -> evaluator.Predictions:
        seen[:] = [clip[:, 0, 0, 0].tolist() for clip in frames]
        return evaluator.Predictions(frames, [], [], [], [], np.zeros((len(frames), 0)), [])

    monkeypatch.setattr(evaluator, "_predict", look)
    monkeypatch.setattr(evaluator, "sampling_protocol", lambda clips: {})
    monkeypatch.setattr(evaluator, "_clip_row", lambda *args: {})
    stride, rate = {"frame_stride": 2}, {"target_fps": 4.0, "clip_window": "center"}
    for i, (told, read_frames) in enumerate(
        (
            ({}, [[0, 20, 40, 60]] * 4),
            (stride, [[0, 40, 80, 120]] * 3),
            (rate, [[0, 40, 80, 120], [20, 60, 100, 140], [40, 60, 80, 100]]),
        )
    ):
        sampling = FrameSampling.model_validate(told)
        prompts = validation_prompts(tmp_path / "m.jsonl", 4, CLIP, sampling=sampling)
        fitting = {"0", "1", "2", "3"} if i == 0 else {"0", "1", "2"}
        assert {row["prompt"] for row in prompts} == fitting, "of clips that are long enough by those frames"
        videos = save_generated(
            tmp_path / f"v{i}", prompts, [film[:4]] * 4, **({"frame_sampling": told} if told else {})
        )
        evaluate_videos(videos, tmp_path / "m.jsonl", EvaluationConfig(), tmp_path)
        assert sorted(seen) == read_frames
    videos = tmp_path / "v2"
    found, _ = read_generated(videos)
    mixed = [clip.row for clip in found[:1]] + [{"protocol": {"frame_sampling": stride}}]
    with pytest.raises(ConfigError, match=r"protocol\.frame_sampling differs between rows"):
        extracted_frames(mixed, videos)
    with pytest.raises(ConfigError, match=r"v2/manifest\.jsonl: protocol\.frame_sampling: frame_stride"):
        extracted_frames([{"protocol": {"frame_sampling": {"frame_stride": 0}}}], videos)


def test_what_an_evaluation_holds_at_once_has_to_fit_into_memory(
    manifest, settings_for_shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = read(manifest)
    clips, frames = (5 + 48) * 4 * 16 * 16 * 3, 156 * 16 * 16 * 3 * 4
    monkeypatch.setattr(memory, "host_memory", lambda: max(clips, frames))
    evaluator.check_memory(settings_for_shapes, source, CLIP, 5)
    assert len(select(source, "validation", CLIP, 10, 0)) == 48, "held-out clips of that shape"
    monkeypatch.setattr(memory, "host_memory", lambda: frames - 1)
    with pytest.raises(ConfigError, match=r"156 frames \(classifier_frames\) of classifier_size 16 take"):
        evaluator.check_memory(settings_for_shapes, source, CLIP, 5)
    monkeypatch.setattr(memory, "host_memory", lambda: clips - 1)
    with pytest.raises(ConfigError, match=r"5 generated and 48 real clips \(real_clips 512\) of 4x16x16 take"):
        evaluator.check_memory(settings_for_shapes, source, CLIP, 5)


def test_prompts_already_written_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    write_prompts(path, [{"prompt": "ü"}])
    before = path.stat().st_mtime_ns
    write_prompts(path, [{"prompt": "ü"}])
    assert path.stat().st_mtime_ns == before
    assert json.loads(path.read_text(encoding="utf-8")) == {"prompt": "ü"}


# -------------------------------------------------------------------------------------- bad input


def test_a_folder_that_generate_did_not_write_is_an_error(manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest\.jsonl: no such file"):
        evaluate_videos(tmp_path, manifest)


def test_a_folder_where_every_prompt_failed_is_an_error(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 2, CLIP, 0, settings_for_shapes)
    with pytest.raises(ValueError, match="no clip was generated, 2 failed: .*boom"):
        evaluate_videos(save_generated(tmp_path / "v", rows, [None, None]), manifest, settings_for_shapes, cache)


def test_clips_of_two_shapes_are_an_error(manifest, settings_for_shapes, cache, tmp_path: Path) -> None:
    rows = validation_prompts(manifest, 2, CLIP, 0, settings_for_shapes)
    clips = [perfect_samples(rows, CLIP)[0], perfect_samples(rows, IMAGE)[1]]
    with pytest.raises(ValueError, match=r"clips of 2 shapes .* \[\(1, 16, 16\), \(4, 16, 16\)\]"):
        evaluate_videos(save_generated(tmp_path / "v", rows, clips), manifest, settings_for_shapes, cache)


def test_a_damaged_generated_clip_is_an_error_that_names_it(
    manifest, settings_for_shapes, cache, tmp_path: Path
) -> None:
    rows = validation_prompts(manifest, 2, CLIP, 0, settings_for_shapes)
    videos = save_generated(tmp_path / "v", rows, perfect_samples(rows, CLIP))
    (videos / "0001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"0001\.png.*generate it again"):
        evaluate_videos(videos, manifest, settings_for_shapes, cache)


def test_a_column_that_is_not_there_is_an_error_with_those_that_are(manifest) -> None:
    with pytest.raises(ManifestError, match="class_column: no column 'clazz'; columns: .*shape"):
        validation_prompts(manifest, 2, CLIP, 0, EvaluationConfig(class_column="clazz"))


def test_a_word_that_is_no_direction_is_an_error(manifest) -> None:
    with pytest.raises(ManifestError, match="column 'shape' holds .* one of left, right, up, down"):
        validation_prompts(manifest, 2, CLIP, 0, EvaluationConfig(direction_column="shape"))
