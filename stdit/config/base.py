"""What every config section shares: strict, immutable models and bounded numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

# Sizes and counts fit 32 bits.
Positive = Annotated[int, Field(gt=0, lt=2**31)]
# Widths, tables and lengths of models beyond these are slips of the hand, and would fill the memory.
Width = Annotated[int, Field(gt=0, le=65_536)]
Count = Annotated[int, Field(gt=0, le=1024)]
Table = Annotated[int, Field(gt=0, le=10_000_000)]
Scale = Annotated[float, Field(gt=0, le=10_000)]
Frames = Annotated[int, Field(gt=0, le=1_000_000)]
Fps = Annotated[float, Field(ge=0.001, le=1000)]
# Clips, videos or captions of which a list is made.
Samples = Annotated[int, Field(gt=0, le=1_000_000)]
# Optimizer steps: a forecast counts them one by one.
Steps = Annotated[int, Field(gt=0, le=10_000_000)]
NonNegative = Annotated[int, Field(ge=0)]
# Beyond these a number in a config is a slip of the hand; seeds have 63 bits.
MAX_INT, MAX_FLOAT = 2**63 - 1, 1e12
# auto: bf16 where the device multiplies it natively.
Precision = Literal["fp32", "bf16", "auto"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Frozen(BaseModel):
    """Base of every section: immutable; unknown keys, infinity and NaN are errors. A string below a field describes
    it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, use_attribute_docstrings=True
    )

    @field_validator("*", mode="after")
    @classmethod
    def _bounded(cls, value: Any) -> Any:
        for key, number in _leaves(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key}expected a finite number, found {number:g}")
            limit = MAX_FLOAT if isinstance(number, float) else MAX_INT
            if isinstance(number, int | float) and abs(number) > limit:
                found = f"{number:g}" if isinstance(number, float) or abs(number) < 1e300 else "the number"
                raise ValueError(f"{key}{found} is beyond ±{limit:g}")
        return value


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested tuples, lists and dicts, with their keys in dicts for messages."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}{name}: ")
    elif isinstance(value, tuple | list):
        for inner in value:
            yield from _leaves(inner, key)
    else:
        yield key, value


# A time-out beyond it overflows what it is handed to.
MAX_SECONDS = 1e8
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
# More threads of a process, or processes on one machine, are a slip of the hand; starting them ends the process.
MAX_THREADS, MAX_WORKERS = 1024, 4096
Threads = Annotated[int, Field(gt=0, le=MAX_THREADS)]
Workers = Annotated[int, Field(gt=0, le=MAX_WORKERS)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class FileSchema(BaseModel):
    """Base of the schemas of files that stdit writes, and reads by `stdit.config.read_json`: unknown keys are
    errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class SealedSchema(FileSchema):
    """Of a file that nobody may edit: it is written by `stdit.files.seal`, and refused if its content does not
    match."""

    sha256: Sha256
