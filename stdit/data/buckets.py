"""Which bucket a clip goes to: as Open-Sora means it, without its traps.

The buckets that a clip fits (long enough, and no side enlarged) are tried by `kept_pixels`, best resolution first, and
at one resolution from long to short; at equal length always what keeps most first. Buckets that are too long for the
clip have no say. `keep_probability` sends the rest of the clips on to the next. So a clip as long as
its bucket is in (Open-Sora's strict `>` drops it), a large bucket that would crop most of a clip comes after a smaller
one of its aspect (Open-Sora takes the largest), and a bucket that keeps nobody passes a clip to fewer frames of the
same resolution before another one. Videos become stills only where the config says so.

Every clip gets a bucket or a `Dropped` with its reason; the same clip always the same one.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stdit.config import Bucket, ExtractBucket, ExtractConfig
from stdit.config.identity import FrameSampling
from stdit.data.decoding import ClipInfo
from stdit.data.frame_sampling import Sampling, sampled_count, step_of
from stdit.data.transforms import rate_reaches

# Buckets whose areas differ by less than this share are one resolution in several aspects.
SAME_RESOLUTION = 0.9

Reason = Literal["too_small", "too_short", "frame_rate", "not_kept"]
REASONS: tuple[Reason, ...] = ("too_small", "too_short", "frame_rate", "not_kept")


@dataclass(frozen=True)
class Dropped:
    """A clip that no bucket takes. `reason` is for counting, `detail` has the numbers."""

    reason: Reason
    detail: str


def assign_clip(info: ClipInfo, config: ExtractConfig, key: str) -> ExtractBucket | Dropped:
    """The bucket of a clip under an extraction's config. key: the clip's path in the manifest."""
    buckets = list(config.buckets)
    if info.frame_count > 1 and not config.images_from_videos:
        # Where all buckets have one frame, videos are asked for their first.
        buckets = [b for b in buckets if b.frames > 1] or buckets
    taking = taking_rate(info, config, buckets)
    if isinstance(taking, Dropped):
        return taking
    buckets = taking
    frames = sampled_count(info, config)
    ratio, seed = config.min_area_ratio, config.seed
    return assign(frames, info.height, info.width, buckets, key=key, min_area_ratio=ratio, seed=seed)


def taking_rate(info: ClipInfo, sampling: Sampling, buckets: Sequence[ExtractBucket]) -> list[ExtractBucket] | Dropped:
    """Those of `buckets` that take a clip's frame rate: all take an image's. Dropped: none does, or the rate is below
    target_fps."""
    if info.frame_count == 1:
        return list(buckets)
    if not rate_reaches(info.fps, sampling.target_fps):
        found = f"{info.fps:g} frames a second" if info.fps else "its frame rate is not known"
        return Dropped("frame_rate", f"{found}, target_fps is {sampling.target_fps:g}, and frames are never repeated")
    rate = info.fps / step_of(info, sampling)
    taking = [bucket for bucket in buckets if bucket.takes_rate(rate)]
    if buckets and not taking:
        return Dropped("frame_rate", f"{rate:g} frames a second, which no bucket takes (min_fps, max_fps)")
    return taking


def dropped_for_shape(info: ClipInfo, sampling: FrameSampling, shape: Bucket) -> Dropped | None:
    """Why an extraction has no sample of `shape` of a clip of this frame rate; None: it does not follow from the rate.
    Of a shape that is none of the extraction's, the rates of all of its buckets count."""
    buckets = [b for b in sampling.buckets if b.key == shape.key] or [b for b in sampling.buckets if b.frames > 1]
    taking = taking_rate(info, sampling, buckets)
    return taking if isinstance(taking, Dropped) else None


def assign(
    frames: int,
    height: int,
    width: int,
    buckets: Sequence[ExtractBucket],
    *,
    key: str,
    min_area_ratio: float = 0.0,
    seed: int = 0,
) -> ExtractBucket | Dropped:
    """The bucket of a clip of `frames` (those there at the stride wanted), `height`, `width` px.

    key: the clip's identity, which with `seed` decides where a keep_probability sends it.
    min_area_ratio: buckets below this share of the area of the best one that the clip covers are not tried.
    ValueError: a clip without pixels, no buckets, or a bucket listed twice.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"clip {key!r}: {frames} frames of {height}x{width} px")
    resolutions = _resolutions(tuple(buckets))

    def worth(bucket: ExtractBucket) -> tuple[float, int, str]:
        return kept_pixels(height, width, bucket), _area(bucket), bucket.key

    covered = [b for b in buckets if b.height <= height and b.width <= width]
    if not covered:
        return Dropped("too_small", f"{height}x{width} px covers none of {_sizes(buckets)}")
    smallest = min_area_ratio * _area(max(covered, key=worth))
    if frames < (shortest := min(b.frames for b in covered if _area(b) >= smallest)):
        return Dropped("too_short", f"{frames} frames, the shortest bucket of its size has {shortest}")

    def filled(bucket: ExtractBucket) -> bool:
        fits = bucket.frames <= frames and bucket.height <= height and bucket.width <= width
        return fits and _area(bucket) >= smallest

    groups = [group for resolution in resolutions if (group := [b for b in resolution if filled(b)])]
    tried: list[ExtractBucket] = []
    for group in sorted(groups, key=lambda group: max(map(worth, group)), reverse=True):
        for length in sorted({b.frames for b in group}, reverse=True):
            # One resolution and length: the aspect that keeps most, never several in turn.
            tried.append(max((b for b in group if b.frames == length), key=worth))
    # A resolution may come first for a shorter bucket's sake: the places of one length go to what keeps most.
    of_length = {
        b.frames: iter(sorted((o for o in tried if o.frames == b.frames), key=worth, reverse=True)) for b in tried
    }
    fitting = [next(of_length[b.frames]) for b in tried]
    for bucket in fitting:
        if _uniform(seed, key, bucket.key) < bucket.keep_probability:
            return bucket
    return Dropped("not_kept", f"sent on by keep_probability of {', '.join(b.key for b in fitting)}")


def tally(outcomes: Iterable[ExtractBucket | Dropped], buckets: Sequence[ExtractBucket]) -> dict[str, dict[str, int]]:
    """{"kept": {bucket key: clips}, "dropped": {reason: clips}}, zeros included. They sum to the number of clips."""
    counts = Counter(o.reason if isinstance(o, Dropped) else o.key for o in outcomes)
    return {
        "kept": {bucket.key: counts[bucket.key] for bucket in buckets},
        "dropped": {reason: counts[reason] for reason in REASONS},
    }


def _area(bucket: ExtractBucket) -> int:
    return bucket.height * bucket.width


@functools.lru_cache(maxsize=64)
def _resolutions(buckets: tuple[ExtractBucket, ...]) -> tuple[tuple[ExtractBucket, ...], ...]:
    """Buckets grouped by resolution, large to small. A group begins at the largest area not yet in one."""
    if not buckets:
        raise ValueError("no buckets")
    twice = [key for key, count in Counter(b.key for b in buckets).items() if count > 1]
    if twice:
        raise ValueError(f"buckets listed twice: {', '.join(twice)}")
    groups: list[list[ExtractBucket]] = []
    for bucket in sorted(buckets, key=lambda b: (-_area(b), b.key)):
        if groups and _area(bucket) >= SAME_RESOLUTION * _area(groups[-1][0]):
            groups[-1].append(bucket)
        else:
            groups.append([bucket])
    return tuple(map(tuple, groups))


def kept_share(height: int, width: int, bucket: Bucket) -> float:
    """The share of a picture of `height` x `width` px that cropping to the bucket's aspect keeps."""
    scale = min(height / bucket.height, width / bucket.width)
    return bucket.height * bucket.width * scale**2 / (height * width)


def kept_pixels(height: int, width: int, bucket: Bucket) -> float:
    """What a bucket keeps of a picture, crop and scale together: its pixels times the square of the share that is not
    cropped. With the share alone, all buckets in which the picture's shorter side is as long would tie."""
    return round(bucket.height * bucket.width * kept_share(height, width, bucket) ** 2, 6)


def _uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    text = "\0".join((str(seed), *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()[:7]) / 2**56


def _sizes(buckets: Sequence[ExtractBucket]) -> str:
    return ", ".join(sorted({f"{b.height}x{b.width}" for b in buckets}))
