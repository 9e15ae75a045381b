"""Several windows of a long clip: each a sample of its own, the frames that its row names, whoever extracts them and
when."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipelines.forecast import ManifestSource
from stdit import extract
from stdit.config import CacheConfig, ConfigError, ExtractBucket
from stdit.config.extract import WindowsConfig
from stdit.data import extractor as room
from stdit.data import records
from stdit.data.decoding import DecodeError, open_clip
from stdit.data.extraction import plan_extraction
from stdit.data.features import FeatureSet
from stdit.data.object_cache import ObjectCache
from stdit.data.transforms import frame_indices, frames_available, resize_crop, to_pixels, window_indices
from tests.support import clip_folder
from tests.support.videos import lossless, smooth

BUCKETS = (ExtractBucket(frames=1, height=16, width=16), ExtractBucket(frames=5, height=16, width=16))


def clips(folder: Path) -> list[dict[str, Any]]:
    """Two images, and videos of 4 (too short), 5, 12 and 40 frames, one of them a part of a file."""
    made = clip_folder.rows(folder, 2)
    for name, frames in (("a", 4), ("b", 5), ("c", 12), ("d", 40)):
        path = lossless(folder / f"{name}.mp4", smooth(frames, 16, 16))
        made.append({"path": path.name, "caption": name, "fps": 24})
    made.append({"path": "d.mp4", "caption": "part", "fps": 24, "start_frame": 10, "end_frame": 22})
    return made


def config(folder: Path, **changes: Any) -> clip_folder.LocalExtraction:
    settings = {"buckets": BUCKETS, "windows": WindowsConfig(stride=4, max=6), **changes}
    return clip_folder.config(folder, clips(folder), **settings)


@settings(deadline=None, max_examples=200)
@given(
    frame_count=st.integers(1, 200),
    frames=st.integers(1, 20),
    stride=st.sampled_from([1, 2, 2.5]),
    every=st.integers(1, 30),
    most=st.integers(1, 9),
    mode=st.sampled_from(["first", "center"]),
)
def test_windows_lie_within_the_clip_a_stride_apart_and_there_are_as_many_as_fit(
    frame_count: int, frames: int, stride: float, every: int, most: int, mode: str
) -> None:
    available = frames_available(frame_count, stride)
    assume(available >= frames)  # as the bucket is chosen
    found = window_indices(frame_count, frames, stride, mode, (every, most))
    assert len(found) == min(most, len(range(0, available - frames + 1, every)))
    assert all(len(set(window)) == frames and window[0] >= 0 and window[-1] < frame_count for window in found)
    for before, after in itertools.pairwise(found):
        assert abs((after[0] - before[0]) - every * stride) < 1
    assert window_indices(frame_count, frames, stride, mode) == [frame_indices(frame_count, frames, stride, mode)]


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("every", [1, 2, 5, 7])
@pytest.mark.parametrize("at_once", [1, 9, 1000])
def test_windows_are_put_together_from_groups_that_share_no_frame(frames: int, every: int, at_once: int) -> None:
    groups = list(room.grouped(window_indices(60, frames, 2.5, "center", (every, 9)), at_once))
    new = room.new_indices(groups)
    assert len({index for part in new for index in part}) == sum(map(len, new))
    video, still = np.arange(60), np.array([7])
    for control in (None, video, still):
        parts = [(part, video[part], control if control is None or control is still else control[part]) for part in new]
        found = list(room.joined(groups, parts))
        assert [window for window, *_ in found] == [window for group in groups for window in group]
        for window, pixels, beside in found:
            assert pixels.tolist() == window
            assert control is None or beside is not None
            if beside is not None:
                assert beside.tolist() == ([7] if control is still else window) or (control is still and frames == 1)


def test_each_window_is_a_sample_with_the_frames_that_its_row_names(tmp_path: Path) -> None:
    settings = config(tmp_path)
    features = FeatureSet(extract.run(settings))
    ranges: dict[str, list[tuple[int, int]]] = {}
    for row in features.rows.to_pylist():
        ranges.setdefault(row["caption"], []).append((row["start_frame"], row["end_frame"]))
        if row["bucket"] == "5x16x16":
            with open_clip(tmp_path / row["path"]) as reader:
                pixels = to_pixels(resize_crop(reader.get(range(row["start_frame"], row["end_frame"])), 16, 16))
            assert np.array_equal(features.sample(row["id"]).mean.numpy(), pixels)
    assert ranges["b"] == [(0, 5)]
    assert ranges["c"] == [(0, 5), (4, 9)]
    assert ranges["d"] == [(i, i + 5) for i in range(0, 24, 4)]
    assert ranges["part"] == [(10, 15), (14, 19)]
    assert len(set(features.ids.tolist())) == len(features) == 2 + 1 + 2 + 6 + 2
    told = json.loads((settings.out / "report.json").read_text())
    assert (told["clips"], told["kept"], told["samples"], told["dropped_by_reason"]) == (7, 6, 13, {"too_short": 1})
    # 5 of 5, 9 of 12, 25 of 40 and 9 of 12 frames.
    assert told["used_frames_by_bucket"] == {"1x16x16": 1.0, "5x16x16": pytest.approx(48 / 69, abs=1e-4)}
    source = ManifestSource(settings)
    counts = {key: len(ids) for key, ids in source.select(None, settings.buckets).items()}
    assert counts == {"1x16x16": 2, "5x16x16": 11}
    assert "6 would be kept (as 13 samples)" in source.lines()[0]


def test_an_extraction_of_windows_is_idempotent_and_makes_again_what_has_changed(tmp_path: Path) -> None:
    settings = config(tmp_path)
    plan = extract.plan_shards(settings)
    out = Path(extract.run(settings))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "report.json"}
    index = (out / "index.json").read_bytes()
    extract.run(settings)
    assert {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "report.json"
    } == before
    # The shard of clips 3 to 5 alone.
    lossless(tmp_path / "c.mp4", smooth(20, 16, 16))
    reasons = [records.stale_reason(out, spec, ObjectCache.of(CacheConfig())) for spec in plan.shards]
    assert [reason is None for reason in reasons] == [True, False, True]
    extract.run(settings)
    assert len(FeatureSet(out)) == 15
    lossless(tmp_path / "c.mp4", smooth(12, 16, 16))
    records.record_path(out, 1).unlink()
    extract.run(settings)
    assert json.loads(index)["samples_sha256"] == json.loads((out / "index.json").read_text())["samples_sha256"]
    with pytest.raises(ConfigError, match=r"windows.stride: 4 -> 5"):
        extract.run(config(tmp_path, windows=WindowsConfig(stride=5, max=6)))


def test_a_long_clip_is_decoded_some_windows_at_a_time_with_equal_features(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FeatureSet(extract.run(config(tmp_path)))
    monkeypatch.setattr(room, "READ_BYTES", 10 * 16 * 16 * 3)
    reads, asked, read = [], defaultdict(list), room.SubprocessDecoder.read

    def counted(self: Any, path: Path, indices: Any, *args: Any) -> np.ndarray:
        reads.append(len(indices))
        asked[path.name].extend(indices)
        return read(self, path, indices, *args)

    monkeypatch.setattr(room.SubprocessDecoder, "read", counted)
    parts = FeatureSet(extract.run(config(tmp_path, out=tmp_path / "parts")))
    assert max(reads) <= 10
    assert all(len(set(indices)) == len(indices) for indices in asked.values())  # no frame is decoded twice
    assert len(reads) > 5
    assert parts.rows == whole.rows
    assert all(torch.equal(parts.sample(i).mean, whole.sample(i).mean) for i in whole.ids)
    assert list(room.grouped([[0, 1], [2, 3], [4, 5]], 4)) == [[[0, 1], [2, 3]], [[4, 5]]]
    assert list(room.grouped([[0, 9]], 4)) == [[[0, 9]]]


def test_a_clip_that_breaks_off_behind_its_first_windows_is_bad_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "READ_BYTES", 1)
    read = room.SubprocessDecoder.read

    def broken(self: Any, path: Path, indices: Any, *args: Any) -> np.ndarray:
        if path.name == "d.mp4" and indices[0] > 8:
            raise DecodeError(path, "breaks off")
        return read(self, path, indices, *args)

    monkeypatch.setattr(room.SubprocessDecoder, "read", broken)
    settings = config(tmp_path, max_bad_share=0.5)
    features = FeatureSet(extract.run(settings))
    told = json.loads((settings.out / "report.json").read_text())
    assert [clip["reason"] for clip in told["bad_clips"]] == ["breaks off"]
    assert (told["clips"], told["kept"], told["bad"], told["samples"]) == (7, 5, 1, 7)
    assert "d" not in features.rows["caption"].to_pylist()
    assert not any(record.name.endswith(".part") for record in settings.out.rglob("*"))


def test_a_clip_of_which_one_window_is_bad_is_bad_as_a_whole(tmp_path: Path) -> None:
    class Broken:
        """Latents of bright clips are not finite."""

        identity: dict[str, Any] = {"dtype": "float16"}  # noqa: RUF012
        dtype = torch.float32

        def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
            bright = pixels.flatten(1).amax(1) > 0.99
            return torch.where(bright[:, None, None, None, None], torch.inf, pixels), None

    frames = np.full((20, 16, 16, 3), 100, np.uint8)
    frames[11] = 255
    lossless(tmp_path / "a.mp4", frames)
    lossless(tmp_path / "b.mp4", np.full((20, 16, 16, 3), 90, np.uint8))
    made = [{"path": name, "caption": name} for name in ("a.mp4", "b.mp4")]
    settings = clip_folder.config(
        tmp_path, made, buckets=BUCKETS[1:], windows=WindowsConfig(stride=5), text_encoder=None, max_bad_share=0.5
    )
    plan = plan_extraction(settings, {"video_encoder": {}, "text_encoder": None})
    with room.Extractor(settings, Broken(), None, {}) as extractor:
        (spec,) = plan.shards
        tensors: dict[str, torch.Tensor] = {}
        clips = room._until_end(extractor._clips([spec]), {"wait": 0.0})
        rows = list(extractor._encode(clips, tensors))
        assert [row["status"] for row in rows] == ["kept", "kept", "bad", "kept"] + ["kept"] * 4
        rows = room._whole_clips(rows, tensors, spec.windows)
    assert [(row["id"], row["status"]) for row in rows] == [(0, "bad"), *((8 + i, "kept") for i in range(4))]
    assert sorted(tensors) == [f"{8 + i}.mean" for i in (2, 3)] + ["8.mean", "9.mean"]
    assert "not finite" in rows[0]["reason"]
