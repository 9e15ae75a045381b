"""Buckets: total, deterministic, never larger than the clip, and every clip counted."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stdit.config import ExtractBucket, ExtractConfig
from stdit.data.buckets import Dropped, assign, assign_clip, kept_pixels, kept_share, tally
from stdit.data.decoding import ClipInfo


def bucket(key: str, keep: float = 1.0) -> ExtractBucket:
    frames, height, width = map(int, key.split("x"))
    return ExtractBucket(frames=frames, height=height, width=width, keep_probability=keep)


sizes = st.integers(1, 64)
buckets_strategy = st.lists(
    st.builds(bucket, st.builds("{}x{}x{}".format, st.integers(1, 20), sizes, sizes), st.floats(0, 1)),
    min_size=1,
    max_size=8,
    unique_by=lambda b: b.key,
)


@settings(max_examples=300, deadline=None)
@given(buckets_strategy, st.integers(1, 30), sizes, sizes, st.text(max_size=5), st.floats(0, 1), st.integers(0, 9))
def test_assignment_is_total_deterministic_and_never_upsamples(
    buckets: list[ExtractBucket], frames: int, height: int, width: int, key: str, ratio: float, seed: int
) -> None:
    def once(order: list[ExtractBucket]) -> ExtractBucket | Dropped:
        return assign(frames, height, width, order, key=key, min_area_ratio=ratio, seed=seed)

    found = once(buckets)
    assert found == once(list(reversed(buckets)))
    fits = [b for b in buckets if b.frames <= frames and b.height <= height and b.width <= width]
    if isinstance(found, Dropped):
        assert found.detail
        if found.reason == "too_small":
            assert not any(b.height <= height and b.width <= width for b in buckets)
        if found.reason == "too_short" and ratio == 0:
            assert not fits
        if found.reason == "not_kept":
            assert any(b.keep_probability < 1 for b in fits)
    else:
        assert found in fits
        assert found.keep_probability > 0


@settings(max_examples=50, deadline=None)
@given(buckets_strategy, st.lists(st.tuples(st.integers(1, 30), sizes, sizes), max_size=30))
def test_every_clip_is_kept_or_counted_as_dropped(
    buckets: list[ExtractBucket], clips: list[tuple[int, int, int]]
) -> None:
    counts = tally([assign(*clip, buckets, key=str(i)) for i, clip in enumerate(clips)], buckets)
    assert sum(counts["kept"].values()) + sum(counts["dropped"].values()) == len(clips)
    assert set(counts["kept"]) == {b.key for b in buckets}
    assert set(counts["dropped"]) == {"too_small", "too_short", "frame_rate", "not_kept"}


def test_a_clip_exactly_as_long_as_its_bucket_is_in() -> None:
    assert assign(51, 64, 64, [bucket("51x64x64")], key="a") == bucket("51x64x64")
    assert isinstance(assign(50, 64, 64, [bucket("51x64x64")], key="a"), Dropped)


def test_a_bucket_that_keeps_nobody_sends_to_fewer_frames_before_a_lower_resolution() -> None:
    buckets = [bucket("8x64x64", 0.0), bucket("4x64x64"), bucket("8x32x32")]
    assert assign(8, 64, 64, buckets, key="a") == bucket("4x64x64")


def test_large_before_long() -> None:
    buckets = [bucket("4x64x64"), bucket("8x32x32"), bucket("1x64x64")]
    assert assign(8, 64, 64, buckets, key="a") == bucket("4x64x64")
    assert assign(8, 63, 64, buckets, key="a") == bucket("8x32x32")
    assert assign(3, 64, 64, buckets, key="a") == bucket("1x64x64")


def test_at_one_resolution_the_aspect_that_crops_least_is_taken() -> None:
    buckets = [bucket("4x36x64"), bucket("4x49x49"), bucket("4x64x36")]
    assert assign(4, 72, 128, buckets, key="a") == bucket("4x36x64")
    assert assign(4, 128, 72, buckets, key="a") == bucket("4x64x36")
    assert assign(4, 100, 110, buckets, key="a") == bucket("4x49x49")


def keys(*found: str) -> list[ExtractBucket]:
    return [bucket(key) for key in found]


@pytest.mark.parametrize(
    ("buckets", "height", "width", "expected"),
    [
        # Areas are not within 10 % of one another: none is chosen by its area alone.
        (keys("8x48x64", "8x64x48", "8x48x96", "8x48x48"), 1920, 1080, "8x64x48"),
        (keys("8x48x64", "8x64x48", "8x48x96", "8x48x48"), 1080, 1080, "8x48x48"),
        (keys("8x48x64", "8x64x48", "8x48x96", "8x48x48"), 480, 640, "8x48x64"),
        (keys("8x48x64", "8x64x48", "8x48x96", "8x48x48"), 500, 1000, "8x48x96"),
        (keys("49x480x832", "49x480x480"), 1080, 1080, "49x480x480"),
        (keys("49x480x832", "49x480x480"), 1080, 1920, "49x480x832"),
        # A much smaller size of the right aspect keeps less than a large one that crops.
        (keys("49x480x832", "49x128x128"), 1080, 1080, "49x480x832"),
    ],
)
def test_the_size_that_keeps_most_of_the_clip_is_taken_never_the_largest_area_alone(
    buckets: list[ExtractBucket], height: int, width: int, expected: str
) -> None:
    found = assign(60, height, width, buckets, key="a")
    assert isinstance(found, ExtractBucket)
    assert found.key == expected


@pytest.mark.parametrize(
    ("buckets", "frames", "expected"),
    [
        # The longer bucket is nothing to a clip that cannot fill it.
        (keys("17x480x480", "1x352x640", "1x384x384"), 1, "1x384x384"),
        (keys("65x480x480", "17x352x640", "17x384x384"), 20, "17x384x384"),
        (keys("65x480x480", "17x352x640", "17x384x384"), 65, "65x480x480"),
        # 480x480 comes first for what its resolution keeps, and with its length the aspect that keeps most.
        (keys("65x352x640", "17x480x480", "65x384x384"), 99, "65x384x384"),
        (keys("65x352x640", "17x480x480", "65x384x384"), 64, "17x480x480"),
    ],
)
def test_a_square_clip_goes_to_what_keeps_most_among_several_lengths(
    buckets: list[ExtractBucket], frames: int, expected: str
) -> None:
    assert assign(frames, 1080, 1080, buckets, key="a") == bucket(expected)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(64, 512), st.integers(64, 512), st.integers(1, 70),
    st.lists(st.tuples(st.sampled_from([1, 17, 65]), sizes, sizes), min_size=1, max_size=8, unique=True),
)  # fmt: skip
def test_no_bucket_of_the_same_length_keeps_more(
    height: int, width: int, frames: int, shapes: list[tuple[int, int, int]]
) -> None:
    found = assign(frames, height, width, keys(*("{}x{}x{}".format(*shape) for shape in shapes)), key="a")
    if isinstance(found, Dropped):
        assert all(length > frames for length, _, _ in shapes)
        return
    same = [bucket(f"{found.frames}x{h}x{w}") for length, h, w in shapes if length == found.frames]
    assert kept_pixels(height, width, found) == max(kept_pixels(height, width, b) for b in same)


def test_an_area_that_is_too_small_hides_no_larger_one_of_its_resolution() -> None:
    """Of the largest, 560 px, at least 98 are wanted: 8x12 keeps more than 9x11, but has 96."""
    buckets = keys("8x20x28", "1x8x12", "1x9x11")
    assert assign(1, 80, 115, buckets, key="a", min_area_ratio=0.175) == bucket("1x9x11")


@settings(max_examples=100, deadline=None)
@given(st.integers(64, 512), st.integers(64, 512), st.lists(st.tuples(sizes, sizes), min_size=1, unique=True))
def test_no_other_size_is_larger_and_crops_less(height: int, width: int, shapes: list[tuple[int, int]]) -> None:
    buckets = [bucket(f"1x{h}x{w}") for h, w in shapes]
    found = assign(1, height, width, buckets, key="a")
    assert isinstance(found, ExtractBucket)
    for other in buckets:
        larger = other.height * other.width > found.height * found.width / 0.9
        assert not (larger and kept_share(height, width, other) > kept_share(height, width, found))


def extraction(buckets: list[ExtractBucket], **changes: Any) -> ExtractConfig:
    return ExtractConfig(manifest=Path("m"), out=Path("o"), buckets=tuple(buckets), **changes)


def test_videos_become_stills_only_if_the_config_says_so() -> None:
    short, still = ClipInfo(3, 24.0, 64, 64), ClipInfo(1, 0.0, 64, 64)
    buckets = keys("8x64x64", "4x64x64", "1x64x64")
    found = assign_clip(short, extraction(buckets), "a")
    assert found == Dropped("too_short", "3 frames, the shortest bucket of its size has 4")
    assert assign_clip(short, extraction(buckets, images_from_videos=True), "a") == buckets[2]
    assert assign_clip(still, extraction(buckets), "a") == buckets[2]
    assert assign_clip(short, extraction(buckets[2:]), "a") == buckets[2]


def test_a_video_of_which_a_stride_leaves_one_frame_is_no_still() -> None:
    found = assign_clip(ClipInfo(3, 24.0, 64, 64), extraction(keys("2x64x64", "1x64x64"), frame_stride=4), "a")
    assert isinstance(found, Dropped)


def test_target_fps_counts_the_frames_at_that_rate_and_drops_slower_videos() -> None:
    config = extraction(keys("25x64x64", "13x64x64", "1x64x64"), target_fps=12)
    assert assign_clip(ClipInfo(50, 24.0, 64, 64), config, "a") == bucket("25x64x64")
    assert assign_clip(ClipInfo(50, 30.0, 64, 64), config, "a") == bucket("13x64x64")
    assert assign_clip(ClipInfo(25, 11.988, 64, 64), config, "a") == bucket("25x64x64")
    assert assign_clip(ClipInfo(1, 0.0, 64, 64), config, "a") == bucket("1x64x64")
    assert assign_clip(ClipInfo(50, 10.0, 64, 64), config, "a") == Dropped(
        "frame_rate", "10 frames a second, target_fps is 12, and frames are never repeated"
    )


def test_buckets_of_a_frame_rate_take_videos_of_that_rate_alone() -> None:
    slow = ExtractBucket(frames=8, height=64, width=64, max_fps=30)
    fast = ExtractBucket(frames=16, height=64, width=64, min_fps=50)
    config = extraction([slow, fast])
    assert assign_clip(ClipInfo(99, 29.97, 64, 64), config, "a") == slow
    assert assign_clip(ClipInfo(99, 59.94, 64, 64), config, "a") == fast
    found = assign_clip(ClipInfo(99, 40.0, 64, 64), config, "a")
    assert found == Dropped("frame_rate", "40 frames a second, which no bucket takes (min_fps, max_fps)")


def test_a_longer_clip_is_not_cut_to_an_image_for_a_better_aspect() -> None:
    buckets = [bucket("1x36x64"), bucket("4x48x48")]
    assert assign(4, 72, 128, buckets, key="a") == bucket("4x48x48")


def test_min_area_ratio_forbids_to_shrink_too_far() -> None:
    buckets = [bucket("8x64x64"), bucket("1x16x16")]
    assert assign(4, 64, 64, buckets, key="a") == bucket("1x16x16")
    dropped = assign(4, 64, 64, buckets, key="a", min_area_ratio=0.5)
    assert dropped == Dropped("too_short", "4 frames, the shortest bucket of its size has 8")


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_kept_is_the_probability(share: float) -> None:
    buckets = [bucket("4x16x16", share)]
    kept = sum(assign(4, 16, 16, buckets, key=f"clip {i}") == buckets[0] for i in range(4000))
    assert abs(kept / 4000 - share) < (0.03 if 0 < share < 1 else 1e-9)


def test_another_seed_keeps_others() -> None:
    buckets = [bucket("4x16x16", 0.5)]

    def kept(seed: int) -> list[int]:
        return [i for i in range(100) if assign(4, 16, 16, buckets, key=str(i), seed=seed) == buckets[0]]

    assert kept(0) == kept(0) != kept(1)


def test_details_have_the_numbers() -> None:
    assert assign(4, 8, 100, [bucket("4x16x16"), bucket("1x16x32")], key="a") == Dropped(
        "too_small", "8x100 px covers none of 16x16, 16x32"
    )
    assert assign(2, 16, 16, [bucket("4x16x16")], key="a") == Dropped(
        "too_short", "2 frames, the shortest bucket of its size has 4"
    )
    assert assign(4, 16, 16, [bucket("4x16x16", 0.0)], key="a") == Dropped(
        "not_kept", "sent on by keep_probability of 4x16x16"
    )


def test_buckets_listed_twice_and_clips_without_pixels_are_errors() -> None:
    with pytest.raises(ValueError, match="listed twice: 4x16x16"):
        assign(4, 16, 16, [bucket("4x16x16"), bucket("4x16x16", 0.5)], key="a")
    with pytest.raises(ValueError, match="'a': 0 frames of 16x16 px"):
        assign(0, 16, 16, [bucket("4x16x16")], key="a")
    with pytest.raises(ValueError, match="no buckets"):
        assign(4, 16, 16, [], key="a")
