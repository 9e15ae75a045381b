"""Conditions on columns (`where`, `filters`) of manifests, features and curated clips.

kept = filtered(manifest, config.where)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from stdit.config import Where
from stdit.data.manifest import Clip, Manifest, Scalar
from stdit.data.rows import ManifestError


def satisfies(value: Scalar, where: Where) -> bool:
    """Whether one value meets a condition; a missing value (None) meets none. ValueError: text against a number."""
    if value is None:
        return False
    if where.one_of is not None and value not in where.one_of:
        return False
    for bound, sign in ((where.at_least, 1), (where.at_most, -1)):
        if bound is None:
            continue
        if isinstance(value, str):
            raise ValueError(f"column {where.column!r} holds text ({value!r}), which cannot be compared with {bound}")
        if sign * (value - bound) < 0:
            return False
    return True


def passing(count: int, values: Callable[[str], Sequence[Scalar]], where: Sequence[Where]) -> list[bool]:
    """Which of `count` rows meet all conditions. values: of a column, one a row.

    `top` counts among the rows that pass everything else; of equal values, the first rows. ValueError: text against a
    number.
    """
    kept = [True] * count
    for condition in where:
        kept = [keep and satisfies(v, condition) for keep, v in zip(kept, values(condition.column), strict=True)]
    best = list(kept)
    for condition in [c for c in where if c.top is not None]:
        assert condition.top is not None
        column = values(condition.column)
        groups: dict[Scalar, list[int]] = {}
        for i, group in enumerate(values(condition.per) if condition.per else [None] * count):
            if kept[i]:
                groups.setdefault(group, []).append(i)
        for members in groups.values():
            members.sort(key=lambda i: (-number(column[i], condition), i))
            # Never none of a group that has any: a share of few is at least one.
            for i in members[max(1, round(condition.top * len(members))) :]:
                best[i] = False
    return best


def number(value: Scalar, condition: Where) -> float:
    """A value that `top` can order. ValueError: text."""
    if value is None or isinstance(value, str):
        raise ValueError(f"column {condition.column!r} holds text ({value!r}), which has no top {condition.top:g}")
    return value


def passes(clips: Sequence[Clip], where: Sequence[Where]) -> list[bool]:
    """Which clips meet all conditions. ValueError: text against a number."""

    def values(column: str) -> list[Scalar]:
        own = "frames" if column == "duration" and not any(column in clip.extra for clip in clips) else column
        return [clip.value(own) for clip in clips]

    return passing(len(clips), values, where)


def filtered(clips: Iterable[Clip], where: Sequence[Where]) -> list[Clip]:
    """The clips that meet all conditions. ValueError: text against a number."""
    clips = list(clips)
    return [clip for clip, kept in zip(clips, passes(clips, where), strict=True) if kept]


def check_where(manifest: Manifest, where: Sequence[Where]) -> None:
    """ManifestError where a condition names a column that no row has, which would leave nothing without a word, or
    compares text with a number."""
    columns = manifest.columns
    for condition in where:
        if condition.column not in columns:
            raise ManifestError(
                f"{manifest.path}: where: no column {condition.column!r}; columns: {', '.join(sorted(columns))}"
            )
        if condition.per is not None and condition.per not in {*columns, "duration"}:
            raise ManifestError(
                f"{manifest.path}: where: per: no column {condition.per!r}; columns: {', '.join(sorted(columns))}"
            )
        for clip in manifest:
            try:
                value = clip.value(condition.column)
                if satisfies(value, condition) and condition.top is not None:
                    number(value, condition)
            except ValueError as error:
                raise ManifestError(f"{manifest.path}: where: {error}") from error
