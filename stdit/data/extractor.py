"""Extracting one shard: decode, crop, encode, and write the features with their record.

T, H, W pixels of the bucket · C latent channels · t, h, w latents · L tokens of a caption, D their width, P that of its pooled vector
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from stdit.config import ExtractBucket, ExtractConfig
from stdit.data import records
from stdit.data.buckets import Dropped, assign_clip
from stdit.data.control import control_state, read_control
from stdit.data.decoding import ClipInfo, DecodeError, InfoMismatch, check_info
from stdit.data.features import EMPTY_CAPTION, INDEX, digest_of, sample_digest, shard_path, unpad, write_shard
from stdit.data.manifest import Clip, file_problem
from stdit.data.object_cache import ObjectCache
from stdit.data.objects import StoreError, is_of_object
from stdit.data.probe import part_info, stated_info
from stdit.data.records import ShardResult, ShardSpec
from stdit.data.staging import local_folder, staging_of
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.data.transforms import frame_step, to_pixels, window_indices
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
    """A clip to encode: its `row` of the record and, if it is kept, bucket, pixels (3, T, H, W) and those of its control
    input, whose T may be 1."""

    row: dict[str, Any]
    bucket: ExtractBucket | None = None
    pixels: Tensor | None = None
    control: Tensor | None = None


class Extractor(Closable):
    """Encoders and a decoding subprocess, shared by all shards that a process extracts. A context manager.

    settings: of the encoders, as far as they determine features; stored in every record and compared with the plan's.
    """

    def __init__(
        self, config: ExtractConfig, video: VideoEncoder, text: TextEncoder | None, settings: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.video = video
        self.text = text
        self.settings = settings
        self.decoder = SubprocessDecoder(config.decoder, config.decode_timeout_s)
        self.cache = ObjectCache.of(config.cache)
        self.folder, self.staging = local_folder(config), staging_of(config)

    def close(self) -> None:
        """Ends the decoding subprocess."""
        self.decoder.close()

    def extract(self, spec: ShardSpec) -> ShardResult:
        """Writes a shard and its record, replacing older ones; of features at a URL, uploads them.

        OSError: no space or no permission; no partial file stays. StoreError: the URL cannot be written. ValueError: text features that are not finite.
        """
        out = self.folder
        # From here on the features are incomplete.
        if self.staging:
            self.staging.begin_shard(spec.number)
        (out / INDEX).unlink(missing_ok=True)
        records.record_path(out, spec.number).unlink(missing_ok=True)
        tensors: dict[str, Tensor] = {}
        rows = list(self._encode(prefetch(self._clips(spec), self.config.batch_size), tensors))
        rows = _whole_clips(rows, tensors, spec.windows)
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
            },
            "settings": dict(self.settings),
        }
        records.write_record(out, spec, rows, info)
        if self.staging:
            self.staging.push_shard(spec.number)
        return ShardResult(spec.number, len(spec.clips), sum(row["status"] == "bad" for row in rows))

    def _clips(self, spec: ShardSpec) -> Iterator[_Clip]:
        """The shard's clips in order, decoded and cropped. StoreError: a store that does not answer."""
        files = self.cache.ahead([clip.location for clip in spec.clips])
        for number, clip, location in zip(spec.ids, spec.clips, files, strict=True):
            row = {**_row(spec.number, number * spec.windows, clip), **records.source_state(location, self.cache)}
            if reason := file_problem(clip):
                yield _Clip({**row, "status": "bad", "reason": reason})
                continue
            try:
                with self.cache.local(location) as file:
                    yield from self._clip(clip, file, row)
            except DecodeError as error:
                yield _Clip({**row, "status": "bad", "reason": error.reason})
            except StoreError as error:
                if not is_of_object(error):
                    raise
                yield _Clip({**row, "status": "bad", "reason": error.strerror})

    def _clip(self, clip: Clip, file: Path, row: dict[str, Any]) -> Iterator[_Clip]:
        """The windows of one clip, which lies in `file`, decoded and cropped. Where file and manifest differ in length or size, the
        file is right. DecodeError."""
        stated = stated_info(clip)
        if stated is None:
            yield from self._windows(clip, file, row, part_info(clip, self.decoder.probe(file)))
            return
        if clip.is_part:  # a file that breaks off has clips, too: it is not probed
            yield from self._windows(clip, file, row, stated)
            return
        try:
            windows = self._windows(clip, file, row, stated)
            first = next(windows)
            if first.bucket is None:  # to be dropped for what the manifest says
                check_info(file, stated, self.decoder.probe(file))
        except InfoMismatch as error:
            yield from self._windows(clip, file, {**row, "detail": error.reason}, error.found)
            return
        yield first
        yield from windows

    def _windows(self, clip: Clip, file: Path, row: dict[str, Any], info: ClipInfo) -> Iterator[_Clip]:
        """The windows of one clip of length and size `info`, some at a time. DecodeError; at the first, InfoMismatch: the file has
        others."""
        config = self.config
        step = frame_step(info.fps, config.frame_stride, config.target_fps)
        size = {"frames": info.frame_count, "height": info.height, "width": info.width}
        row = {**row, **size, "fps": info.fps / step}
        bucket = assign_clip(info, config, clip.id)
        if isinstance(bucket, Dropped):
            yield _Clip({**row, "status": "dropped", "reason": bucket.reason, "detail": bucket.detail})
            return
        every = (1, 1) if config.windows is None else (config.windows.stride, config.windows.max)
        windows = window_indices(info.frame_count, bucket.frames, step, config.clip_window, every)
        used = len({index for window in windows for index in window})
        row = {**row, "status": "kept", "bucket": bucket.key, "used_frames": used}
        number = row["id"]
        for group in grouped(windows, READ_BYTES // (3 * bucket.height * bucket.width)):
            for window, pixels, control in self._read(clip, file, info, bucket, group):
                start = (clip.start_frame or 0) + window[0]
                part = {"start_frame": start, "end_frame": start + window[-1] - window[0] + 1} if config.windows else {}
                yield _Clip({**row, "id": number, **part}, bucket, pixels, control)
                number += 1

    def _read(
        self, clip: Clip, file: Path, info: ClipInfo, bucket: ExtractBucket, windows: Sequence[list[int]]
    ) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """Pixels and control input of `windows`, whose frames are decoded together. DecodeError."""
        indices = sorted({index for window in windows for index in window})  # none is decoded twice
        shape, control, first = (bucket.height, bucket.width), None, clip.start_frame or 0
        if clip.is_part:
            frames = self.decoder.read_part(file, [first + index for index in indices], shape, clip.crop)
        else:
            frames = self.decoder.read(file, indices, shape, info)
        if column := self.config.control_column:
            control = read_control(self.decoder, clip, column, info, indices, bucket, self.cache)
        for window in windows:
            places = np.searchsorted(indices, window)
            # One frame of control stands for all.
            beside = None if control is None else control[places] if len(control) == len(indices) else control
            pixels = torch.from_numpy(to_pixels(frames[places]))
            yield window, pixels, None if beside is None else torch.from_numpy(to_pixels(beside))

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
        """Adds latents of clips of one bucket, in the encoder's precision. A clip whose latents are not finite is bad."""
        mean, std = self.video.encode(torch.stack([clip.pixels for clip in group if clip.pixels is not None]))
        for i, clip in enumerate(group):
            # One at a time: control inputs have one frame, or as many as the clip.
            control = None if clip.control is None else self.video.encode(clip.control[None])[0][0]
            clip.pixels = clip.control = None
            latents = [tensor for tensor in (mean[i], None if std is None else std[i], control) if tensor is not None]
            if not all(tensor.isfinite().all() for tensor in latents):
                reason = f"its latents are not finite in {self.video.identity['dtype']} (video_encoder.dtype)"
                clip.row |= {"status": "bad", "reason": reason, "bucket": None}
                continue
            tensors[f"{clip.row['id']}.mean"] = mean[i].to("cpu", self.video.dtype)
            if control is not None:
                tensors[f"{clip.row['id']}.control"] = control.to("cpu", self.video.dtype)
            if std is not None:
                tensors[f"{clip.row['id']}.std"] = std[i].to("cpu", self.video.dtype)

    def _add_text(self, rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> str | None:
        """Adds text features of the rows' captions, further ones and the empty caption, unpadded; each distinct caption is encoded once.

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


def prefetch(items: Iterable[_Item], count: int) -> Iterator[_Item]:
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
