"""Laws of extraction: every clip accounted for, idempotent, resumable, and nothing half-written taken for whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file

from stdit import extract, memory
from stdit.config import ConfigError, ExtractBucket, ExtractConfig, VideoEncoderConfig, Where, dump
from stdit.data import extractor, records
from stdit.data.decoding import open_clip
from stdit.data.extraction import ExtractionError
from stdit.data.features import FeatureSet
from stdit.data.manifest import ManifestError
from stdit.data.transforms import resize_crop, to_pixels
from stdit.encoders.text_loading import load_text_encoder
from stdit.encoders.video import VideoEncoder
from tests.support import clip_folder, encoders, forked
from tests.support.clip_folder import CAPTIONS, damaged, rows


def report(config: ExtractConfig) -> dict[str, Any]:
    return json.loads((Path(config.out) / "report.json").read_text())


def content(out: Path) -> dict[str, bytes]:
    """All files of a feature folder that hold features."""
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*.safetensors"))}


def times(out: Path) -> dict[str, int]:
    return {str(p.relative_to(out)): p.stat().st_mtime_ns for p in sorted(out.rglob("*")) if p.is_file()}


def autoencoder(folder: Path, **changes: Any) -> VideoEncoderConfig:
    """A tiny random image autoencoder that halves the sides."""
    settings: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "norm_num_groups": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    with torch.random.fork_rng([]):
        AutoencoderKL(**settings).save_pretrained(folder)
    return VideoEncoderConfig(kind="image", path=str(folder), **changes)


def test_every_clip_is_kept_or_dropped_or_bad_with_its_reason(tmp_path: Path) -> None:
    made = rows(tmp_path, 12) + damaged(tmp_path)
    made += [{"path": "small.png", "caption": "too small"}, {"path": "wave.mp4", "caption": "unknown size"}]
    clip_folder.Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    clip_folder.lossless(tmp_path / "wave.mp4", clip_folder.smooth(7, 48, 48))
    config = clip_folder.config(
        tmp_path, made, max_bad_share=0.3, where=(Where(column="path", one_of=tuple(r["path"] for r in made[1:])),)
    )
    features = FeatureSet(extract.run(config))
    told = report(config)
    assert told["clips"] == len(made) == told["kept"] + told["dropped"] + told["bad"]
    assert told["dropped_by_reason"] == {"where": 1, "too_small": 1}
    reasons = {clip["path"]: clip["reason"] for clip in told["bad_clips"]}
    assert set(reasons) == {"missing.mp4", "empty.mp4", "text.mp4", "half.mp4"}
    assert reasons["missing.mp4"] == "no such file"
    assert reasons["empty.mp4"] == "is empty (0 bytes)"
    assert reasons["text.mp4"].startswith("is a text file")
    assert reasons["half.mp4"]
    assert told["kept"] == len(features) == 12
    assert sum(sum(splits.values()) for splits in told["kept_by_bucket"].values()) == 12
    assert told["captions_cut"] == 6  # of CAPTIONS the German one, long in bytes, and the long one
    assert set(features.rows["path"].to_pylist()) == {row["path"] for row in [*made[1:12], made[-1]]}


def test_null_captions_of_a_jsonl_manifest_are_counted_and_told(tmp_path: Path, capsys) -> None:
    made = rows(tmp_path, 4)
    made[0]["caption"], made[2]["caption"] = None, ""  # an empty one is a caption
    config = clip_folder.config(tmp_path, made)
    extract.run(config)
    told = report(config)
    assert (told["uncaptioned"], told["uncaptioned_clips"]) == (1, [made[0]["path"]])
    assert f"captions: 1 clip without one: {made[0]['path']}" in capsys.readouterr().err


def test_a_batch_of_clips_that_memory_does_not_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 4), batch_size=1_000_000, clips_per_shard=4)
    bucket = max(config.buckets, key=lambda b: b.frames * b.height * b.width)
    needed = 4 * bucket.frames * bucket.height * bucket.width * 3 * 4
    monkeypatch.setattr(memory, "host_memory", lambda: needed)
    extract.plan_shards(config)
    monkeypatch.setattr(memory, "host_memory", lambda: needed - 1)
    with pytest.raises(ConfigError, match=rf"batch_size 1000000: the pixels of 4 clips of bucket {bucket.key} take"):
        extract.plan_shards(config)


@pytest.mark.parametrize("stated", [True, False])
def test_features_are_what_the_encoders_make_of_the_clip_and_its_caption(stated: bool, tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 7, stated))
    features = FeatureSet(extract.run(config))
    assert features.rows["bucket"].to_pylist() == [
        "1x16x16",
        "1x16x16",
        "5x16x16",
        "1x16x16",
        "1x16x16",
        "5x16x32",
        "1x16x16",
    ]
    text = load_text_encoder(clip_folder.TEXT)
    for row in features.rows.to_pylist():
        sample = features.sample(row["id"])
        frames, height, width = map(int, row["bucket"].split("x"))
        with open_clip(tmp_path / row["path"]) as reader:
            pixels = to_pixels(resize_crop(reader.get(range(frames)), height, width))
        assert np.array_equal(sample.mean.numpy(), pixels)
        assert sample.std is None
        own, mask = text.encode([row["caption"]])
        assert sample.text is not None
        torch.testing.assert_close(sample.text, own[0][mask[0]])
        assert len(sample.text) == row["text_length"]
        assert features.classes[sample.class_label] == row["class"] == ["wave", "beetle"][row["id"] % 2]
        assert (sample.fps, sample.caption) == (0.0 if frames == 1 else 24.0, CAPTIONS[row["id"] % 4])


def test_an_autoencoders_mean_and_std_are_kept_in_its_own_precision(tmp_path: Path) -> None:
    encoder = autoencoder(tmp_path / "vae", dtype="bfloat16")
    config = clip_folder.config(tmp_path, rows(tmp_path, 3), video_encoder=encoder, text_encoder=None)
    features = FeatureSet(extract.run(config))
    sample = features.sample(2)
    assert sample.std is not None
    assert sample.text is None
    assert sample.mean.shape == sample.std.shape == (4, 5, 8, 8)
    with open_clip(tmp_path / "2.mp4") as reader:
        pixels = torch.from_numpy(to_pixels(reader.get(range(5))))[None]
    own = VideoEncoder(AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=torch.bfloat16))
    mean, std = own.encode(pixels)
    assert std is not None
    assert torch.equal(sample.mean, mean[0].bfloat16().float())
    assert torch.equal(sample.std, std[0].bfloat16().float())
    assert features.video_encoder["scale"] == [0.18215] * 4
    assert features.video_encoder["compression"] == [1, 2, 2]


def test_a_stride_takes_every_nth_frame_and_slows_the_clip_down(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 6), frame_stride=2, clip_window="center")
    features = FeatureSet(extract.run(config))
    sample = features.sample(5)
    with open_clip(tmp_path / "5.mp4") as reader:
        assert np.array_equal(sample.mean.numpy(), to_pixels(reader.get([0, 2, 4, 6, 8])))
    assert sample.fps == 12
    # 5 frames give 3 at stride 2: too few, and a video becomes no still unless the config says so.
    assert [(clip["path"], clip["reason"]) for clip in report(config)["dropped_clips"]] == [("2.mp4", "too_short")]
    config = config.model_copy(update={"out": tmp_path / "stills", "images_from_videos": True})
    assert FeatureSet(extract.run(config)).rows["bucket"][2].as_py() == "1x16x16"


def test_target_fps_takes_the_frames_that_are_shown_at_those_times(tmp_path: Path) -> None:
    clips = rows(tmp_path, 6, stated=False)
    half = clip_folder.config(tmp_path, clips, target_fps=15.0, out=tmp_path / "resampled")
    sample = FeatureSet(extract.run(half)).sample(5)
    with open_clip(tmp_path / "5.mp4") as reader:
        assert reader.fps == 24
        with pytest.raises(KeyError):
            FeatureSet(half.out).sample(2)
        assert np.array_equal(sample.mean.numpy(), to_pixels(reader.get([0, 1, 3, 4, 6])))
    assert sample.fps == 15


def test_the_file_is_right_where_the_manifest_states_another_length_or_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = rows(tmp_path, 6)
    clips[2]["frames"], clips[2]["fps"] = 1, None
    clips[3]["height"], clips[4]["width"], clips[5]["frames"] = 900, 4, 400
    features = FeatureSet(extract.run(clip_folder.config(tmp_path, clips)))
    truth = FeatureSet(
        extract.run(clip_folder.config(tmp_path, rows(tmp_path, 6, stated=False), out=tmp_path / "true"))
    )
    names = ["path", "bucket", "frames", "height", "width"]
    assert features.rows.select(names).to_pylist() == truth.rows.select(names).to_pylist()
    misstated = json.loads(Path(features.path, "report.json").read_text())["misstated_clips"]
    assert [clip["path"] for clip in misstated] == ["2.mp4", "3.png", "4.png", "5.mp4"]
    assert misstated[3]["detail"] == "the manifest says 400 frames of 16x32, the file has 9 frames of 16x32"
    assert "not as the manifest says, taken as they are: 4 clips (2.mp4" in capsys.readouterr().err


def test_the_report_says_what_cropping_keeps_and_whether_frame_rates_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = rows(tmp_path, 6)
    clips[5]["fps"] = 30
    wide = np.zeros((16, 64, 3), np.uint8)
    clip_folder.Image.fromarray(wide).save(tmp_path / "wide.png")
    clips.append({"path": "wide.png", "caption": "wide"})
    config = clip_folder.config(tmp_path, clips)
    extract.run(config)
    told = report(config)
    assert told["kept_share_by_bucket"] == {"1x16x16": pytest.approx(0.7433, abs=1e-3), "5x16x16": 1, "5x16x32": 1}
    assert told["most_cropped_clips"][0] == {"path": "wide.png", "bucket": "1x16x16", "kept": 0.25}
    assert told["frame_rates"] == {"24": 1, "30": 1}
    lines = capsys.readouterr().err
    assert "most cropped: wide.png (25% in 1x16x16)" in lines
    assert "frame rates differ: 24 (1 clip), 30 (1 clip)" in lines


def test_features_of_several_encoders_and_their_pooled_vectors_are_kept(tmp_path: Path) -> None:
    settings = encoders.sd3(tmp_path / "sd3")
    config = clip_folder.config(tmp_path, rows(tmp_path, 5), text_encoder=settings)
    features = FeatureSet(extract.run(config))
    encoder = load_text_encoder(settings)
    for row in features.rows.to_pylist():
        sample, own = features.sample(row["id"]), encoder.encode([row["caption"]])
        assert sample.text is not None
        assert sample.pooled is not None
        assert len(sample.text) == row["text_length"] == encoder.max_text_tokens
        torch.testing.assert_close(sample.text, own.features[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sample.pooled, own.pooled[0], atol=1e-5, rtol=1e-4)
    assert features.text_encoder == json.loads(json.dumps(encoder.identity))
    extract.run(config)
    first, second = settings.parts
    changed = settings.model_copy(update={"tokens": (first, second.model_copy(update={"keep_padding": False}))})
    with pytest.raises(ConfigError, match=r"text_encoder\.tokens\.\d.*: .* -> .*"):
        extract.run(config.model_copy(update={"text_encoder": changed}))


@pytest.mark.parametrize("several", [False, True])
def test_the_empty_captions_features_are_kept(several: bool, tmp_path: Path) -> None:
    settings = encoders.sd3(tmp_path / "sd3") if several else clip_folder.TEXT
    made = [{**row, "caption": "a wave"} for row in rows(tmp_path, 7)]
    features = FeatureSet(extract.run(clip_folder.config(tmp_path, made, text_encoder=settings)))
    own = load_text_encoder(settings).encode([""])
    empty = features.empty_caption
    assert empty is not None
    torch.testing.assert_close(empty.text, own.features[0], atol=1e-5, rtol=1e-4)
    if several:
        torch.testing.assert_close(empty.pooled, own.pooled[0], atol=1e-5, rtol=1e-4)
    else:
        assert empty.pooled is None
        assert len(empty.text) == 1


def test_a_damaged_empty_caption_is_named(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 2))
    shard = Path(extract.run(config)) / "shards" / "00000.safetensors"
    whole = load_file(shard)
    save_file({**whole, "empty.text": whole["empty.text"] + 1}, shard)
    with pytest.raises(ConfigError, match=r"00000\.safetensors: the empty caption is not what was written"):
        _ = FeatureSet(config.out).empty_caption
    save_file({k: v for k, v in whole.items() if not k.startswith("empty")}, shard)
    with pytest.raises(ConfigError, match="the empty caption cannot be read"):
        _ = FeatureSet(config.out).empty_caption


# ----------------------------------------------------------------------------- again, and going on


def test_a_second_call_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 7))
    extract.run(config)
    before = times(config.out)
    monkeypatch.setattr(extractor.SubprocessDecoder, "read", None)
    extract.run(config.model_copy(update={"workers": 4, "batch_size": 5, "max_bad_share": 0.5}))
    after = times(config.out)
    assert {k: v for k, v in after.items() if k != "report.json"} == {
        k: v for k, v in before.items() if k != "report.json"
    }


def test_an_interrupted_extraction_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 12))
    whole = content(Path(extract.run(config.model_copy(update={"out": tmp_path / "whole"}))))
    read, calls = extractor.SubprocessDecoder.read, []

    def interrupted(self: extractor.SubprocessDecoder, *args: Any, **more: Any) -> np.ndarray:
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return read(self, *args, **more)

    monkeypatch.setattr(extractor.SubprocessDecoder, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract.run(config)
    with pytest.raises(ConfigError, match=r"no index\.json: the extraction into it has not ended"):
        FeatureSet(config.out)
    done = times(config.out / "shards")
    assert sorted(done) == ["00000.safetensors", "00001.safetensors"]
    before = len(calls)  # the eighth, and those begun meanwhile
    extract.run(config)
    assert len(calls) == before + 6
    assert {name: t for name, t in times(config.out / "shards").items() if name in done} == done
    assert content(config.out) == whole


def extract_slowly(config: ExtractConfig) -> None:
    """With a rest after every shard."""
    write = records.write_record

    def slow(*args: Any) -> None:
        write(*args)
        time.sleep(0.3)

    records.write_record = slow
    extract.run(config)


def test_a_killed_extraction_goes_on_where_it_stopped(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 12))
    process = forked.context().Process(target=extract_slowly, args=(config,))
    process.start()
    deadline = time.monotonic() + 120
    while not (config.out / "parts" / "00001.parquet").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (config.out / "index.json").exists()
    done = times(config.out / "shards")
    (config.out / "shards" / ".123.part.00003.safetensors").touch()  # as a killed writer may leave
    extract.run(config)
    after = times(config.out / "shards")
    assert {name: after[name] for name in done if name.startswith("00000")} == {
        "00000.safetensors": done["00000.safetensors"]
    }
    assert sorted(after) == [f"0000{i}.safetensors" for i in range(4)]
    assert content(config.out) == content(Path(extract.run(config.model_copy(update={"out": tmp_path / "whole"}))))


@pytest.mark.parametrize("change", ["source", "caption", "row", "damage", "appears"])
def test_what_has_changed_at_the_source_is_extracted_again_and_nothing_else(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = rows(tmp_path, 9)
    if change == "appears":
        (tmp_path / "4.png").rename(tmp_path / "away.png")
    config = clip_folder.config(tmp_path, made, max_bad_share=0.2)
    extract.run(config)
    before, index = times(config.out / "shards"), json.loads((config.out / "index.json").read_text())
    for file in tmp_path.glob("*.png"):
        os.utime(file)  # of another time, but the same
    if change == "source":
        clip_folder.Image.new("RGB", (32, 32), "red").save(tmp_path / "4.png")
    elif change == "appears":
        (tmp_path / "away.png").rename(tmp_path / "4.png")
    elif change == "damage":
        (config.out / "shards" / "00001.safetensors").write_bytes(b"short")
    else:
        made[4] = {**made[4], "caption": "another"} if change == "caption" else {**made[4], "score": 7.5}
        clip_folder.write(tmp_path, made)
    capsys.readouterr()
    features = FeatureSet(extract.run(config))
    said = capsys.readouterr().err
    assert "1 of 3 shards to extract, 1 of them again" in said
    assert {"source": "4.png has changed", "appears": "4.png has changed", "damage": "is gone or damaged"}.get(
        change, "what the manifest says"
    ) in said
    after = times(config.out / "shards")
    assert [name for name in before if before[name] != after[name]] == ["00001.safetensors"]
    if change == "source":
        assert features.sample(4).mean[0].eq(1).all()
    assert (features.index["fingerprint"] == index["fingerprint"]) == (change == "damage")


def test_a_shorter_manifest_leaves_no_old_shards(tmp_path: Path) -> None:
    made = rows(tmp_path, 9)
    config = clip_folder.config(tmp_path, made)
    extract.run(config)
    clip_folder.write(tmp_path, made[:4])
    assert len(FeatureSet(extract.run(config))) == 4
    assert sorted(content(config.out)) == ["shards/00000.safetensors", "shards/00001.safetensors"]
    assert len(list((config.out / "parts").iterdir())) == 2


def test_a_changed_config_is_refused_key_by_key_without_overwrite(tmp_path: Path) -> None:
    made = rows(tmp_path, 4)
    config = clip_folder.config(tmp_path, made)
    extract.run(config)
    before = times(config.out)
    changed = config.model_copy(
        update={"frame_stride": 2, "video_encoder": VideoEncoderConfig(kind="pixels", channels=1)}
    )
    with pytest.raises(ConfigError, match="another config") as caught:
        extract.run(changed)
    assert "frame_stride: 1 -> 2" in str(caught.value)
    assert "video_encoder.channels: 3 -> 1" in str(caught.value)
    assert times(config.out) == before
    assert extract.pending_shards(extract.plan_shards(changed))[0], "a changed config leaves nothing finished"
    assert FeatureSet(extract.run(changed, overwrite=True)).sample(0).mean.shape == (1, 1, 16, 16)


def test_other_weights_at_the_same_path_are_noticed(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 3), video_encoder=autoencoder(tmp_path / "vae"))
    extract.run(config)
    torch.manual_seed(1)
    autoencoder(tmp_path / "vae")
    with pytest.raises(ConfigError, match=r"video_encoder\.fingerprint: \w+ -> \w+"):
        extract.run(config)


def test_folders_and_pipes_are_bad_clips_and_not_looked_at_again(tmp_path: Path) -> None:
    made = rows(tmp_path, 4) + [{"path": f"{name}.mp4", "caption": name} for name in ("folder", "pipe")]
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    config = clip_folder.config(tmp_path, made, max_bad_share=0.5)
    shard = Path(extract.run(config)) / "parts" / "00000.parquet"
    before = shard.stat().st_mtime_ns
    assert {clip["reason"] for clip in report(config)["bad_clips"]} == {"is not a file"}
    assert extract.pending_shards(extract.plan_shards(config))[0] == []
    extract.run(config)
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["index.json", "samples.parquet"])
@pytest.mark.parametrize("damage", ["{", None])
def test_a_damaged_index_is_written_again(name: str, damage: str | None, tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 2))
    file = Path(extract.run(config)) / name
    whole = file.read_bytes()
    file.unlink() if damage is None else file.write_text(damage)
    extract.run(config)
    assert file.read_bytes() == whole


def test_damaged_settings_are_named(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 2))
    (Path(extract.run(config)) / "extraction.json").write_text("{")
    with pytest.raises(ConfigError, match=r"extraction\.json: not valid JSON .*--overwrite"):
        extract.run(config)
    assert len(FeatureSet(extract.run(config, overwrite=True))) == 2


@pytest.mark.parametrize("file", ["shards/00001.safetensors", "parts/00001.parquet"])
@pytest.mark.parametrize("at", [0.05, 0.5, 0.95])
def test_a_shard_or_record_damaged_at_equal_length_is_extracted_again(file: str, at: float, tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 7))
    damaged_file = Path(extract.run(config)) / file
    whole = damaged_file.read_bytes()
    rows_before = parquet.read_table(damaged_file) if damaged_file.suffix == ".parquet" else None
    middle = int(at * len(whole))
    times_before = damaged_file.stat()
    damaged_file.write_bytes(whole[:middle] + bytes(255 - b for b in whole[middle : middle + 9]) + whole[middle + 9 :])
    os.utime(damaged_file, ns=(times_before.st_atime_ns, times_before.st_mtime_ns))
    features = FeatureSet(extract.run(config))
    if rows_before is None:
        assert damaged_file.read_bytes() == whole
    else:  # a part of Parquet's headers may differ without a reader that notices
        assert parquet.read_table(damaged_file).equals(rows_before)
    assert [features.sample(i).id for i in features.ids] == list(range(7))


@pytest.mark.parametrize(
    ("values", "where", "message"),
    [
        ((2**60, 1.5), (), "column 's' holds fractions and 1152921504606846976"),
        (("a", "b"), (Where(column="s", at_least=1),), r"manifest\.jsonl: where: column 's' holds text"),
    ],
)
def test_columns_that_cannot_be_kept_or_compared_are_named(
    values: tuple[Any, Any], where: tuple[Where, ...], message: str, tmp_path: Path
) -> None:
    made = [{**row, "s": value} for row, value in zip(rows(tmp_path, 2), values, strict=True)]
    with pytest.raises((ConfigError, ManifestError), match=message):
        extract.plan_shards(clip_folder.config(tmp_path, made, where=where))


def test_one_part_by_hand_is_idempotent_too(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 4))
    plan = extract.plan_shards(config)
    shard = extract.extract_shard(config, plan.shards[1])
    before = times(config.out)
    assert shard == config.out / "shards" / "00001.safetensors" == extract.extract_shard(config, plan.shards[1])
    assert times(config.out) == before


# ------------------------------------------------------------------------------------- bad input


def test_too_many_bad_clips_are_an_error_after_the_report_is_written(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 8) + damaged(tmp_path), max_bad_share=0.3)
    with pytest.raises(ExtractionError, match=r"4 of 12 clips cannot be used, more than the 3 that max_bad_share 0\.3"):
        extract.run(config)
    assert report(config)["bad"] == 4
    with pytest.raises(ConfigError, match="has not ended"):
        FeatureSet(config.out)
    with pytest.raises(ExtractionError, match="4 of 12"):
        extract.run(config)
    assert len(FeatureSet(extract.run(config.model_copy(update={"max_bad_share": 0.34})))) == 8


def test_too_many_bad_clips_stop_the_rest(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, damaged(tmp_path) + rows(tmp_path, 8), max_bad_share=0.1)
    with pytest.raises(ExtractionError, match=r"3 of 12 clips \(stopped after 3\) cannot be used"):
        extract.run(config)
    assert report(config)["missing_parts"] == 3


def test_clips_that_fit_no_bucket_are_no_features(tmp_path: Path) -> None:
    buckets = (ExtractBucket(frames=64, height=16, width=16),)
    config = clip_folder.config(tmp_path, rows(tmp_path, 4), buckets=buckets)
    with pytest.raises(ExtractionError, match=r"none of 4 clips is kept \(4 too_short\)"):
        extract.run(config)
    with pytest.raises(ConfigError, match="none of its 4 clips meets `where`"):
        extract.run(config.model_copy(update={"where": (Where(column="score", at_least=9),)}))


@pytest.mark.parametrize("fault", ["height", "path", "manifest", "column", "out", "taken"])
def test_what_cannot_work_is_refused_before_any_clip_is_opened(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extractor, "SubprocessDecoder", None)
    config = clip_folder.config(tmp_path, rows(tmp_path, 1), video_encoder=autoencoder(tmp_path / "vae"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "bare.jsonl").touch()
    clip_folder.write(tmp_path / "mine", [{"path": "a.png", "caption": "", "shard": 3}])
    changes, message = {
        "height": (
            {"buckets": (ExtractBucket(frames=1, height=17, width=16),)},
            "bucket 1x17x16: height 17 is not divisible by .* 2",
        ),
        "path": (
            {"video_encoder": VideoEncoderConfig(kind="image", path=str(tmp_path / "nowhere"))},
            "video_encoder.path: .*nowhere: no such folder",
        ),
        "manifest": ({"manifest": tmp_path / "bare.jsonl"}, "the manifest is empty"),
        "column": ({"where": (Where(column="beauty", at_least=1),)}, "no column 'beauty'; columns: caption, class"),
        "out": ({"out": tmp_path / "mine"}, "mine exists and holds no extraction"),
        "taken": (
            {"manifest": tmp_path / "mine" / "manifest.jsonl"},
            "column 'shard' has a name that features use themselves",
        ),
    }[fault]
    with pytest.raises(ValueError, match=message):
        extract.run(config.model_copy(update=changes))
    assert not (config.out / "shards").exists()


def test_a_clip_whose_latents_are_not_finite_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 4), max_bad_share=0.5)
    encode = VideoEncoder.encode

    def overflow(self: VideoEncoder, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, std = encode(self, pixels)
        return (mean * float("inf") if pixels.shape[2] > 1 else mean), std

    monkeypatch.setattr(VideoEncoder, "encode", overflow)
    assert FeatureSet(extract.run(config)).ids.tolist() == [0, 1, 3]
    assert report(config)["bad_clips"] == [
        {"path": "2.mp4", "reason": "its latents are not finite in float32 (video_encoder.dtype)"}
    ]


def test_an_error_names_what_is_wrong_and_ends_with_a_code(tmp_path: Path) -> None:
    config = clip_folder.config(tmp_path, rows(tmp_path, 2) + damaged(tmp_path))
    (tmp_path / "config.yaml").write_text(dump(config))
    ended = forked.run("stdit.extract", "--config", tmp_path / "config.yaml")
    assert ended.returncode == 1
    assert "error: 1 of 6 clips (stopped after 3) cannot be used" in ended.stderr
    assert "missing.mp4: no such file" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_full_disk_is_a_clear_error_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """On a real full disk: a small tmpfs in a mount namespace of its own, listed before it vanishes."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    out = tmp_path / "full"
    out.mkdir()
    config = clip_folder.config(tmp_path, rows(tmp_path, 24), out=out / "features")
    (tmp_path / "config.yaml").write_text(dump(config))
    run = f"{sys.executable} -m stdit.extract --config {tmp_path / 'config.yaml'}"
    script = f"mount -t tmpfs -o size=120k none {out} && {{ {run}; code=$?; find {out} -type f; exit $code; }}"
    ended = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert "No space left on device" in ended.stderr
    assert "Traceback" not in ended.stderr
    left = [Path(line).name for line in ended.stdout.splitlines()]
    assert "extraction.json" in left
    assert "index.json" not in left
    assert [name for name in left if name.startswith(".")] == [".stdit-extract.json"]  # its own note of what is its own
