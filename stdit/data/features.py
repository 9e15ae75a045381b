"""Feature shards: written by extraction, read by training (layout: docs/data.md).

    out/index.json             encoders, buckets, classes, settings: written last, marks the features as complete
        samples.parquet        a row per sample: id, shard, bucket, caption, class, split, source size, extra columns
        shards/00000.safetensors   "7.mean" (C, t, h, w), "7.std" of a posterior, "7.text" (L, D),
                                   "7.pooled" (P,) with pooled vectors, "empty.text" and "empty.pooled",
                                   "7.control" (C, t or 1, h, w) with control inputs,
                                   "7.vision" (D, t, h', w') with a vision encoder
        report.json            counts, and the clips that were dropped or bad

Shards are memory-mapped and nothing is pickled. Text features are unpadded. Latents are raw: their statistics are in
the autoencoder's identity, in the index.

The index has the SHA-256 of itself and of samples.parquet, which has a digest of every sample's tensors: a sample is
compared with it when a process first reads it, before it is trained on.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import torch
from pydantic import Field, field_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stdit.config import (
    Bucket,
    CacheConfig,
    ConfigError,
    FileSchema,
    NonNegative,
    Positive,
    SealedSchema,
    Sha256,
    Url,
    Where,
    latent_shape,
    parse_location,
)
from stdit.config.identity import FrameSampling, TextIdentity, VideoIdentity, VisionIdentity
from stdit.data.filters import passing
from stdit.data.object_cache import ObjectCache, ReadAhead
from stdit.data.objects import (
    ChangedObject,
    Digest,
    NoAccess,
    NoSuchBucket,
    NoSuchObject,
    StoreError,
    is_of_object,
    read_json,
    stat,
)
from stdit.files import atomic_path, sha256

Folder = TypeVar("Folder", bound=Path | Url)
_Result = TypeVar("_Result")

FORMAT: Literal[2] = 2
# Takes the place of a sample's id for the features of the empty caption, in every shard with text.
EMPTY_CAPTION = "empty"
# The caption of column `caption`, among several of a clip.
ORIGINAL = "original"
INDEX, SAMPLES, REPORT = "index.json", "samples.parquet", "report.json"
# Columns of samples.parquet besides the manifest's; a manifest may not have extra columns of these names.
SAMPLE_COLUMNS = {
    "id": pa.int64(),
    "shard": pa.int32(),
    "bucket": pa.string(),
    "class_label": pa.int32(),
    "text_length": pa.int32(),
    # Of the sample's tensors: `sample_digest`.
    "tensors_digest": pa.int64(),
}
MANIFEST_COLUMNS = {
    "path": pa.string(), "caption": pa.string(), "class": pa.string(), "split": pa.string(),
    "fps": pa.float32(), "frames": pa.int32(), "height": pa.int32(), "width": pa.int32(),
}  # fmt: skip
# Shards open at a time per process: each has a memory map and a header of some 100 KB.
OPEN_SHARDS = 64
# Ends messages about damage.
REMEDY = "run the extraction again, which mends it"


class EmptyCaptionPlace(FileSchema):
    """Where the empty caption's features are read, and their `digest_of`."""

    shard: NonNegative
    sha256: Sha256


class ManifestFingerprint(FileSchema):
    path: str
    sha256: str


class ShardEntry(FileSchema):
    bytes: NonNegative
    sha256: Sha256


class FeatureIndex(SealedSchema):
    """index.json."""

    format: int
    fingerprint: Sha256
    samples: Positive
    samples_sha256: Sha256
    shards: dict[Annotated[str, Field(pattern=r"^\d+$")], ShardEntry]
    buckets: dict[Annotated[str, Field(pattern=r"^[1-9]\d{0,6}(x[1-9]\d{0,6}){2}$")], dict[str, NonNegative]]
    classes: tuple[str, ...]
    posterior: bool
    video_encoder: VideoIdentity
    text_encoder: TextIdentity | None
    vision_encoder: VisionIdentity | None = None
    empty_caption: EmptyCaptionPlace | None
    manifest: ManifestFingerprint
    config: dict[str, Any]

    @field_validator("format")
    @classmethod
    def _check_format(cls, value: int) -> int:
        if value != FORMAT:
            raise ValueError(f"{value}, this version reads {FORMAT}")
        return value


def shard_path(out: Folder, number: int) -> Folder:
    """Path or URL of shard `number`."""
    return cast(Folder, out / "shards" / f"{number:05d}.safetensors")


def samples_schema(extra: Mapping[str, pa.DataType]) -> pa.Schema:
    """Columns of samples.parquet; extra: the manifest's extra columns."""
    return pa.schema({**SAMPLE_COLUMNS, **MANIFEST_COLUMNS, **extra})


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Writes a shard atomically; returns its size in bytes. OSError: no space, no permission."""
    try:
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    return path.stat().st_size


@dataclass(frozen=True)
class Sample:
    """One clip's features. `height`, `width` (px) and `fps` are the source's; fps is 0 for a still image."""

    id: int
    mean: Tensor  # (C, t, h, w) float32, raw: not normalised
    std: Tensor | None  # same shape, if the autoencoder has a posterior
    text: Tensor | None  # (L, D) float32, L tokens of the caption
    class_label: int  # -1: none
    fps: float
    height: int
    width: int
    caption: str
    control: Tensor | None = None  # (C, t or 1, h, w) float32, raw: latents of the control input
    pooled: Tensor | None = None  # (P,) float32, the pooled vector of the caption
    path: str = ""  # source file, as the manifest names it
    vision: Tensor | None = None  # (D, t, h', w') float32, features of a vision encoder, if they are read


@dataclass(frozen=True)
class EmptyCaption:
    """Text features of the empty caption: the null caption of models with `null_text: empty`."""

    text: Tensor  # (L, D) float32
    pooled: Tensor | None = None  # (P,)


@dataclass(frozen=True)
class FeatureFacts:
    """What a training config can take from its features instead of stating it. None: the features have no such thing.

    Named as the config's keys where there is one: `in_channels`, `text_dim`, `max_text_tokens`, `pooled_dim`,
    `num_classes`, `features_dim`.
    """

    in_channels: int  # channels of the latents
    text_dim: int | None  # width of a caption token's features
    max_text_tokens: int | None  # tokens of the longest caption that the text encoder keeps
    pooled_dim: int | None  # width of the pooled caption vector
    num_classes: int | None
    latents: Mapping[str, tuple[int, int, int]]  # latent (T, H, W) by bucket key, in the extraction's order
    fps: float | None  # most common frame rate of clips of more than one frame, after `frame_stride`
    features_dim: int | None = None  # width of a vision encoder's features

    @property
    def smallest_latent(self) -> tuple[int, int, int]:
        """Latent (T, H, W) of the bucket with the fewest latents: the usual base of a resolution-dependent flow
        shift."""
        return min(self.latents.values(), key=lambda shape: (math.prod(shape), shape))


def feature_facts(
    video: Mapping[str, Any],
    text: Mapping[str, Any] | None,
    buckets: Iterable[Bucket],
    classes: int = 0,
    frame_rates: Iterable[float] = (),
    vision: Mapping[str, Any] | None = None,
) -> FeatureFacts:
    """FeatureFacts from the encoders' identities. frame_rates: of the clips; 0 for stills, which are not counted.

    ConfigError: a bucket that the autoencoder's compression does not divide.
    """
    t, h, w = video["compression"]
    rates = Counter(round(float(rate), 3) for rate in frame_rates if rate > 0)
    return FeatureFacts(
        in_channels=video["channels"],
        text_dim=text["dim"] if text else None,
        max_text_tokens=text["max_text_tokens"] if text else None,
        pooled_dim=text.get("pooled_dim") if text else None,
        num_classes=classes or None,
        latents={bucket.key: latent_shape(bucket, (t, h, w)) for bucket in buckets},
        # Of equally common rates the lower one.
        fps=min(rates, key=lambda rate: (-rates[rate], rate)) if rates else None,
        features_dim=vision["dim"] if vision else None,
    )


class FeatureSet:
    """The features in a folder, or at a URL, whose shards are fetched into `cache`. Cheap to open, to pickle (by its
    path) and, of a folder, to fork; thread-safe. vision: samples have the features of the vision encoder too, which are
    larger than the latents.

    Raises ConfigError: no such folder, no access to it, an incomplete extraction, or files of another format. OSError,
    here and where samples are read: a store out of reach, a cache that cannot be written.
    """

    def __init__(
        self,
        path: Path | str,
        cache: CacheConfig = CacheConfig(),  # noqa: B008 (immutable)
        vision: bool = False,
    ) -> None:
        self.path = parse_location(path) if isinstance(path, str) else path
        self.index = read_index(self.path)
        self._config, self.cache = cache, ObjectCache.of(cache)
        self._reads_vision = vision and self.vision_encoder is not None
        self.rows = _read_samples(self.path, self.index, self.cache)
        self.ids: np.ndarray = self.rows["id"].to_numpy()
        self._columns = {
            name: self.rows[name].to_numpy()
            for name in ("shard", "class_label", "fps", "height", "width", "text_length", "tensors_digest")
        }
        self._shapes = {
            key: (self.video_encoder["channels"], *latent_shape(Bucket.parse(key), self.video_encoder["compression"]))
            for key in self.index["buckets"]
        }
        # Samples whose tensors this process has compared with their digests.
        self._verified = np.zeros(len(self.ids), bool)
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[type[FeatureSet], tuple[Path | Url, CacheConfig, bool]]:
        return FeatureSet, (self.path, self._config, self._reads_vision)

    @property
    def classes(self) -> list[str]:
        """Class names; `class_label` counts in this order."""
        return self.index["classes"]

    @property
    def video_encoder(self) -> dict[str, Any]:
        """The autoencoder's identity (stdit.encoders.video)."""
        return self.index["video_encoder"]

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """The text encoder's identity (stdit.encoders.text), or None where no text was extracted."""
        return self.index["text_encoder"]

    @property
    def vision_encoder(self) -> dict[str, Any] | None:
        """The vision encoder's identity (stdit.encoders.vision), or None."""
        return self.index.get("vision_encoder")

    @property
    def has_pooled(self) -> bool:
        """Whether every caption has a pooled vector."""
        return bool((self.text_encoder or {}).get("pooled_dim"))

    def facts(self) -> FeatureFacts:
        """What a training config can take from these features: channels, text width and length, classes, latent shapes,
        fps."""
        buckets = [Bucket.parse(key) for key in self.index["buckets"]]
        return feature_facts(
            self.video_encoder,
            self.text_encoder,
            buckets,
            len(self.classes),
            self._columns["fps"].tolist(),
            self.vision_encoder,
        )

    @property
    def empty_caption(self) -> EmptyCaption | None:
        """The empty caption's features; None where no text was extracted. ConfigError: missing or damaged."""
        place = self.index["empty_caption"]
        return None if place is None else self._mended(place["shard"], lambda: self._read_empty_caption(place))

    def _read_empty_caption(self, place: Mapping[str, Any]) -> EmptyCaption:
        path = shard_path(self.path, place["shard"])
        names = ("text", "pooled") if self.has_pooled else ("text",)
        try:
            shard = self._shard(place["shard"])
            with self._lock:
                found = {name: shard.get_tensor(f"{EMPTY_CAPTION}.{name}").clone() for name in names}
        except SafetensorError as error:
            raise ConfigError(f"{path}: the empty caption cannot be read ({error})") from error
        if (digest := digest_of(found)) != place["sha256"]:
            raise ConfigError(
                f"{path}: the empty caption is not what was written (sha256 {digest[:12]}…, {INDEX} says {place['sha256'][:12]}…); {REMEDY}"
            )
        return EmptyCaption(**{name: tensor.float() for name, tensor in found.items()})

    @property
    def frame_sampling(self) -> FrameSampling:
        """Which frames of a clip were taken."""
        return FrameSampling.of(self.index["config"])

    @property
    def has_control(self) -> bool:
        """Whether every clip has latents of a control input."""
        return bool(self.index["config"].get("control_column"))

    def select(
        self, split: str | None, buckets: Sequence[Bucket], where: Sequence[Where] = ()
    ) -> dict[str, np.ndarray]:
        """Ids (ascending) by bucket key of the samples of a split (None: all) that pass every condition.

        ConfigError: a bucket that was not extracted, a column that is not there, text compared with a number.
        """
        extracted = self.index["buckets"]
        if absent := [bucket.key for bucket in buckets if bucket.key not in extracted]:
            raise ConfigError(
                f"{self.path}: buckets {', '.join(absent)} were not extracted; there are {', '.join(extracted)}"
            )
        keep = np.ones(len(self), bool)
        if split is not None:
            keep &= self.rows["split"].to_numpy() == split
        found = self.rows["bucket"].to_numpy()
        keep &= np.isin(found.astype(str), [bucket.key for bucket in buckets])
        if where:
            keep[keep] = self._meets(where, keep)
        return {bucket.key: self.ids[keep & (found == bucket.key)] for bucket in buckets}

    def _meets(self, where: Sequence[Where], among: np.ndarray) -> np.ndarray:
        """Which of the rows `among` (a mask) meet all conditions."""
        rows = self.rows.filter(pa.array(among))

        def values(column: str) -> list[Any]:
            if column == "duration" and column not in rows.column_names:
                return [Bucket.parse(key).frames for key in rows["bucket"].to_pylist()]
            if column not in rows.column_names:
                raise ConfigError(f"{self.path}: where: no column {column!r}; columns: {', '.join(rows.column_names)}")
            return rows[column].to_pylist()

        try:
            return np.array(passing(len(rows), values, where), bool)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"{self.path}: where: {error}") from error

    @property
    def captions(self) -> tuple[str, ...]:
        """Names of the captions that clips may have: original, and the extraction's further ones."""
        return (ORIGINAL, *self.index["config"].get("captions", ()))

    def captions_of(self, id: int) -> tuple[str, ...]:
        """The captions that sample `id` has features of."""
        return self._captions(self._row(id))

    def _captions(self, row: int) -> tuple[str, ...]:
        further = [name for name in self.captions[1:] if self.rows[f"caption_{name}"][row].as_py()]
        return (ORIGINAL, *further)

    def _row(self, id: int) -> int:
        row = int(np.searchsorted(self.ids, id))
        if row == len(self) or self.ids[row] != id:
            raise KeyError(f"{self.path} has no sample {id}")
        return row

    def sample(self, id: int, caption: str = ORIGINAL) -> Sample:
        """The features of sample `id` with one of its captions. KeyError: no such id or caption. ConfigError: its shard
        is gone or damaged."""
        row = self._row(id)
        suffix = "" if caption == ORIGINAL else f".{caption}"
        if suffix and caption not in self._captions(row):
            raise KeyError(f"{self.path}: sample {id} has no caption {caption!r}")
        tensors = {kind: _copy(tensor) for kind, tensor in self._read(id, row, suffix).items()}
        return Sample(
            id=int(id),
            mean=tensors["mean"],
            std=tensors.get("std"),
            text=tensors.get(f"text{suffix}"),
            class_label=int(self._columns["class_label"][row]),
            fps=float(self._columns["fps"][row]),
            height=int(self._columns["height"][row]),
            width=int(self._columns["width"][row]),
            caption=self.rows[f"caption_{caption}" if suffix else "caption"][row].as_py(),
            control=tensors.get("control"),
            pooled=tensors.get(f"pooled{suffix}"),
            path=self.rows["path"][row].as_py(),
            vision=tensors.get("vision"),
        )

    def frame_rates(self, ids: np.ndarray) -> dict[str, int]:
        """Frame rates (to a thousandth) of the videos among `ids`, the most common first, with their counts."""
        rates = Counter(round(float(rate), 3) for rate in self._columns["fps"][np.searchsorted(self.ids, ids)] if rate)
        return {f"{rate:.6g}": count for rate, count in sorted(rates.items(), key=lambda item: (-item[1], item[0]))}

    def _read(self, id: int, row: int, suffix: str) -> dict[str, Tensor]:
        """As `_read_once`; a shard that was damaged in the cache is fetched again."""
        return self._mended(int(self._columns["shard"][row]), lambda: self._read_once(id, row, suffix))

    def _mended(self, number: int, read: Callable[[], _Result]) -> _Result:
        """`read()`, of shard `number`. Where it finds damage in the cache, it is called once more with the shard
        fetched again."""
        try:
            return read()
        except ConfigError as error:
            if isinstance(self.path, Path) or isinstance(error.__cause__, StoreError):
                raise
        self._discard(number)  # unless another rank, which found the same, has done so and is fetching it
        return read()

    def _read_once(self, id: int, row: int, suffix: str) -> dict[str, Tensor]:
        """The tensors of a sample with one caption, by kind, as the shard's memory. The first time all are read, and
        compared with their digest. ConfigError: gone, or not what was written."""
        number = int(self._columns["shard"][row])
        parts = {
            "mean": True,
            "std": self.index["posterior"],
            "control": self.has_control,
            "vision": self._reads_vision,
        }
        texts = [
            kind for kind, stored in (("text", self.text_encoder is not None), ("pooled", self.has_pooled)) if stored
        ]
        wanted = [kind for kind, stored in parts.items() if stored] + [f"{kind}{suffix}" for kind in texts]
        verified = self._verified[row]
        others = () if verified else ("", *(f".{name}" for name in self._captions(row)[1:]))
        kinds = dict.fromkeys([*wanted, *(f"{kind}{other}" for other in others for kind in texts)])
        if self.vision_encoder is not None and not verified:
            kinds["vision"] = None
        shard = self._shard(number)
        with self._lock:
            try:
                found = {kind: shard.get_tensor(f"{id}.{kind}") for kind in kinds}
            except SafetensorError as error:
                raise ConfigError(
                    f"{shard_path(self.path, number)}: sample {id} cannot be read ({error}); {REMEDY}"
                ) from error
        if verified:
            return found
        where = f"{shard_path(self.path, number)}: sample {id}"
        expected = self._shapes[self.rows["bucket"][row].as_py()]
        if tuple(found["mean"].shape) != expected:
            raise ConfigError(
                f"{where}: latents of shape {tuple(found['mean'].shape)}, its bucket has {expected}; {REMEDY}"
            )
        if sample_digest(found) != self._columns["tensors_digest"][row]:
            raise ConfigError(f"{where} is not what was written (its digest is not that in {SAMPLES}); {REMEDY}")
        self._verified[row] = True
        return {kind: found[kind] for kind in wanted}

    def text_lengths(self, ids: np.ndarray) -> np.ndarray:
        """Tokens of each caption of `ids`; reads no shard."""
        return self._columns["text_length"][np.searchsorted(self.ids, ids)]

    def _shard(self, number: int) -> Any:
        """The memory-mapped shard; closes the least recently used one when too many are open."""
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
        path = shard_path(self.path, number)
        try:
            with self.cache.local(path, self._digest(number)) as file:
                shard = safe_open(file, framework="pt")
        except StoreError as error:
            raise _unreadable(error) from error
        except (SafetensorError, OSError) as error:
            if isinstance(path, Url) and isinstance(error, OSError):  # of the cache's disk
                raise
            raise ConfigError(f"{path}: damaged or gone ({error}); {REMEDY}") from error
        with self._lock:
            self._open[number] = shard
            if isinstance(path, Url):  # the disk space of removed files is free once they are closed
                for other in [n for n in self._open if n != number and not self._cached(n).exists()]:
                    del self._open[other]
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        return shard

    def _digest(self, number: int) -> Digest:
        entry = self.index["shards"].get(str(number))
        if entry is None:
            raise ConfigError(f"{self.path / INDEX}: lists no shard {number}; {REMEDY}")
        return Digest(entry["bytes"], entry["sha256"])

    def _cached(self, number: int) -> Path:
        """Where the cache of features at a URL keeps a shard."""
        assert isinstance(self.path, Url)
        return self.cache.path(shard_path(self.path, number), self._digest(number))

    def _discard(self, number: int) -> None:
        """Removes a shard's copy from the cache if it is there."""
        with self._lock:
            self._open.pop(number, None)
        self._cached(number).unlink(missing_ok=True)

    def shard_objects(self, ids: Sequence[int]) -> list[tuple[Url, Digest]]:
        """The objects that samples are read from; none of a folder."""
        if isinstance(self.path, Path):
            return []
        numbers = dict.fromkeys(self._columns["shard"][np.searchsorted(self.ids, ids)].tolist())
        return [(shard_path(self.path, n), self._digest(n)) for n in numbers]

    def read_ahead(self) -> ShardReadAhead | None:
        """Fetches shards ahead of their use, of features at a URL; None for a folder."""
        return ShardReadAhead(self.shard_objects, ReadAhead(self.cache)) if isinstance(self.path, Url) else None


class ShardReadAhead:
    """Fetches the shards of announced samples; see ReadAhead. shards: the objects that samples are read from."""

    def __init__(self, shards: Callable[[Sequence[int]], list[tuple[Url, Digest]]], ahead: ReadAhead) -> None:
        self._shards, self._ahead = shards, ahead

    @property
    def is_full(self) -> bool:
        return self._ahead.is_full

    def announce(self, ids: Sequence[int]) -> None:
        for url, digest in self._shards(ids):
            self._ahead.announce(url, digest)

    def release(self, ids: Sequence[int]) -> None:
        for url, _ in self._shards(ids):
            self._ahead.release(url)

    def close(self) -> None:
        self._ahead.close()


def read_index(path: Path | Url) -> dict[str, Any]:
    """index.json of the features in `path`. ConfigError: not there, damaged or edited, or of another format."""
    file = path / INDEX
    missing = None
    try:
        if isinstance(file, Path) and not file.exists():
            missing = f"no {INDEX}: the extraction into it has not ended" if file.parent.is_dir() else "no such folder"
        else:
            return read_json(file, FeatureIndex)
    except NoSuchObject:
        missing = f"no {INDEX}: nothing was extracted there, or the extraction has not ended"
    except StoreError as error:
        if isinstance(error, NoAccess | NoSuchBucket):  # nothing has begun: credentials or the URL are wrong
            raise ConfigError(str(error)) from error
        raise _unreadable(error) from error
    except ConfigError as error:
        raise ConfigError(f"{error}; {REMEDY}") from error
    raise ConfigError(f"{path}: {missing} (python -m pipelines.extract_features --config … makes or completes it)")


def is_extracted(path: Path | Url) -> bool:
    """Whether features are there, complete. StoreError."""
    if isinstance(path, Path):
        return (path / INDEX).is_file()
    try:
        stat(path / INDEX)
    except NoSuchObject:
        return False
    return True


def _read_samples(path: Path | Url, index: Mapping[str, Any], cache: ObjectCache) -> pa.Table:
    """samples.parquet; a copy that was damaged in the cache is fetched again. ConfigError: gone, or not what was
    written. OSError: a store out of reach, a cache that cannot be written."""
    file = path / SAMPLES
    try:
        for _ in range(2 if isinstance(file, Url) else 1):
            with cache.local(file) as local:
                if sha256(local) == index["samples_sha256"]:
                    return parquet.read_table(local, memory_map=True)
                if isinstance(file, Url):
                    local.unlink(missing_ok=True)
    except StoreError as error:
        raise _unreadable(error) from error
    except (OSError, pa.ArrowException) as error:
        if isinstance(file, Url) and isinstance(error, OSError):  # of the cache's disk
            raise
        raise ConfigError(f"{file}: cannot be read ({error}); {REMEDY}") from error
    raise ConfigError(f"{file}: is not what was written (its sha256 is not that in {INDEX}); {REMEDY}")


def _unreadable(error: StoreError) -> Exception:
    """What an object's error says of the features: a ConfigError of what is missing or damaged; else the error itself,
    which a run may outlive: nothing is wrong with the features."""
    if not is_of_object(error):
        return error
    return ConfigError(f"{error}" + (f"; {REMEDY}" if isinstance(error, ChangedObject | NoSuchObject) else ""))


def _copy(tensor: Tensor) -> Tensor:
    """A float32 copy: the shard's own memory is shared by all reads."""
    return tensor.to(torch.float32, copy=True)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def sample_digest(tensors: Mapping[str, Tensor]) -> int:
    """First 8 bytes of the SHA-256 of a sample's tensors by kind (mean, std, text, …), as a signed integer."""
    return int.from_bytes(bytes.fromhex(digest_of(tensors)[:16]), "big", signed=True)


def unpad(features: Tensor, mask: Tensor) -> list[Tensor]:
    """Padded text features (B, L, D) with mask (B, L) -> one unpadded (L_i, D) per caption."""
    return [row[keep].clone() for row, keep in zip(features, mask, strict=True)]


def pad_texts(texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Inverse of `unpad`: features (B, L, D), zero-padded to the longest, and mask (B, L) bool."""
    mask = torch.arange(max(map(len, texts))) < torch.tensor([len(text) for text in texts])[:, None]
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), mask
