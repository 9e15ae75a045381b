"""The data that training draws from: features, conditions on their columns, and the cache of those at a URL."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from stdit.config.base import MAX_THREADS, Frozen, Positive
from stdit.config.buckets import TrainBucket, unique_buckets
from stdit.config.location import Location, Url


class Where(Frozen):
    """A filter on one column of the manifest. A missing value passes no filter."""

    column: str
    """Name of the column."""
    at_least: float | None = None
    """Smallest value that passes."""
    at_most: float | None = None
    """Largest value that passes."""
    one_of: tuple[str | int | float, ...] | None = None
    """Values that pass."""
    top: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the clips, those with the largest values, that pass: of the clips that pass all other filters."""
    per: str | None = None
    """Column whose groups each give their `top` share, such as class; `duration`: the clip's seconds, rounded, in a
    curation; in training the frames of its bucket."""

    @model_validator(mode="after")
    def _check_any(self) -> Where:
        if self.at_least is None and self.at_most is None and self.one_of is None and self.top is None:
            raise ValueError(f"the condition on column {self.column!r} states none of at_least, at_most, one_of, top")
        if self.per is not None and self.top is None:
            raise ValueError(f"the condition on column {self.column!r}: per {self.per!r} needs top")
        return self


class CacheConfig(Frozen):
    """The local cache of what is read by URL. All processes of a machine with the same folder share it."""

    folder: Path | None = None
    """Folder of the cache, on a local disk. null: stdit/objects in $XDG_CACHE_HOME or ~/.cache."""
    size_gb: float = Field(default=50.0, gt=0)
    """Most that it holds, 10^9 bytes; what was used longest ago is removed first. At least the largest file."""


class FeatureSetConfig(Frozen):
    """One of several feature sets that a run trains on."""

    path: Location
    """The `out` of an extraction, a path or a URL."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the samples that come from this set, relative to the other sets. Left out of all sets: each gives as
    many as it has clips."""


def _kind_of_features(found: Any) -> str:
    return "sets" if isinstance(found, list | tuple) else "synthetic" if found == "synthetic" else "location"


class DataConfig(Frozen):
    """The extracted features that a training run reads."""

    features: Annotated[
        Annotated[Location, Tag("location")]
        | Annotated[Literal["synthetic"], Tag("synthetic")]
        | Annotated[tuple[FeatureSetConfig, ...], Field(json_schema_extra={"minItems": 1}), Tag("sets")],
        Discriminator(_kind_of_features),
    ]
    """The `out` of an extraction, a path or a URL (s3://…, gs://…); or several of the same encoders, [{path: a, weight:
    0.7}, {path: b, weight: 0.3}]; or `synthetic`: random data, to test a launch."""
    buckets: Annotated[tuple[TrainBucket, ...], Field(min_length=1), AfterValidator(unique_buckets)] = ()
    """Shapes to train on, each with its batch size. Left out: all buckets of the features that hold training clips (of
    an image model, those of one frame)."""
    batch_size: Positive | None = None
    """Where `buckets` is left out: samples of the largest bucket per rank and micro-batch (default 1); smaller buckets
    take as many more as they have fewer tokens."""
    global_batch: Positive | None = None
    """Where `buckets` is left out: samples of the largest bucket per optimizer step over all ranks (see
    data.buckets[].global_batch); smaller buckets take a multiple of it, by their tokens."""
    where: tuple[Where, ...] = ()
    """Conditions on manifest columns that a training or validation clip must meet."""
    captions: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """Shares by which training draws a clip's caption, anew in each epoch: {dense: 0.7, original: 0.3}; `original` is
    the column caption, others are the extraction's `captions`. A clip that lacks one draws among the others. null:
    original."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split of validation losses and sample grids."""
    workers: Annotated[int, Field(ge=0, le=MAX_THREADS)] = 0
    """Threads of each rank that read ahead; 0: none."""
    cache: CacheConfig = CacheConfig()
    """Where shards are kept of features that are read by URL: fetched whole and ahead of their use. Best larger than
    the features."""

    @property
    def feature_paths(self) -> tuple[Path | Url, ...]:
        """Folders or URLs of the features; empty for synthetic ones."""
        if isinstance(self.features, tuple):
            return tuple(features.path for features in self.features)
        return (self.features,) if isinstance(self.features, Path | Url) else ()

    @property
    def feature_weights(self) -> tuple[float, ...] | None:
        """Weights of several sets; None: by their clips."""
        weights = [f.weight for f in self.features if f.weight is not None] if isinstance(self.features, tuple) else []
        return tuple(weights) or None

    @property
    def source_name(self) -> str:
        """The features, for messages."""
        return ", ".join(map(str, self.feature_paths)) or "synthetic"

    @model_validator(mode="after")
    def _check_sets(self) -> DataConfig:
        if not self.features:  # here: a bound on its length would be reported beside an error of an entry
            raise ValueError("features: an empty list; expected one set or more, [{path: …, weight: …}, …]")
        paths = [str(path) for path in self.feature_paths]
        if repeated := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"features: {', '.join(repeated)} listed twice; a set's share is its weight")
        weightless = (
            [str(f.path) for f in self.features if f.weight is None] if isinstance(self.features, tuple) else []
        )
        if weightless and self.feature_weights is not None:
            raise ValueError(
                f"features: {', '.join(weightless)} has no weight, but others have; give all sets one, or none"
            )
        return self

    @model_validator(mode="after")
    def _sizes(self) -> DataConfig:
        if self.captions is not None and not self.captions:
            raise ValueError("captions: no shares given; leave it out for the original captions")
        for name in ("batch_size", "global_batch"):
            if self.buckets and (size := getattr(self, name)) is not None:
                raise ValueError(f"{name} {size} is for buckets that follow from the features; these state their own")
        return self
