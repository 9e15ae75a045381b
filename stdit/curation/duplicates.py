"""Near-duplicates: clips that share most of their pictures, by perceptual hashes; or whose embeddings are all but
equal.

Candidates have 16 of 64 bits in common in one of four bands, so that the work grows with the clips, not with their
pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stdit.config import DuplicatesConfig

BANDS = 4
# Of more frames with one value of a band, all pairs are too many.
CROWDED = 400
# SemDeDup: clusters of about so many clips, within which all pairs are compared.
CLUSTER = 1000


@dataclass(frozen=True)
class Candidate:
    """What decides which copy stays: pixels of the picture, then length, then blockiness, then order."""

    id: str
    hashes: np.ndarray  # uint64
    pixels: int
    frames: int
    blockiness: float
    embedding: np.ndarray | None = None

    def rank(self, order: int) -> tuple[float, ...]:
        return (-self.pixels, -self.frames, self.blockiness, order)


@dataclass(frozen=True)
class Duplicate:
    """`number` is dropped in favour of `kept`, because `why`."""

    number: int
    kept: int
    why: str


def find_duplicates(clips: Sequence[Candidate], config: DuplicatesConfig) -> list[Duplicate]:
    """All clips but one of each group of near-duplicates."""
    groups = _Groups(len(clips))
    for a, b in _hash_pairs(clips, config):
        groups.join(a, b)
    if config.embedding_similarity is not None:
        for a, b in _embedding_pairs(clips, config.embedding_similarity):
            groups.join(a, b)
    found = []
    for members in groups.all():
        kept = min(members, key=lambda i: clips[i].rank(i))
        found += [Duplicate(i, kept, _why(clips[kept], clips[i])) for i in members if i != kept]
    return sorted(found, key=lambda duplicate: duplicate.number)


def _why(kept: Candidate, other: Candidate) -> str:
    if kept.pixels != other.pixels:
        return f"more pixels: {kept.pixels:,} against {other.pixels:,}"
    if kept.frames != other.frames:
        return f"longer: {kept.frames} frames against {other.frames}"
    if kept.blockiness != other.blockiness:
        return f"less blocky: {kept.blockiness:.2f} against {other.blockiness:.2f}"
    return "the first of equals"


def _hash_pairs(clips: Sequence[Candidate], config: DuplicatesConfig) -> list[tuple[int, int]]:
    """Pairs of clips of whose frames at least `min_share` (of the shorter one's) are within `distance` of one of the
    other's."""
    hashes = np.concatenate([clip.hashes for clip in clips]) if clips else np.empty(0, np.uint64)
    owner = np.repeat(np.arange(len(clips)), [len(clip.hashes) for clip in clips])
    matches: dict[tuple[int, int], set[int]] = defaultdict(set)

    def match(first: np.ndarray, second: np.ndarray) -> None:
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            one, other = int(owner[a]), int(owner[b])
            if one != other:
                matches[min(one, other), max(one, other)].update((a, b))

    for band in range(BANDS):
        values = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.argsort(values, kind="stable")
        starts = np.flatnonzero(np.diff(values[order], prepend=np.uint64(1 << 17)))
        for run in np.split(order, starts[1:]):
            if len(run) < 2:
                continue
            if (
                len(run) > CROWDED
            ):  # too many for all pairs: neighbours in the order of their hashes, where these are equal
                run = run[np.argsort(hashes[run], kind="stable")]
                same = np.flatnonzero(hashes[run][1:] == hashes[run][:-1])
                match(run[same], run[same + 1])
                continue
            close = np.bitwise_count(hashes[run][:, None] ^ hashes[run][None]) <= config.distance
            first, second = np.nonzero(np.triu(close, 1))
            match(run[first], run[second])
    found = []
    for (a, b), frames in matches.items():
        shorter = a if len(clips[a].hashes) <= len(clips[b].hashes) else b
        shared = sum(owner[f] == shorter for f in frames)
        # An image is no copy of a video, of which it may be a frame.
        if shared >= config.min_share * len(clips[shorter].hashes) and (clips[a].frames == 1) == (clips[b].frames == 1):
            found.append((a, b))
    return found


def _embedding_pairs(clips: Sequence[Candidate], least: float) -> list[tuple[int, int]]:
    """Pairs with a cosine similarity of at least `least`, within clusters (SemDeDup, Abbas et al. 2023)."""
    having = [i for i, clip in enumerate(clips) if clip.embedding is not None]
    if len(having) < 2:
        return []
    vectors = np.stack([np.asarray(clips[i].embedding, np.float32) for i in having])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-9)
    labels = np.zeros(len(having), int)
    if len(having) > CLUSTER:
        from sklearn.cluster import MiniBatchKMeans

        kmeans: Any = MiniBatchKMeans
        labels = kmeans(len(having) // CLUSTER + 1, random_state=0, n_init=1).fit_predict(vectors)
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        close = np.triu(vectors[members] @ vectors[members].T >= least, 1)
        found += [(having[members[i]], having[members[j]]) for i, j in zip(*np.nonzero(close), strict=True)]
    return found


class _Groups:
    """Union-find."""

    def __init__(self, count: int) -> None:
        self.parent = list(range(count))

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        self.parent[max(a, b)] = min(a, b)

    def all(self) -> list[list[int]]:
        members: dict[int, list[int]] = defaultdict(list)
        for i in range(len(self.parent)):
            members[self.find(i)].append(i)
        return [group for group in members.values() if len(group) > 1]
