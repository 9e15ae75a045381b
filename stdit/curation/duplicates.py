"""Near-duplicates: clips that share most of their pictures, by perceptual hashes; or whose embeddings are all but
equal.

Hashes within a distance d differ by at most d // 4 bits in one of four bands of 16 bits, where they are looked up
(multi-index hashing, Norouzi et al. 2012): all near pairs are found, and the work grows with the clips, not with their
pairs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from stdit.config import DuplicatesConfig

BANDS, BAND_BITS = 4, 16
# Pairs of hashes that are compared at once.
COMPARED = 1 << 22
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
    _join_by_hashes(clips, config, groups)
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


def _join_by_hashes(clips: Sequence[Candidate], config: DuplicatesConfig, groups: _Groups) -> None:
    """Joins clips of whose frames at least `min_share` (of the shorter one's) are within `distance` of one of the
    other's. An image is no copy of a video, of which it may be a frame."""
    for still in (False, True):
        # Of clips with the same hashes one is looked up for all.
        alike: dict[bytes, int] = {}
        for i, clip in enumerate(clips):
            if len(clip.hashes) and (clip.frames == 1) == still:
                groups.join(alike.setdefault(np.sort(clip.hashes).tobytes(), i), i)
        chosen = sorted(alike.values(), key=lambda i: (len(clips[i].hashes), i))
        index = _HashIndex([clips[i].hashes for i in chosen], config.distance)
        group = np.arange(len(chosen))  # of each, as far as it is known
        for a in range(len(chosen)):
            near = index.near(a, config.min_share * len(clips[chosen[a]].hashes), group)
            for b in near.tolist():
                groups.join(chosen[a], chosen[b])
            if len(near):
                group[np.isin(group, group[near])] = group[a]


class _HashIndex:
    """Looks up which clips have hashes near those of one of them. hashes: of each clip, the shorter ones first."""

    def __init__(self, hashes: Sequence[np.ndarray], distance: int) -> None:
        self.distance = distance
        pairs = [np.unique(own, return_counts=True) for own in hashes]
        # An entry is a hash of a clip, and the number of its frames that have it; a clip's are next to each other.
        self.first = np.cumsum([0, *(len(own) for own, _ in pairs)])
        self.hash = np.concatenate([own for own, _ in pairs]) if pairs else np.empty(0, np.uint64)
        self.frames = np.concatenate([count for _, count in pairs]) if pairs else np.empty(0, int)
        self.clip = np.repeat(np.arange(len(hashes)), np.diff(self.first))
        # Bands that differ by few enough bits, as what they differ by.
        self.flips = np.array(
            [sum(1 << bit for bit in bits) for n in range(distance // BANDS + 1) for bits in combinations(range(BAND_BITS), n)]
        )  # fmt: skip
        # Entries by the value of each band, and where those of each value begin.
        self.order = np.empty((BANDS, len(self.hash)), np.int64)
        self.starts = np.empty((BANDS, (1 << BAND_BITS) + 1), np.int64)
        for band, values in enumerate(_bands(self.hash)):
            self.order[band] = np.argsort(values, kind="stable")
            found = np.searchsorted(values[self.order[band]], np.arange((1 << BAND_BITS) + 1))
            self.starts[band] = found + band * len(self.hash)
        self.order = self.order.ravel()

    def near(self, a: int, least: float, group: np.ndarray) -> np.ndarray:
        """Clips after `a`, of another `group` (clips,), that have hashes near those of at least `least` frames of `a`.

        Such a clip has one near some of the rarest hashes, those without which fewer than `least` frames are left:
        these alone are looked up, so that a frame that thousands of clips have, a title or a logo, is not.
        """
        own = np.arange(self.first[a], self.first[a + 1])
        starts, counts = self._places(own)
        rarest = np.argsort(counts.sum(axis=(0, 2)), kind="stable")
        left = self.frames[own].sum() - np.cumsum(self.frames[own][rarest])
        looked_up = rarest[: int(np.argmax(left < least)) + 1]
        mine, theirs = self._candidates(own[looked_up], starts[:, looked_up], counts[:, looked_up])
        other = self.clip[theirs]
        chosen = (other > a) & (group[other] != group[a])
        close = np.bitwise_count(self.hash[mine[chosen]] ^ self.hash[theirs[chosen]]) <= self.distance
        found = [
            clips[self._shared(own, clips) >= least]
            for clips in self._blocks(np.unique(other[chosen][close]), len(own))
        ]
        return np.concatenate(found) if found else np.empty(0, int)

    def _places(self, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in `order` the candidates of each entry of `own` begin, and how many there are: (BANDS, own, flips)."""
        values = _bands(self.hash[own])[:, :, None] ^ self.flips
        starts, ends = (
            np.take_along_axis(self.starts, (values + i).reshape(BANDS, -1), 1).reshape(values.shape) for i in range(2)
        )
        return starts, ends - starts

    def _candidates(self, own: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Entries of `own`, each as often as there are candidates for it, and these."""
        count = counts.ravel()
        places = np.repeat(starts.ravel() - np.cumsum(count) + count, count)
        places += np.arange(len(places))
        mine = np.repeat(np.broadcast_to(own[None, :, None], counts.shape).ravel(), count)
        return mine, self.order[places]

    def _blocks(self, clips: np.ndarray, own: int) -> list[np.ndarray]:
        """`clips` in parts whose hashes times `own` are at most COMPARED, or of one clip."""
        if not len(clips):
            return []
        sizes = np.cumsum(self.first[clips + 1] - self.first[clips]) * own
        return np.split(clips, np.flatnonzero(np.diff(sizes // COMPARED)) + 1)

    def _shared(self, own: np.ndarray, clips: np.ndarray) -> np.ndarray:
        """How many frames of the entries `own` each of `clips` has, too."""
        counts = self.first[clips + 1] - self.first[clips]
        ends = np.cumsum(counts)
        theirs = np.arange(ends[-1]) + np.repeat(self.first[clips] - ends + counts, counts)
        close = np.bitwise_count(self.hash[own][:, None] ^ self.hash[theirs]) <= self.distance
        return self.frames[own] @ np.logical_or.reduceat(close, ends - counts, axis=1)


def _bands(hashes: np.ndarray) -> np.ndarray:
    """(BANDS, N)"""
    shifts = np.arange(BANDS, dtype=np.uint64)[:, None] * np.uint64(BAND_BITS)
    return ((hashes >> shifts) & np.uint64((1 << BAND_BITS) - 1)).astype(np.int64)


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
