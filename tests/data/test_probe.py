"""Laws of the look at clips before extraction: every file is reported, and proposed buckets fit clips and model."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from stdit.config import ConfigError, latent_shape, token_grid
from stdit.data.probe import ProbedClip, probe, propose_buckets
from tests.support import clip_folder
from tests.support.videos import lossless, smooth

WAN = ((4, 8, 8), (1, 2, 2))  # compression, patch_size


def clip(name: str, frames: int, height: int, width: int) -> ProbedClip:
    return ProbedClip(name, frames, 24.0 if frames > 1 else 0.0, height, width, None)


def many(count: int, frames: int, height: int, width: int) -> list[ProbedClip]:
    return [clip(f"{frames}x{height}x{width}-{i}", frames, height, width) for i in range(count)]


def test_every_file_is_probed_or_named_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    clip_folder.damaged(folder)
    lossless(folder / "a.mp4", smooth(5, 16, 32))
    (folder / "a.txt").write_text("a wave")
    Image.new("RGB", (24, 18)).save(folder / "b.png")
    found = probe(folder, timeout_s=60, workers=2, progress=False)
    assert found.clips == (
        ProbedClip("a.mp4", 5, 24.0, 16, 32, "a wave"),
        ProbedClip("b.png", 1, 0.0, 18, 24, None),
    )
    assert set(found.failures) == {"empty.mp4", "text.mp4", "half.mp4"}
    assert found.failures["empty.mp4"] == "is empty (0 bytes)"
    assert (found.uncaptioned, found.frame_rates) == (["b.png"], {24.0: 1})


def test_buckets_have_the_clips_aspects_and_lengths() -> None:
    clips = many(50, 120, 1080, 1920) + many(30, 60, 1920, 1080) + many(20, 1, 1024, 1024)
    found = propose_buckets(clips, *WAN, max_pixels=480 * 832, max_frames=81)
    assert found.clips_by_bucket == {"57x832x480": 30, "57x480x832": 50, "1x624x624": 20}
    assert sum(found.clips_by_bucket.values()) == 100
    assert not found.dropped


def test_images_alone_give_image_buckets_and_videos_alone_no_still() -> None:
    images = propose_buckets(many(5, 1, 600, 600), *WAN)
    assert [bucket.key for bucket in images.buckets] == ["1x256x256"]
    videos = propose_buckets(many(5, 30, 600, 600), *WAN)
    assert [bucket.key for bucket in videos.buckets] == ["29x256x256"]


def test_outliers_do_not_decide_the_resolution_and_are_reported() -> None:
    found = propose_buckets([*many(99, 30, 512, 512), clip("tiny.mp4", 30, 32, 32)], *WAN)
    assert [bucket.key for bucket in found.buckets] == ["29x256x256"]
    assert list(found.dropped) == ["tiny.mp4"]
    assert "1 clip fits no bucket, such as tiny.mp4 (32x32 px covers none of 256x256)" in found.lines()


@pytest.mark.parametrize(
    ("clips", "patch", "message"),
    [
        ([], (1, 2, 2), "no clip could be read"),
        (many(3, 9, 8, 8), (1, 2, 2), "too small for 16x16 px"),
        (many(3, 3, 64, 64), (1, 2, 2), "too short"),
        (many(3, 1, 64, 64), (2, 2, 2), "too short for patches of 2 latent frames"),
    ],
)
def test_clips_that_give_no_bucket_are_an_error(
    clips: list[ProbedClip], patch: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        propose_buckets(clips, (4, 8, 8), patch)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(16, 400), st.integers(16, 400)), min_size=1, max_size=30),
    temporal=st.sampled_from([1, 4]),
    spatial=st.sampled_from([1, 8]),
    patch=st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 2, 2)]),
    stride=st.integers(1, 3),
)
def test_proposed_buckets_are_divisible_within_limits_and_take_or_name_every_clip(
    sizes: list[tuple[int, int, int]], temporal: int, spatial: int, patch: tuple[int, int, int], stride: int
) -> None:
    clips = [clip(f"{i}.mp4", *size) for i, size in enumerate(sizes)]
    compression = (temporal, spatial, spatial)
    try:
        found = propose_buckets(clips, compression, patch, max_pixels=128 * 128, max_frames=33, frame_stride=stride)
    except ConfigError:
        return
    for bucket in found.buckets:
        token_grid(latent_shape(bucket, compression), patch, bucket.key)
        assert bucket.frames <= 33
        assert bucket.height * bucket.width <= 128 * 128
        assert found.clips_by_bucket[bucket.key]
    assert sum(found.clips_by_bucket.values()) + len(found.dropped) == len(clips)
    assert found == propose_buckets(clips, compression, patch, max_pixels=128 * 128, max_frames=33, frame_stride=stride)
