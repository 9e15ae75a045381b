"""One part of an extraction: its clips decoded, cropped, encoded and written as one shard with its record.

T, H, W pixels of the bucket · C latent channels · t, h, w latents · L tokens of a caption, D their width, P that of its pooled vector
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from stdit.config import ExtractBucket, ExtractConfig
from stdit.data import records
from stdit.data.buckets import Dropped, assign
from stdit.data.control import control_state, read_control
from stdit.data.decoding import ClipInfo, DecodeError
from stdit.data.features import EMPTY_CAPTION, INDEX, digest_of, packed, shard_path, write_shard
from stdit.data.manifest import Clip, problem
from stdit.data.records import Outcome, Part
from stdit.data.subprocess_decoder import SubprocessDecoder
from stdit.data.transforms import frame_indices, frames_available, to_pixels

_Item = TypeVar("_Item")


class Video(Protocol):
    """What is asked of an autoencoder (stdit.encoders.video)."""

    identity: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Pixels (B, 3, T, H, W) in [-1, 1] -> mean and std (or None), (B, C, t, h, w)."""
        ...


class Text(Protocol):
    """What is asked of a text encoder (stdit.encoders.text)."""

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
    """What a text encoder gives."""

    @property
    def features(self) -> Tensor: ...

    @property
    def mask(self) -> Tensor: ...

    @property
    def pooled(self) -> Tensor | None: ...


@dataclass
class _Clip:
    """A clip on its way: `row` for the record; where it is kept, bucket and pixels (3, T, H, W), and its condition's, of
    which T may be 1."""

    row: dict[str, Any]
    bucket: ExtractBucket | None = None
    pixels: Tensor | None = None
    control: Tensor | None = None


class Extractor:
    """What a process needs to extract parts, made once: encoders, and a decoder that can be killed. A context manager.

    `settings`: what of the encoders decides features; it goes into every record, to be compared with the plan's.
    """

    def __init__(self, config: ExtractConfig, video: Video, text: Text | None, settings: Mapping[str, Any]) -> None:
        self.config = config
        self.video = video
        self.text = text
        self.settings = settings
        self.decoder = SubprocessDecoder(config.decoder, config.decode_timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.decoder.close()

    def extract(self, part: Part) -> Outcome:
        """Makes a part's shard and record, replacing older ones.

        OSError: no space or no permission; nothing half-written stays. ValueError: text features that are not finite.
        """
        out = self.config.out
        # From here on the folder's features are not whole.
        (out / INDEX).unlink(missing_ok=True)
        records.record_path(out, part.number).unlink(missing_ok=True)
        tensors: dict[str, Tensor] = {}
        rows = list(self._encoded(ahead(self._clips(part), self.config.batch_size), tensors))
        empty = self._add_text([row for row in rows if row["status"] == "kept"], tensors)
        shard = shard_path(out, part.number)
        shard_bytes = 0
        if tensors:
            shard_bytes = write_shard(shard, tensors)
        else:
            shard.unlink(missing_ok=True)
        video, text = self.video.identity, self.text.identity if self.text else None
        told = {
            "encoders": json.dumps({"video_encoder": video, "text_encoder": text}),
            "settings": json.dumps(self.settings),
            "posterior": json.dumps(any(name.endswith(".std") for name in tensors)),
            **({"empty_caption": empty} if empty else {}),
        }
        if column := self.config.control_column:
            told["controls"] = json.dumps([control_state(clip, column) for clip in part.clips])
        records.write_record(out, part, rows, shard_bytes, told)
        return Outcome(part.number, len(rows), sum(row["status"] == "bad" for row in rows))

    def _clips(self, part: Part) -> Iterator[_Clip]:
        """The part's clips in order, decoded and cropped."""
        config = self.config
        for number, clip in zip(part.ids, part.clips, strict=True):
            row = _row(part.number, number, clip)
            if reason := problem(clip):
                yield _Clip({**row, "status": "bad", "reason": reason})
                continue
            try:
                info = _stated(clip) or self.decoder.probe(clip.file)
                size = {"frames": info.frame_count, "height": info.height, "width": info.width}
                row |= {**size, "fps": info.fps / config.frame_stride}
                bucket = assign(
                    frames_available(info.frame_count, config.frame_stride), info.height, info.width, config.buckets,
                    key=clip.key, min_area_ratio=config.min_area_ratio, seed=config.seed,
                )  # fmt: skip
                if isinstance(bucket, Dropped):
                    yield _Clip({**row, "status": "dropped", "reason": bucket.reason, "detail": bucket.detail})
                    continue
                indices = frame_indices(info.frame_count, bucket.frames, config.frame_stride, config.clip_window)
                frames, control = self.decoder.read(clip.file, indices, (bucket.height, bucket.width)), None
                if column := config.control_column:
                    read = read_control(self.decoder, clip, column, info, indices, bucket)
                    control = torch.from_numpy(to_pixels(read))
            except DecodeError as error:
                yield _Clip({**row, "status": "bad", "reason": error.reason})
                continue
            row |= {"status": "kept", "bucket": bucket.key}
            yield _Clip(row, bucket, torch.from_numpy(to_pixels(frames)), control)

    def _encoded(self, clips: Iterable[_Clip], tensors: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
        """The rows of `clips`; their latents go into `tensors`, encoded in batches of one bucket."""
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
        """Latents of clips of one bucket, in the encoder's own precision. Those that are not finite make a bad clip."""
        mean, std = self.video.encode(torch.stack([clip.pixels for clip in group if clip.pixels is not None]))
        for i, clip in enumerate(group):
            # By themselves: some have one frame, some as many as their clip.
            control = None if clip.control is None else self.video.encode(clip.control[None])[0][0]
            clip.pixels = clip.control = None
            made = [tensor for tensor in (mean[i], None if std is None else std[i], control) if tensor is not None]
            if not all(tensor.isfinite().all() for tensor in made):
                reason = f"its latents are not finite in {self.video.identity['dtype']} (video_encoder.dtype)"
                clip.row |= {"status": "bad", "reason": reason, "bucket": None}
                continue
            tensors[f"{clip.row['id']}.mean"] = mean[i].to("cpu", self.video.dtype)
            if control is not None:
                tensors[f"{clip.row['id']}.control"] = control.to("cpu", self.video.dtype)
            if std is not None:
                tensors[f"{clip.row['id']}.std"] = std[i].to("cpu", self.video.dtype)

    def _add_text(self, rows: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> str | None:
        """Features of the rows' captions without padding, each different caption encoded once, and of the empty one.

        Returns the SHA-256 of the empty caption's; None where there is nothing to add.
        """
        if self.text is None or not rows:
            return None
        # Captions of a length side by side: little padding.
        captions = sorted({"", *(row["caption"] for row in rows)}, key=lambda caption: (len(caption), caption))
        found: dict[str, dict[str, Tensor]] = {}
        for start in range(0, len(captions), self.config.batch_size):
            batch = captions[start : start + self.config.batch_size]
            found.update(zip(batch, self._texts(batch), strict=True))
        cut = dict(zip(captions, self.text.cuts(captions), strict=True))
        named = [(f"{row['id']}", row["caption"]) for row in rows] + [(EMPTY_CAPTION, "")]
        for name, caption in named:
            # safetensors refuses memory that two names share
            tensors |= {f"{name}.{kind}": tensor.clone() for kind, tensor in found[caption].items()}
        for row in rows:
            row |= {"text_length": len(found[row["caption"]]["text"]), "cut": cut[row["caption"]] is not None}
        return digest_of(found[""])

    def _texts(self, captions: list[str]) -> Iterator[dict[str, Tensor]]:
        """text (L, D), and pooled (P,) where the encoder makes it, of each caption, in the encoder's own precision.

        ValueError: features that are not finite.
        """
        assert self.text is not None
        made, dtype = self.text.encode(captions), self.text.dtype
        pooled = made.pooled
        if not (made.features.isfinite().all() and (pooled is None or pooled.isfinite().all())):
            raise ValueError(
                f"text features are not finite in {self.text.identity['dtype']}: "
                "set text_encoder.dtype to float32 or bfloat16"
            )
        for i, text in enumerate(packed(made.features.to("cpu", dtype), made.mask.cpu())):
            yield {"text": text, **({} if pooled is None else {"pooled": pooled[i].to("cpu", dtype)})}


def _row(shard: int, number: int, clip: Clip) -> dict[str, Any]:
    """What is known of a clip before it is opened."""
    own = {"id": number, "shard": shard, "bucket": None, "text_length": 0, "cut": False}
    said = {"path": clip.key, "caption": clip.caption, "class": clip.class_name, "split": clip.split}
    size = {"fps": clip.fps, "frames": clip.frames, "height": clip.height, "width": clip.width}
    return {**clip.extra, **own, **said, **size, "reason": None, "detail": None, **records.state(clip.file)}


def _stated(clip: Clip) -> ClipInfo | None:
    """What the manifest says, if it says all; then the file is opened once and not twice."""
    fps = 0.0 if clip.frames == 1 else clip.fps
    if clip.frames is None or fps is None or clip.height is None or clip.width is None:
        return None
    return ClipInfo(clip.frames, fps, clip.height, clip.width)


def ahead(items: Iterable[_Item], count: int) -> Iterator[_Item]:
    """`items`, made by a thread that keeps up to `count` ready, so that decoding and encoding go on side by side."""
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

    thread = threading.Thread(target=work, name="decode-ahead", daemon=True)
    thread.start()
    try:
        while (found := ready.get())[0] == "item":
            yield found[1]
        if found[0] == "error":
            raise found[1]
    finally:
        stopped.set()
