"""`buckets: {auto: …}`: a list of buckets from an area, lengths and a number of aspect ratios.

Sizes are made as the tables of SDXL (Podell et al. 2023, section 2.3 and appendix I) and PixArt-alpha (Chen et al.
2023, section 2.4, diffusers' ASPECT_RATIO_1024_BIN) are: one side is a multiple of some pixels, the other the largest
multiple with which the area is not exceeded. Of that table the sizes nearest to the wanted aspect ratios are taken.
Area 1024², multiples of 64: 768x1344, 832x1216, 896x1152, 1024x1024, …

No sample has more pixels than the area, so the largest bucket of a length bounds memory and tokens of all of them.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field, model_validator

from stdit.config.base import Count, Frames, Frozen, Positive, Width
from stdit.config.load import ConfigError, validate


class AutoBuckets(Frozen):
    """Buckets of one area or several: its sizes in `aspects` aspect ratios, each with all lengths."""

    area: Positive | Annotated[tuple[Positive, ...], Field(min_length=1, max_length=64)]
    """Pixels of a frame, height * width, at most; sizes come as near to it as `multiple_of` allows. A list: sizes of
    each area."""
    frames: Annotated[tuple[Frames, ...], Field(min_length=1, max_length=256)] = (1,)
    """Lengths; 1 for images."""
    aspects: Count = 9
    """Aspect ratios, at equal steps of their logarithm from 1 : max_aspect to max_aspect : 1. With the defaults 9:16,
    3:4, 1:1, 4:3, 16:9 and one between each two. Those that have the same nearest size are one."""
    max_aspect: Annotated[float, Field(ge=1, le=100)] = 16 / 9
    """Largest ratio of the longer to the shorter side."""
    multiple_of: Width = 16
    """Heights and widths are multiples of this, px: the autoencoder's compression times the model's patch size, or a
    multiple of that."""

    @model_validator(mode="after")
    def _check_area(self) -> AutoBuckets:
        for area in self.areas:
            if area < self.multiple_of**2:
                raise ValueError(
                    f"area {area} is less than the smallest size, {self.multiple_of}x{self.multiple_of} px (multiple_of)"
                )
        return self

    @property
    def areas(self) -> tuple[int, ...]:
        return self.area if isinstance(self.area, tuple) else (self.area,)

    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each size, tall to wide; of each area in turn."""
        most = math.log(self.max_aspect)
        count = self.aspects
        wanted = [most * (2 * i / (count - 1) - 1) for i in range(count)] if count > 1 else [0.0]
        found: dict[tuple[int, int], None] = {}
        for area in self.areas:
            table = [(math.log(w / h), h, w) for h, w in size_table(area, self.multiple_of)]
            for aspect in wanted:
                # Of two as near, the larger; of two as large, the one nearer to a square.
                _, height, width = min(table, key=lambda s: (round(abs(s[0] - aspect), 9), -s[1] * s[2], abs(s[0])))
                found[height, width] = None
        return list(found)

    def buckets(self) -> list[dict[str, int]]:
        """Every length in every size, in the form of a list of buckets."""
        return [{"frames": n, "height": h, "width": w} for n in dict.fromkeys(self.frames) for h, w in self.sizes()]


class AutoEntry(Frozen):
    """`auto: …` in the place of a list of buckets, or of one of them."""

    auto: AutoBuckets
    """The buckets to make."""


def size_table(area: int, multiple_of: int) -> list[tuple[int, int]]:
    """All (height, width) whose sides are multiples of `multiple_of` px, one of them as long as the other allows within
    `area` px; and the largest square."""
    units = area // multiple_of**2
    side = math.isqrt(units)
    short = range(1, side + 1)
    pairs = dict.fromkeys([*((s, units // s) for s in short), (side, side), *((units // s, s) for s in short)])
    return [(h * multiple_of, w * multiple_of) for h, w in pairs]


def expand_buckets(value: Any) -> Any:
    """A config's `buckets` with the buckets that it makes in the place of each `{auto: …}`. ValueError: what is wrong
    with one."""
    entries = [value] if isinstance(value, dict) and "auto" in value else value
    if not isinstance(entries, list):
        return value
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict) and "auto" in entry:
            try:
                found += validate(entry, AutoEntry, "").auto.buckets()
            except ConfigError as error:
                raise ValueError("; ".join(line.removeprefix(": ") for line in str(error).splitlines())) from None
        else:
            found.append(entry)
    return tuple(found)
