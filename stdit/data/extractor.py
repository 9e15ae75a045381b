"""Extracting one shard: decode, crop, encode, and write the features with their record.

T, H, W pixels of the bucket · C latent channels · t, h, w latents · L tokens of a caption, D their width, P that of its
pooled vector (of a vision encoder: D width and t, h, w places of its features)
"""

from __future__ import annotations

import bisect
import queue
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from stdit.config import ExtractBucket, ExtractConfig, Url
from stdit.data import records
from stdit.data.buckets import Dropped, assign_clip
from stdit.data.control import control_state, read_control
from stdit.data.decoder_pool import DecoderPool, decoder_workers
from stdit.data.decoding import ClipInfo, DecodeError, InfoMismatch, check_info
from stdit.data.features import EMPTY_CAPTION, INDEX, digest_of, sample_digest, shard_path, unpad, write_shard
from stdit.data.frame_sampling import sampled_windows, step_of
from stdit.data.manifest import Clip, file_problem
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError, is_of_object
from stdit.data.probe import part_info, stated_info
from stdit.data.records import ShardResult, ShardSpec
from stdit.data.staging import local_folder, staging_of
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.data.transforms import to_pixels
from stdit.files import Closable, sha256

_Item = TypeVar("_Item")
# Of a clip of many windows so much is decoded at once, in bytes of its bucket's size.
READ_BYTES = 128 * 2**20


class VideoEncoder(Protocol):
    """Interface of an autoencoder (stdit.encoders.video.VideoEncoder)."""

    identity: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> mean and std (or None), (B, C, t, h, w)."""
        ...


class TextEncoder(Protocol):
    """Interface of a text encoder (stdit.encoders.text.TextEncoder)."""

    identity: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, captions: list[str]) -> TextFeatures:
        """Features (B, L, D) and mask (B, L); `.pooled` (B, P) or None."""
        ...

    def cuts(self, captions: list[str]) -> list[tuple[int, int] | None]:
        """(tokens, tokens that are kept) of each caption that is cut, None for the others."""
        ...


class VisionEncoder(Protocol):
    """Interface of a vision encoder (stdit.encoders.vision.VisionEncoder)."""

    identity: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, pixels: Tensor, stride: int) -> Tensor:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> patch features (B, D, t, h, w) of every `stride`-th frame."""
        ...


class TextFeatures(Protocol):
    """Output of a text encoder (stdit.encoders.text.TextFeatures)."""

    @property
    def features(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...

    @property
    def pooled(self) -> Tensor | None: ...


@dataclass
class _Clip:
    """A clip to encode: its `row` of the record and, if it is kept, bucket, pixels (3, T, H, W) and those of its
    control input, whose T may be 1."""

    row: dict[str, Any]
    bucket: ExtractBucket | None = None
    pixels: Tensor | None = None
    control: Tensor | None = None


@dataclass(frozen=True)
class _Task:
    """A clip to decode: its place in the manifest, and where its file is."""

    spec: ShardSpec
    number: int
    clip: Clip
    location: Path | Url


# Indices of frames, the frames uint8 (T, H, W, 3), and those of the control input, (T or 1, H, W, 3).
_Frames = tuple[list[int], np.ndarray, np.ndarray | None]


@dataclass
class _OpenClip:
    """What decoding has found of a clip: its `row` and, if it is kept, its groups of windows and the first group's
    `frames`."""

    task: _Task
    row: dict[str, Any]
    info: ClipInfo | None = None
    bucket: ExtractBucket | None = None
    groups: Sequence[Sequence[list[int]]] = ()
    frames: _Frames | None = None
    # The row before the file was opened, and the seconds since.
    first: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class _ShardEnd:
    """Follows the last clip of a shard. decode_s: seconds that its clips took, summed over decoders."""

    decode_s: float = 0.0


class Extractor(Closable):
    """Encoders, and the processes that decode for them, shared by all shards that a process extracts. A context
    manager.

    settings: of the encoders, as far as they determine features; stored in every record and compared with the plan's.
    decoders: number of decoding processes; None: as the config says.
    """

    def __init__(
        self,
        config: ExtractConfig,
        video: VideoEncoder,
        text: TextEncoder | None,
        settings: Mapping[str, Any],
        decoders: int | None = None,
        vision: VisionEncoder | None = None,
    ) -> None:
        self.config = config
        self.video = video
        self.text = text
        self.vision = vision
        self.settings = settings
        self.pool = DecoderPool(
            config.decoder, config.decode_timeout_s, decoders or decoder_workers(config.decoder_workers)
        )
        self.cache = ObjectCache.of(config.cache)
        self.folder, self.staging = local_folder(config), staging_of(config)
        self._encode_s = 0.0

    def close(self) -> None:
        """Ends the decoding processes."""
        self.pool.close()

    def extract(self, spec: ShardSpec) -> ShardResult:
        """`extract_all` of one shard."""
        (result,) = self.extract_all([spec])
        return result

    def extract_all(self, specs: Sequence[ShardSpec]) -> Iterator[ShardResult]:
        """Writes shards and their records, replacing older ones; of features at a URL, uploads them. While one is
        encoded and written, the next is being decoded.

        OSError: no space or no permission; no partial file stays. StoreError: the URL cannot be written. ValueError:
        features of text or frames that are not finite.
        """
        clips = prefetch(self._clips(specs), self.config.batch_size)
        try:
            for spec in specs:
                yield self._extract(spec, clips)
        finally:
            clips.close()

    def _extract(self, spec: ShardSpec, clips: Iterator[_Clip | _ShardEnd]) -> ShardResult:
        """Takes the clips of one shard from `clips`."""
        began, self._encode_s = time.perf_counter(), 0.0
        out = self.folder
        # From here on the features are incomplete.
        if self.staging:
            self.staging.begin_shard(spec.number)
        (out / INDEX).unlink(missing_ok=True)
        records.record_path(out, spec.number).unlink(missing_ok=True)
        tensors: dict[str, Tensor] = {}
        spent = {"decode": 0.0, "wait": 0.0}
        rows = list(self._encode(_until_end(clips, spent), tensors))
        rows = _whole_clips(rows, tensors, spec.windows)
        with self._encoding():
            empty = self._add_text([row for row in rows if row["status"] == "kept"], tensors)
        self._add_digests(rows, tensors)
        shard = shard_path(out, spec.number)
        size = 0
        if tensors:
            size = write_shard(shard, tensors)
        else:
            shard.unlink(missing_ok=True)
        column = self.config.control_column
        info = {
            "shard_sha256": sha256(shard) if tensors else None,
            "shard_bytes": size,
            "posterior": any(name.endswith(".std") for name in tensors),
            "empty_caption": empty,
            "controls": [control_state(clip, column, self.cache) for clip in spec.clips] if column else [],
            "encoders": {
                "video_encoder": self.video.identity,
                "text_encoder": self.text.identity if self.text else None,
                **({"vision_encoder": self.vision.identity} if self.vision else {}),
            },
            "settings": dict(self.settings),
            "seconds": {**spent, "encode": self._encode_s, "total": time.perf_counter() - began},
        }
        records.write_record(out, spec, rows, info)
        if self.staging:
            self.staging.push_shard(spec.number)
        return ShardResult(spec.number, len(spec.clips), sum(row["status"] == "bad" for row in rows))

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Counts the time within as the encoders'."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._encode_s += time.perf_counter() - began

    # ---------------------------------------------------------------------------- decoding, ahead of the encoder

    def _clips(self, specs: Sequence[ShardSpec]) -> Iterator[_Clip | _ShardEnd]:
        """The shards' clips in order, decoded and cropped, and the end of each shard. StoreError: a store that does not
        answer."""
        tasks = (
            _Task(spec, number, clip, location)
            for spec in specs
            for number, clip, location in zip(
                spec.ids, spec.clips, self.cache.ahead([clip.location for clip in spec.clips]), strict=True
            )
        )
        opened = self.pool.map(self._open, tasks)
        for spec in specs:
            end = _ShardEnd()
            for _ in spec.clips:
                yield from self._windows(next(opened), end)
            yield end

    def _open(self, decoder: SubprocessDecoder, task: _Task) -> _OpenClip:
        """A clip with its first frames, or the reason why there are none. StoreError: a store that does not answer."""
        began = time.perf_counter()
        spec, clip = task.spec, task.clip
        state = records.source_state(task.location, self.cache)
        row = {**_row(spec.number, task.number * spec.windows, clip), **state}
        try:
            if reason := file_problem(clip):
                raise DecodeError(clip.key, reason)
            with self.cache.local(task.location) as file:
                opened = self._open_file(decoder, task, file, row)
        except (DecodeError, StoreError) as error:
            opened = _OpenClip(task, _bad(row, error))
        opened.first = row
        opened.seconds = time.perf_counter() - began
        return opened

    def _open_file(self, decoder: SubprocessDecoder, task: _Task, file: Path, row: dict[str, Any]) -> _OpenClip:
        """Of a clip, which lies in `file`. Where file and manifest differ in length or size, the file is right.
        DecodeError."""
        clip, stated = task.clip, stated_info(task.clip)
        if stated is None:
            return self._read_first(decoder, task, file, row, part_info(clip, decoder.probe(file)))
        try:
            opened = self._read_first(decoder, task, file, row, stated)
            # To be dropped for what the manifest says. Not of a part: its file may break off behind it, and is not
            # probed.
            if opened.bucket is None and not clip.is_part:
                check_info(file, stated, decoder.probe(file))
            return opened
        except InfoMismatch as error:
            return self._read_first(decoder, task, file, {**row, "detail": error.reason}, error.found)

    def _read_first(
        self, decoder: SubprocessDecoder, task: _Task, file: Path, row: dict[str, Any], info: ClipInfo
    ) -> _OpenClip:
        """Of a clip of length and size `info`. DecodeError; InfoMismatch: the file has others."""
        config, clip = self.config, task.clip
        step = step_of(info, config)
        size = {"frames": info.frame_count, "height": info.height, "width": info.width}
        row = {**row, **size, "fps": info.fps / step}
        bucket = assign_clip(info, config, clip.id)
        if isinstance(bucket, Dropped):
            return _OpenClip(task, {**row, "status": "dropped", "reason": bucket.reason, "detail": bucket.detail})
        windows = sampled_windows(info, bucket.frames, config)
        groups = list(grouped(windows, READ_BYTES // (3 * bucket.height * bucket.width)))
        used = len({index for window in windows for index in window})
        row = {**row, "status": "kept", "bucket": bucket.key, "used_frames": used}
        opened = _OpenClip(task, row, info, bucket, groups)
        opened.frames = self._read(decoder, opened, file, new_indices(groups)[0])
        return opened

    def _windows(self, opened: _OpenClip, end: _ShardEnd) -> Iterator[_Clip]:
        """The windows of one clip, of which the groups behind the first are read by all decoders. StoreError: a store
        that does not answer."""
        end.decode_s += opened.seconds
        if opened.bucket is None or opened.info is None:
            yield _Clip(opened.row)
            return
        number, first = opened.row["id"], opened.task.clip.start_frame or 0
        try:
            for window, frames, control in joined(opened.groups, self._groups(opened, end)):
                start = first + window[0]
                part = (
                    {"start_frame": start, "end_frame": start + window[-1] - window[0] + 1}
                    if self.config.windows
                    else {}
                )
                pixels = torch.from_numpy(to_pixels(frames))
                beside = None if control is None else torch.from_numpy(to_pixels(control))
                yield _Clip({**opened.row, "id": number, **part}, opened.bucket, pixels, beside)
                number += 1
        except (DecodeError, StoreError) as error:
            yield _Clip(_bad(opened.first, error))

    def _groups(self, opened: _OpenClip, end: _ShardEnd) -> Iterator[_Frames]:
        """The new frames of each group of windows."""
        frames, opened.frames = opened.frames, None
        assert frames is not None
        yield frames
        later = new_indices(opened.groups)[1:]
        for frames, seconds in self.pool.map(lambda decoder, new: self._read_later(decoder, opened, new), later):
            end.decode_s += seconds
            yield frames

    def _read_later(self, decoder: SubprocessDecoder, opened: _OpenClip, indices: list[int]) -> tuple[_Frames, float]:
        """Further frames of a clip, and the seconds that they took. DecodeError, StoreError."""
        began = time.perf_counter()
        with self.cache.local(opened.task.location) as file:
            frames = self._read(decoder, opened, file, indices)
        return frames, time.perf_counter() - began

    def _read(self, decoder: SubprocessDecoder, opened: _OpenClip, file: Path, indices: list[int]) -> _Frames:
        """Frames `indices` of a clip, and of its control input. DecodeError."""
        clip, info, bucket = opened.task.clip, opened.info, opened.bucket
        assert info is not None
        assert bucket is not None
        shape, control, first = (bucket.height, bucket.width), None, clip.start_frame or 0
        if clip.is_part:

            def check(found: ClipInfo) -> None:
                check_info(file, info, part_info(clip, found))

            frames = decoder.read_part(file, [first + index for index in indices], shape, clip.crop, check)
        else:
            frames = decoder.read(file, indices, shape, info)
        if column := self.config.control_column:
            control = read_control(decoder, clip, column, info, indices, bucket, self.cache)
        return indices, frames, control

    # ---------------------------------------------------------------------------- encoding

    def _encode(self, clips: Iterable[_Clip], tensors: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """Encodes `clips` in batches of one bucket into `tensors`; yields their rows."""
        waiting: dict[str, list[_Clip]] = {}
        for clip in clips:
            if clip.bucket is not None:
                group = waiting.setdefault(clip.bucket.key, [])
                group.append(clip)
                if len(group) == self.config.batch_size:
                    self._add_latents(waiting.pop(clip.bucket.key), tensors)
            yield clip.row
        for group in waiting.values():
            self._add_latents(group, tensors)

    def _add_latents(self, group: Sequence[_Clip], tensors: dict[str, Tensor]) -> None:
        """Adds latents of clips of one bucket, in the encoder's precision. A clip whose latents are not finite is
        bad."""
        with self._encoding():
            self._encode_pixels(group, tensors)

    def _encode_pixels(self, group: Sequence[_Clip], tensors: dict[str, Tensor]) -> None:
        pixels = torch.stack([clip.pixels for clip in group if clip.pixels is not None])
        mean, std = self.video.encode(pixels)
        vision = None if self.vision is None else self._vision_features(self.vision, pixels)
        for i, clip in enumerate(group):
            # One at a time: control inputs have one frame, or as many as the clip.
            control = None if clip.control is None else self.video.encode(clip.control[None])[0][0]
            clip.pixels = clip.control = None
            latents = [tensor for tensor in (mean[i], None if std is None else std[i], control) if tensor is not None]
            if not all(tensor.isfinite().all() for tensor in latents):
                reason = f"its latents are not finite in {self.video.identity['dtype']} (video_encoder.dtype)"
                clip.row |= {"status": "bad", "reason": reason, "bucket": None}
                continue
            if vision is not None:
                tensors[f"{clip.row['id']}.vision"] = vision[i].clone()  # safetensors refuses shared memory
            tensors[f"{clip.row['id']}.mean"] = mean[i].to("cpu", self.video.dtype)
            if control is not None:
                tensors[f"{clip.row['id']}.control"] = control.to("cpu", self.video.dtype)
            if std is not None:
                tensors[f"{clip.row['id']}.std"] = std[i].to("cpu", self.video.dtype)

    def _vision_features(self, encoder: VisionEncoder, pixels: Tensor) -> Tensor:
        """Patch features (B, D, t, h, w), a frame for each of t latent frames: the first, then the last of those that
        it stands for.
        ValueError: not finite."""
        features = encoder.encode(pixels, self.video.identity["compression"][0]).to("cpu", encoder.dtype)
        if not features.isfinite().all():
            raise ValueError(
                f"features of the vision encoder are not finite in {encoder.identity['dtype']}: set vision_encoder.dtype to "
                "float32 or bfloat16"
            )
        return features

    def _add_text(self, rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> str | None:
        """Adds text features of the rows' captions, further ones and the empty caption, unpadded; each distinct caption
        is encoded once.

        Returns the SHA-256 of the empty caption's; None where there is nothing to add.
        """
        if self.text is None or not rows:
            return None
        # Captions of a length side by side: little padding.
        further = [(f"caption_{name}", f".{name}") for name in self.config.captions]
        texts = {row["caption"] for row in rows} | {row[c] for row in rows for c, _ in further if row.get(c)}
        captions = sorted({"", *texts}, key=lambda caption: (len(caption), caption))
        found: dict[str, dict[str, Tensor]] = {}
        for start in range(0, len(captions), self.config.batch_size):
            batch = captions[start : start + self.config.batch_size]
            found.update(zip(batch, self._encode_texts(batch), strict=True))
        cut = dict(zip(captions, self.text.cuts(captions), strict=True))
        named = [(f"{row['id']}", "", row["caption"]) for row in rows] + [(EMPTY_CAPTION, "", "")]
        named += [(f"{row['id']}", suffix, row[c]) for row in rows for c, suffix in further if row.get(c)]
        for name, suffix, caption in named:
            # safetensors refuses memory that two names share
            tensors |= {f"{name}.{kind}{suffix}": tensor.clone() for kind, tensor in found[caption].items()}
        for row in rows:
            row |= {"text_length": len(found[row["caption"]]["text"]), "cut": cut[row["caption"]] is not None}
        return digest_of(found[""])

    @staticmethod
    def _add_digests(rows: Sequence[dict[str, Any]], tensors: Mapping[str, Tensor]) -> None:
        """Adds the digest of its tensors to the row of each kept clip."""
        by_id: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            id, _, kind = name.partition(".")
            by_id.setdefault(id, {})[kind] = tensor
        for row in rows:
            if row["status"] == "kept":
                row["tensors_digest"] = sample_digest(by_id[str(row["id"])])

    def _encode_texts(self, captions: list[str]) -> Iterator[dict[str, Tensor]]:
        """text (L, D), and pooled (P,) where the encoder makes it, of each caption, in the encoder's own precision.

        ValueError: features that are not finite.
        """
        assert self.text is not None
        encoded, dtype = self.text.encode(captions), self.text.dtype
        pooled = encoded.pooled
        if not (encoded.features.isfinite().all() and (pooled is None or pooled.isfinite().all())):
            raise ValueError(
                f"text features are not finite in {self.text.identity['dtype']}: "
                "set text_encoder.dtype to float32 or bfloat16"
            )
        for i, text in enumerate(unpad(encoded.features.to("cpu", dtype), encoded.mask.cpu())):
            yield {"text": text, **({} if pooled is None else {"pooled": pooled[i].to("cpu", dtype)})}


def grouped(windows: Sequence[list[int]], frames: int) -> Iterator[list[list[int]]]:
    """`windows` in runs that have at most `frames` frames together, or are of one window."""
    group: list[list[int]] = []
    for window in windows:
        if group and window[-1] - group[0][0] + 1 > frames:
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def new_indices(groups: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """The frames of each group of windows that no group before it has: none is decoded twice."""
    found, last = [], -1
    for group in groups:
        found.append(sorted({index for window in group for index in window if index > last}))
        last = group[-1][-1]
    return found


def joined(
    groups: Sequence[Sequence[list[int]]], parts: Iterable[_Frames]
) -> Iterator[tuple[list[int], np.ndarray, np.ndarray | None]]:
    """Each window with its frames and control input, from the new frames of each group. A control input of one frame
    stands for all."""
    indices: list[int] = []
    frames = control = None
    still = False
    for group, (new, more, beside) in zip(groups, parts, strict=True):
        kept = bisect.bisect_left(indices, group[0][0])
        if beside is not None:
            still = still or len(beside) < len(new)
            control = beside if control is None or still else np.concatenate([control[kept:], beside])
        frames = more if frames is None else np.concatenate([frames[kept:], more])
        indices = [*indices[kept:], *new]
        for window in group:
            places = np.searchsorted(indices, window)
            yield window, frames[places], control if control is None or still else control[places]


def _bad(row: dict[str, Any], error: DecodeError | StoreError) -> dict[str, Any]:
    """The row of a clip that cannot be used. StoreError, raised again: its store does not answer."""
    if isinstance(error, StoreError) and not is_of_object(error):
        raise error
    return {**row, "status": "bad", "reason": error.reason if isinstance(error, DecodeError) else error.strerror}


def _until_end(clips: Iterator[_Clip | _ShardEnd], spent: dict[str, float]) -> Iterator[_Clip]:
    """The clips of one shard; adds the seconds that it waits for them, and those of decoding."""
    while True:
        began = time.perf_counter()
        clip = next(clips)
        spent["wait"] += time.perf_counter() - began
        if isinstance(clip, _ShardEnd):
            spent["decode"] = clip.decode_s
            return
        yield clip


def _whole_clips(rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor], windows: int) -> list[dict[str, Any]]:
    """Rows without those of clips of which one window is bad, but for a row that says so; their tensors are removed."""
    bad = {row["id"] // windows: row for row in reversed(rows) if row["status"] == "bad"}
    for name in list(tensors):
        if int(name.partition(".")[0]) // windows in bad:
            del tensors[name]
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        clip = row["id"] // windows
        if clip not in bad:
            found[row["id"]] = row
        else:  # in the place of its first
            found.setdefault(clip * windows, {**bad[clip], "id": clip * windows})
    return list(found.values())


def _row(shard: int, number: int, clip: Clip) -> dict[str, Any]:
    """A clip's row of the record before it is opened."""
    sample = {"id": number, "shard": shard, "bucket": None, "text_length": 0, "cut": False, "used_frames": 0}
    stated = {"path": clip.key, "caption": clip.caption, "class": clip.class_name, "split": clip.split}
    size = {"fps": clip.fps, "frames": clip.frames, "height": clip.height, "width": clip.width}
    return {
        **clip.extra,
        **records.part_columns(clip),
        **sample,
        **stated,
        **size,
        "reason": None,
        "detail": None,
    }


def prefetch(items: Iterable[_Item], count: int) -> Generator[_Item]:
    """Iterates over `items` in a thread that stays up to `count` ahead, so that decoding overlaps with encoding."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(count)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.2)
            except queue.Full:
                continue
            return

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # handed over to the thread that waits, whatever it is
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while (found := ready.get())[0] == "item":
            yield found[1]
        if found[0] == "error":
            raise found[1]
    finally:
        stopped.set()
