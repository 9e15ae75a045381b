"""Which bucket a clip goes to: as Open-Sora means it, without its two traps.

The buckets that a clip fits (long enough, and no side enlarged) are tried from large resolution to
small, and at one resolution from long to short; `keep_probability` sends the rest of the clips on
to the next. So a clip as long as its bucket is in (Open-Sora's strict `>` drops it), and a
bucket that keeps nobody passes a clip to fewer frames of the same resolution before a lower one.

Every clip gets a bucket or a `Dropped` with its reason; the same clip always the same one.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from stdit.config import ExtractBucket

# Buckets whose areas differ by less than this share are one resolution in several aspects.
SAME_RESOLUTION = 0.9

Reason = Literal["too_small", "too_short", "not_kept"]
REASONS: tuple[Reason, ...] = ("too_small", "too_short", "not_kept")


@dataclass(frozen=True)
class Dropped:
    """A clip that no bucket takes. `reason` is for counting, `detail` has the numbers."""

    reason: Reason
    detail: str


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
    min_area_ratio: buckets below this share of the largest area that the clip covers are not tried.
    ValueError: a clip without pixels, no buckets, or a bucket listed twice.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"clip {key!r}: {frames} frames of {height}x{width} px")
    resolutions = _resolutions(tuple(buckets))
    covered = [[b for b in group if b.height <= height and b.width <= width] for group in resolutions]
    covered = [group for group in covered if group]
    if not covered:
        return Dropped("too_small", f"{height}x{width} px covers none of {_sizes(buckets)}")
    largest = max(b.height * b.width for b in covered[0])
    fitting: list[ExtractBucket] = []
    shortest = min(b.frames for group in covered for b in group if _area(b) >= min_area_ratio * largest)
    for group in covered:
        for length in sorted({b.frames for b in group if b.frames <= frames}, reverse=True):
            # One resolution and length: the aspect that crops least, never several in turn.
            best = min((b for b in group if b.frames == length), key=lambda b: (_cropped(height, width, b), b.key))
            if _area(best) >= min_area_ratio * largest:
                fitting.append(best)
    if not fitting:
        return Dropped("too_short", f"{frames} frames, the shortest bucket of its size has {shortest}")
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


def _cropped(height: int, width: int, bucket: ExtractBucket) -> float:
    """The share of a frame that cropping to the bucket's aspect loses."""
    scale = min(height / bucket.height, width / bucket.width)
    return 1 - _area(bucket) * scale**2 / (height * width)


def _uniform(seed: int, *parts: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments."""
    text = "\0".join((str(seed), *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest()[:7]) / 2**56


def _sizes(buckets: Sequence[ExtractBucket]) -> str:
    return ", ".join(sorted({f"{b.height}x{b.width}" for b in buckets}))
