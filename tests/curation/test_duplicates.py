"""Near-duplicates: groups, which copy stays, and that the work does not grow with all pairs."""

from __future__ import annotations

import time

import numpy as np

from stdit.config import DuplicatesConfig
from stdit.curation.duplicates import Candidate, find_duplicates

RANDOM = np.random.default_rng(0)


def hashes(count: int) -> np.ndarray:
    return RANDOM.integers(1, 2**63, count, dtype=np.uint64)


def flipped(values: np.ndarray, bits: int) -> np.ndarray:
    """The same hashes with `bits` bits changed, each in other places."""
    found = values.copy()
    for i in range(len(found)):
        for bit in RANDOM.choice(64, bits, replace=False):
            found[i] ^= np.uint64(1) << np.uint64(bit)
    return found


def clip(name: str, own: np.ndarray, pixels: int = 100, frames: int = 50) -> Candidate:
    return Candidate(name, own, pixels, frames, 1.0)


def test_the_larger_then_the_longer_then_the_first_copy_stays() -> None:
    own = hashes(12)
    clips = [
        clip("small", own),
        clip("large", flipped(own, 2), 400),
        clip("other", hashes(12)),
        clip("long", own, 100, 60),
    ]
    found = find_duplicates(clips, DuplicatesConfig())
    assert [(d.number, d.kept) for d in found] == [(0, 1), (3, 1)]
    assert found[0].why == "more pixels: 400 against 100"
    assert [(d.number, d.kept) for d in find_duplicates([clip("a", own), clip("b", own)], DuplicatesConfig())] == [
        (1, 0)
    ]


def test_a_part_of_a_longer_clip_is_its_duplicate_and_a_shared_moment_is_not() -> None:
    own = hashes(20)
    part = clip("part", own[5:12], frames=14)
    moment = clip("moment", np.concatenate([own[:3], hashes(17)]))
    found = find_duplicates([clip("whole", own), part, moment], DuplicatesConfig())
    assert [(d.number, d.kept) for d in found] == [(1, 0)]


def test_hashes_further_apart_than_the_distance_are_other_pictures() -> None:
    own = hashes(12)
    assert not find_duplicates([clip("a", own), clip("b", flipped(own, 9))], DuplicatesConfig(distance=6))


def test_thousands_of_copies_and_of_clips_are_compared_in_seconds() -> None:
    own = hashes(4)
    clips = [clip(f"copy{i}", own) for i in range(3000)] + [clip(f"own{i}", hashes(10)) for i in range(5000)]
    began = time.monotonic()
    found = find_duplicates(clips, DuplicatesConfig())
    assert {d.number for d in found} == set(range(1, 3000))
    assert time.monotonic() - began < 20


def test_clips_with_the_same_embedding_are_duplicates() -> None:
    vectors = RANDOM.normal(size=(3, 16))
    clips = [
        Candidate(str(i), np.empty(0, np.uint64), 100, 50, 1.0, v) for i, v in enumerate([*vectors, vectors[1] * 2])
    ]
    assert [(d.number, d.kept) for d in find_duplicates(clips, DuplicatesConfig(embedding_similarity=0.99))] == [(3, 1)]
