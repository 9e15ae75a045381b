"""A set of media to be scored, or to score against: a folder, what stdit.generate wrote, a manifest's split, an .npz.

Only paths and fingerprints are held; frames are read one medium at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stdit.config import Bucket, ReferenceConfig
from stdit.config.identity import FrameSampling
from stdit.data import manifest as manifests
from stdit.data.buckets import Dropped, dropped_for_shape
from stdit.data.clip_frames import open_row, read_row, row_info
from stdit.data.decoding import DecodeError, open_clip
from stdit.data.frame_sampling import FIRST_FRAMES, sampled_count, sampled_windows, samples_of
from stdit.data.manifest import Clip
from stdit.data.transforms import frame_indices, resize_crop
from stdit.evaluation.adm import SampleReader, read_adm
from stdit.evaluation.generated import MANIFEST, read_rows
from stdit.files import fingerprint_file, read_jsonl, sha256

Shape = tuple[int, int, int]  # frames, height, width


@dataclass(frozen=True)
class Medium:
    """One image or video. fingerprint: of its file, and of what is read of it; row: its row in an .npz; clip: its row
    in a dataset's manifest, of which it is the sample `window`; prompt: None if unknown."""

    file: Path
    fingerprint: str
    prompt: str | None = None
    row: int | None = None
    clip: Clip | None = None
    window: int = 0

    def of_window(self, window: int) -> Medium:
        """Another sample of the same clip; the first is the clip's medium itself."""
        if not window:
            return self
        return replace(self, fingerprint=_digest([self.fingerprint, window]), window=window)


@dataclass(frozen=True)
class MediaSet:
    """Media of one shape. `shape`: of all of them, after cropping. rows: of stdit.generate's manifest, one for each.
    left_out: media of other shapes. sampling: which frames of a dataset's clips are taken; dropped: clips of which it
    takes none, by reason."""

    source: Path
    media: tuple[Medium, ...]
    shape: Shape
    crop: bool = False
    rows: tuple[dict[str, Any], ...] = field(default=(), repr=False)
    left_out: int = 0
    sampling: FrameSampling = FIRST_FRAMES
    dropped: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.media)

    @property
    def is_video(self) -> bool:
        return self.shape[0] > 1

    @property
    def fingerprint(self) -> str:
        """Of the contents and prompts, whatever their order and names."""
        listed = sorted([m.fingerprint, m.prompt or ""] for m in self.media)
        return hashlib.sha256(json.dumps([listed, self.shape, self.crop]).encode()).hexdigest()

    def frames(self, media: Sequence[Medium]) -> Iterator[NDArray[np.uint8]]:
        """Frames (T, H, W, 3) of each. ValueError: a file that cannot be decoded."""
        for medium in media:
            if medium.row is not None:
                image = _reader(medium.file)[medium.row][None]
                yield resize_crop(image, *self.shape[1:]) if self.crop else image
            elif medium.clip is not None:
                frames = _clip_frames(medium.clip, medium.window, self.shape[0], self.sampling)
                yield _fitted(medium.file, frames, self.shape, self.crop)
            else:
                yield read_frames(medium.file, self.shape, self.crop)


@lru_cache(maxsize=4)
def _reader(path: Path) -> SampleReader:
    return SampleReader(path)


def read_frames(file: Path, shape: Shape, crop: bool) -> NDArray[np.uint8]:
    """The first frames of a file, resized and centre-cropped if `crop`. ValueError: damaged, or of another shape."""
    try:
        with open_clip(file, "pyav") as reader:
            frames = reader.get(frame_indices(reader.frame_count, shape[0]))
    except DecodeError as error:
        raise ValueError(str(error)) from error
    return _fitted(file, frames, shape, crop)


def _clip_frames(clip: Clip, window: int, count: int, sampling: FrameSampling) -> NDArray[np.uint8]:
    """Frames of a sample of a dataset's clip, as an extraction takes them."""
    try:
        with open_row(clip) as reader:
            return read_row(clip, reader, sampled_windows(row_info(clip, reader), count, sampling)[window])
    except DecodeError as error:
        raise ValueError(str(error)) from error


def _fitted(file: Path, frames: NDArray[np.uint8], shape: Shape, crop: bool) -> NDArray[np.uint8]:
    if crop:
        return resize_crop(frames, shape[1], shape[2])
    if frames.shape[:3] != shape:
        raise ValueError(f"{file}: is {size_of(frames.shape[:3])}, expected {size_of(shape)}")
    return frames


def size_of(shape: Sequence[int]) -> str:
    """8x256x256: frames, height and width."""
    return "x".join(map(str, shape))


# ----------------------------------------------------------------------------------------- opening


def open_generated(path: Path) -> MediaSet:
    """Media of a folder or an .npz, all of one shape. ValueError: none, damaged ones, several shapes."""
    return _checked(path, *_listed(path, None))


def open_reference(config: ReferenceConfig, shape: Shape, sampling: FrameSampling = FIRST_FRAMES) -> MediaSet:
    """Reference media, of `shape` or cropped to it. sampling: with `crop`, which frames of a dataset's clips are taken.
    ValueError: as `open_generated`, or another shape without `crop`."""
    sampling = sampling if config.crop else FIRST_FRAMES
    media, rows = _listed(config.path, config.split, sampling)
    if media and media[0].clip is None:
        sampling = FIRST_FRAMES
    return _checked(config.path, media, rows, shape, config.crop, sampling)


def _listed(
    path: Path, split: str | None, sampling: FrameSampling = FIRST_FRAMES
) -> tuple[list[Medium], list[dict[str, Any]]]:
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder")
    if path.is_file() and path.suffix == ".npz":
        samples = read_adm(path).samples
        if samples is None:
            raise ValueError(f"{path}: holds statistics and no samples (arr_0)")
        digest = sha256(path)
        return [Medium(path, f"{digest} {i}", row=i) for i in range(samples[0])], []
    if path.is_dir() and (path / MANIFEST).is_file():
        if any("file" in row for row in read_jsonl(path / MANIFEST)):  # a dataset's rows have `path`
            rows = [row for row in read_rows(path) if row["file"] is not None]
            return [_medium(path / row["file"], row.get("prompt") or None) for row in rows], rows
        path = path / MANIFEST
    source = manifests.read(path)
    clips = [clip for clip in source if split is None or clip.split == split]
    if not clips:
        raise ValueError(f"{path}: no clip of split {split!r}; splits: {source.splits}")
    return _of_clips(clips, sampling), []


def _of_clips(clips: Sequence[Clip], sampling: FrameSampling) -> list[Medium]:
    """The media of a dataset's clips. Equal fingerprints: the same frames and pixels of the same content."""
    files: dict[Path, Medium] = {}  # many clips may be parts of one
    media = []
    for clip in clips:
        if clip.file not in files:
            files[clip.file] = _medium(clip.file, None)
        read = {key: value for key, value in sampling.changed.items() if key != "buckets"}
        if sampling.target_fps is not None:
            read["fps"] = clip.fps
        if clip.is_part:
            read |= {"start_frame": clip.start_frame, "end_frame": clip.end_frame, "crop": clip.crop}
        fingerprint = files[clip.file].fingerprint
        if read:
            fingerprint = _digest([fingerprint, read])
        media.append(Medium(clip.file, fingerprint, clip.caption if clip.captioned else None, clip=clip))
    return media


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _medium(file: Path, prompt: str | None) -> Medium:
    try:
        return Medium(file, fingerprint_file(file), prompt)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error


def _checked(
    path: Path,
    media: list[Medium],
    rows: list[dict[str, Any]],
    shape: Shape | None = None,
    crop: bool = False,
    sampling: FrameSampling = FIRST_FRAMES,
) -> MediaSet:
    """The media of `shape` (default: the one that all have); with `crop` those that can be cropped to it."""
    if not media:
        raise ValueError(f"{path}: holds no image or video")
    found, damaged = _shapes(path, media, sampling, shape)
    if damaged:
        more = f" (and {len(damaged) - 3} more)" if len(damaged) > 3 else ""
        raise ValueError(
            f"{path}: {len(damaged)} of {len(media)} files cannot be decoded: {'; '.join(damaged[:3])}{more}"
        )
    dropped = dict(Counter(one.detail for one in found if isinstance(one, Dropped)).most_common())
    taken = [(m, s) for m, s in zip(media, found, strict=True) if not isinstance(s, Dropped)]
    shapes = [s for _, s in taken]
    counts = Counter(shapes)
    listed = ", ".join(f"{count} of {size_of(s)}" for s, count in counts.most_common(5))
    if shape is None and len(counts) > 1:
        raise ValueError(f"{path}: {len(counts)} shapes (frames x height x width): {listed}; score each by itself")
    target: Shape = shape or shapes[0]
    if not crop:
        if any(s != target for s in shapes):
            raise ValueError(
                f"{path}: {listed}; generated media are {size_of(target)}: set reference.crop, or resize them yourself"
            )
        return MediaSet(path, tuple(media), target, rows=tuple(rows))
    able = [(m, s) for m, s in taken if all(a >= b for a, b in zip(s, target, strict=True))]
    # What is longer has several samples where the extraction cuts windows.
    exact = [(m, s) for m, s in able if s[1:] == target[1:] and (sampling.windows or s[0] == target[0])]
    # Clips as they are, where a bucket of that shape was cut; else all that are large enough.
    chosen = exact if 2 * len(exact) >= len(able) else able
    if not chosen:
        counted = [listed, *(f"{count} dropped ({reason})" for reason, count in dropped.items())]
        said = "; ".join(text for text in counted if text)
        raise ValueError(f"{path}: {said}; none is as large and as long as the generated {size_of(target)}")
    samples = tuple(m.of_window(i) for m, s in chosen for i in range(samples_of(s[0], target[0], sampling)))
    left_out = len(taken) - len(chosen)
    return MediaSet(path, samples, target, crop=True, left_out=left_out, sampling=sampling, dropped=dropped)


def _shapes(
    path: Path, media: Sequence[Medium], sampling: FrameSampling, target: Shape | None
) -> tuple[list[Shape | Dropped], list[str]]:
    """The shape of each medium, or why an extraction has no sample of shape `target` of it; and what is wrong with
    those that cannot be opened."""
    if media[0].row is not None:
        samples = read_adm(path).samples
        assert samples is not None
        return [(1, samples[1], samples[2])] * len(media), []
    shapes: list[Shape | Dropped] = []
    damaged = []
    for medium in media:
        try:
            if medium.clip is not None:
                with open_row(medium.clip) as reader:
                    info = row_info(medium.clip, reader)
                dropped = target and dropped_for_shape(
                    info, sampling, Bucket(frames=target[0], height=target[1], width=target[2])
                )
                shapes.append(dropped or (sampled_count(info, sampling), info.height, info.width))
                continue
            with open_clip(medium.file, "pyav") as reader:
                shapes.append((reader.frame_count, reader.height, reader.width))
        except DecodeError as error:
            damaged.append(str(error))
    return shapes, damaged


def overlap(reference: MediaSet, training: ReferenceConfig) -> int:
    """How many reference media are also in the training set, by content."""
    sizes = {m.file.stat().st_size for m in reference.media}
    source = manifests.read(training.path)
    clips = [clip for clip in source if training.split is None or clip.split == training.split]
    same_size = [clip for clip in clips if clip.file.is_file() and clip.file.stat().st_size in sizes]
    sampling = reference.sampling if reference.media[0].clip is not None else FIRST_FRAMES
    windows = range(sampling.most_windows)
    known = {medium.of_window(i).fingerprint for medium in _of_clips(same_size, sampling) for i in windows}
    return sum(m.fingerprint in known for m in reference.media)
