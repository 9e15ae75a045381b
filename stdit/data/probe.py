"""A look at a folder of clips before anything is extracted: sizes, lengths, frame rates, and buckets that fit them.

    found = probe("clips/")
    buckets = propose_buckets(found.clips, compression=(4, 8, 8), patch_size=(1, 2, 2), max_pixels=256 * 256,
    max_frames=49)

`probe` opens every file, in child processes with a time limit for each; `propose_buckets` is a pure function of what it
found.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from stdit.config import CacheConfig, ConfigError, ExtractBucket, ExtractConfig, Url
from stdit.console import count_of
from stdit.cores import available_cores
from stdit.data.buckets import assign_clip
from stdit.data.decoding import ClipInfo, DecodeError
from stdit.data.manifest import Clip, file_problem, read
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError, is_of_object
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.data.transforms import frames_available

# Width to height, as cameras and screens have them.
ASPECTS = (9 / 16, 2 / 3, 3 / 4, 1.0, 4 / 3, 3 / 2, 16 / 9)
# An aspect or a length that fewer clips than this share have gets no bucket of its own.
MIN_SHARE = 0.1
# The share of the clips that may be smaller or shorter than the smallest bucket proposed.
OUTLIERS = 0.1


@dataclass(frozen=True)
class ProbedClip:
    """One clip as its file has it: sizes in px as shown, fps 0 for a still image. caption: None where there is none."""

    path: str
    frames: int
    fps: float
    height: int
    width: int
    caption: str | None
    split: str = "train"


@dataclass(frozen=True)
class Probe:
    """What a folder or manifest holds. failures: path and reason of every file that cannot be used."""

    clips: tuple[ProbedClip, ...]
    failures: dict[str, str]
    other_files: int

    @property
    def uncaptioned(self) -> list[str]:
        """Paths of the clips without a caption."""
        return [clip.path for clip in self.clips if clip.caption is None]

    @property
    def frame_rates(self) -> dict[float, int]:
        """Clips of more than one frame by frame rate (rounded to 1/1000), the most common first."""
        rates = Counter(round(clip.fps, 3) for clip in self.clips if clip.frames > 1)
        return dict(sorted(rates.items(), key=lambda item: (-item[1], item[0])))


def stated_info(clip: Clip, rate: bool = True) -> ClipInfo | None:
    """A clip's info from the manifest, if it states all of it. rate: of a video, its frame rate too."""
    fps = 0.0 if clip.frames == 1 or not rate else clip.fps
    if clip.frames is None or fps is None or clip.height is None or clip.width is None:
        return None
    return ClipInfo(clip.frames, fps, clip.height, clip.width)


def probe(
    path: Path | Url | str,
    decoder: str = "auto",
    timeout_s: float = 20.0,
    workers: int | None = None,
    progress: bool = True,
) -> Probe:
    """Opens all clips of a folder or manifest (see probe_clips); in its order. ManifestError: as manifest.read."""
    manifest = read(path)
    clips: list[ProbedClip] = []
    failures: dict[str, str] = {}
    found = probe_clips(manifest.clips, decoder, timeout_s, workers, progress)
    for clip, info in zip(manifest, found, strict=True):
        if isinstance(info, str):
            failures[clip.id] = info
        else:
            caption = clip.caption if clip.captioned else None
            clips.append(ProbedClip(clip.key, info.frame_count, info.fps, info.height, info.width, caption, clip.split))
    return Probe(tuple(clips), failures, manifest.other_files)


def probe_clips(
    clips: Sequence[Clip],
    decoder: str = "auto",
    timeout_s: float = 20.0,
    workers: int | None = None,
    progress: bool = True,
    cache: CacheConfig = CacheConfig(),  # noqa: B008 (immutable)
) -> list[ClipInfo | str]:
    """Frames, frame rate and size of each clip from its file, or why it cannot be used; in order. StoreError: a store
    that does not answer.

    timeout_s: for each file. workers: child processes that read; None: one per core, at most 8. progress: a bar on
    stderr.
    """
    from tqdm import tqdm

    workers = max(1, min(workers or min(8, available_cores()), len(clips)))
    own, objects_here = threading.local(), ObjectCache.of(cache)
    decoders: list[SubprocessDecoder] = []

    def start() -> None:
        own.decoder = SubprocessDecoder(decoder, timeout_s)
        decoders.append(own.decoder)

    def look(clip: Clip) -> ClipInfo | str:
        try:
            with objects_here.local(clip.location) as file:
                return file_problem(clip) or part_info(clip, own.decoder.probe(file))
        except DecodeError as error:
            return error.reason
        except StoreError as error:
            if not is_of_object(error):
                raise
            return str(error.strerror)

    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="probe", initializer=start) as pool:
            found = pool.map(look, clips)
            return list(tqdm(found, total=len(clips), desc="probe", unit="clip", disable=not progress))
    finally:
        for started in decoders:
            started.close()


def part_info(clip: Clip, info: ClipInfo) -> ClipInfo:
    """`info` of a clip's whole file -> of the clip. DecodeError: its frames or its crop lie outside the file."""
    start, end = clip.start_frame or 0, clip.end_frame or info.frame_count
    top, left, height, width = clip.crop or (0, 0, info.height, info.width)
    if end > info.frame_count:
        raise DecodeError(clip.key, f"frames {start} to {end} were asked for, the file has {info.frame_count}")
    if top + height > info.height or left + width > info.width:
        raise DecodeError(clip.key, f"crop {list(clip.crop or ())} is not within {info.height}x{info.width}")
    fps = 0.0 if end - start == 1 else info.fps
    return ClipInfo(end - start, fps, height, width)


# --------------------------------------------------------------------------------------------- buckets


@dataclass(frozen=True)
class BucketProposal:
    """`buckets`, and what they do to the clips: how many go to each, and the reason for each that goes to none."""

    buckets: tuple[ExtractBucket, ...]
    clips_by_bucket: dict[str, int]
    dropped: dict[str, str]

    def lines(self) -> list[str]:
        """For people: a line a bucket, and how many clips are left out."""
        lines = [f"{bucket.key:<14} {count_of(self.clips_by_bucket[bucket.key], 'clip')}" for bucket in self.buckets]
        if self.dropped:
            path, reason = next(iter(self.dropped.items()))
            fit = "fits" if len(self.dropped) == 1 else "fit"
            lines.append(f"{count_of(len(self.dropped), 'clip')} {fit} no bucket, such as {path} ({reason})")
        return lines


def propose_buckets(
    clips: Sequence[ProbedClip],
    compression: tuple[int, int, int],
    patch_size: tuple[int, int, int],
    *,
    max_pixels: int = 256 * 256,
    max_frames: int = 49,
    frame_stride: int = 1,
) -> BucketProposal:
    """Buckets of one resolution for `clips`: the aspects and lengths that they have, in sizes that the model can take.

    compression: pixels per latent (t, h, w); patch_size: latents per patch. Heights and widths are multiples of
    compression * patch, frames 1 + k * compression (whole patches). max_pixels: height * width of a frame at most;
    max_frames: frames of a clip at most.

    The resolution is the largest that all but a tenth of the clips cover without being enlarged. A length is
    proposed that all but a tenth of the videos have, and the one that half of them have if it is at least twice as
    long; one frame if there are still images. ConfigError: no clips, or none as large as one patch.
    """
    if not clips:
        raise ConfigError("no clip could be read, so no buckets can be proposed")
    unit = (compression[1] * patch_size[1], compression[2] * patch_size[2])
    aspects = _common_aspects(clips)
    areas = [_covered(clip, _nearest(clip.width / clip.height, aspects)) for clip in clips]
    area = min(max_pixels, _quantile(areas, OUTLIERS))
    by_aspect = {aspect: [c for c in clips if _nearest(c.width / c.height, aspects) == aspect] for aspect in aspects}
    sizes = dict.fromkeys(size for aspect in aspects if (size := _size(area, aspect, unit, by_aspect[aspect])))
    if not sizes:
        largest = max(clips, key=lambda clip: clip.height * clip.width)
        raise ConfigError(
            f"clips are too small for {unit[0]}x{unit[1]} px, the autoencoder's compression times the patch: "
            f"the largest, {largest.path}, is {largest.height}x{largest.width}"
        )
    lengths = _lengths(clips, compression[0], patch_size[0], max_frames, frame_stride)
    if not lengths:
        raise ConfigError(f"clips are too short for patches of {patch_size[0]} latent frames")
    candidates = [
        ExtractBucket(frames=frames, height=height, width=width) for frames in lengths for height, width in sizes
    ]
    used, _ = _assigned(clips, candidates, frame_stride)
    buckets = tuple(bucket for bucket in candidates if used[bucket.key])
    if not buckets:
        raise ConfigError(f"no clip covers {', '.join(bucket.key for bucket in candidates)}")
    counts, dropped = _assigned(clips, buckets, frame_stride)
    return BucketProposal(buckets, {bucket.key: counts[bucket.key] for bucket in buckets}, dropped)


def _assigned(
    clips: Sequence[ProbedClip], buckets: Sequence[ExtractBucket], frame_stride: int
) -> tuple[Counter[str], dict[str, str]]:
    """How many clips extraction would put into each bucket, and why it would drop the others."""
    counts: Counter[str] = Counter()
    dropped: dict[str, str] = {}
    config = ExtractConfig(manifest=Path(), out=Path(), buckets=tuple(buckets), frame_stride=frame_stride)
    for clip in clips:
        found = assign_clip(ClipInfo(clip.frames, clip.fps, clip.height, clip.width), config, clip.path)
        if isinstance(found, ExtractBucket):
            counts[found.key] += 1
        else:
            dropped[clip.path] = found.detail
    return counts, dropped


def _nearest(aspect: float, aspects: Sequence[float]) -> float:
    return min(aspects, key=lambda other: (abs(math.log(aspect / other)), other))


def _common_aspects(clips: Sequence[ProbedClip]) -> list[float]:
    """The usual aspects (width / height) that at least MIN_SHARE of the clips are nearest to; the most common one
    always."""
    counts = Counter(_nearest(clip.width / clip.height, ASPECTS) for clip in clips)
    most = max(counts.values())
    return sorted(aspect for aspect, count in counts.items() if count == most or count >= MIN_SHARE * len(clips))


def _covered(clip: ProbedClip, aspect: float) -> int:
    """Pixels of the largest box of `aspect` within the clip."""
    height = min(clip.height, clip.width / aspect)
    return int(height * height * aspect)


def _quantile(values: Sequence[int], share: float) -> int:
    """The value that at most `share` of the others lie below."""
    return sorted(values)[int(share * len(values))]


def _size(area: int, aspect: float, unit: tuple[int, int], clips: Sequence[ProbedClip]) -> tuple[int, int] | None:
    """(height, width) in units, at most `area` px, that keeps most of a frame of `aspect`; None: not one unit fits.

    Rounded down, or up where as good as all `clips` still cover it.
    """
    # A little more: the square root of a size in whole units may lie a rounding error below it.
    low = [int((math.sqrt(area * f) + 1e-6) // u) * u for f, u in zip((1 / aspect, aspect), unit, strict=True)]

    def covering(size: tuple[int, int]) -> int:
        return sum(clip.height >= size[0] and clip.width >= size[1] for clip in clips)

    candidates = [(h, w) for h in (low[0], low[0] + unit[0]) for w in (low[1], low[1] + unit[1]) if 0 < h * w <= area]
    enough = (1 - OUTLIERS) * len(clips)
    candidates = [size for size in candidates if covering(size) >= enough] or candidates
    if not candidates:
        return None

    def worth(size: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        # Pixels, less the share that cropping from `aspect` loses.
        lost = abs(math.log(size[1] / size[0] / aspect))
        return round(size[0] * size[1] * math.exp(-lost), 3), (-size[0] * size[1], size[0])

    return max(candidates, key=worth)


def _lengths(
    clips: Sequence[ProbedClip], compression: int, patch: int, max_frames: int, frame_stride: int
) -> list[int]:
    """Frames of the buckets, longest first: 1 + k * compression, whose 1 + k latent frames make whole patches."""
    fits = [n for n in range(1, max_frames + 1, compression) if (1 + (n - 1) // compression) % patch == 0]
    videos = sorted(n for clip in clips if clip.frames > 1 and (n := frames_available(clip.frames, frame_stride)) > 1)
    lengths: set[int] = set()
    if len(videos) < len(clips) and fits[:1] == [1]:
        lengths.add(1)
    if videos and fits:
        common, median = (max((n for n in fits if 1 < n <= _quantile(videos, q)), default=0) for q in (OUTLIERS, 0.5))
        lengths |= {n for n in (common, median if median >= 2 * common else 0) if n}
    return sorted(lengths, reverse=True)
