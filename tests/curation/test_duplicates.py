"""Near-duplicates: groups, which copy stays, and that the work does not grow with all pairs."""

from __future__ import annotations

import numpy as np
import pytest

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


@pytest.mark.parametrize("distance", range(12))
def test_all_pairs_within_the_distance_are_found(distance: int) -> None:
    """Beside a comparison of all pairs: of 40 pictures five copies each, whose hashes differ by up to 14 bits."""
    own = hashes(40)
    copies = [flipped(own[i : i + 1], int(RANDOM.integers(0, 15))) for i in range(40) for _ in range(5)]
    clips = [clip(str(n), value) for n, value in enumerate([*own[:, None], *copies])]
    values = np.concatenate([c.hashes for c in clips])
    close = np.bitwise_count(values[:, None] ^ values[None]) <= distance
    reachable = np.linalg.matrix_power(close.astype(float), len(own)) > 0
    first = reachable.argmax(axis=1)
    dropped = {d.number for d in find_duplicates(clips, DuplicatesConfig(distance=distance))}
    assert dropped == set(np.flatnonzero(first != np.arange(len(clips))))


@pytest.mark.parametrize("min_share", [0.2, 0.6, 1.0])
def test_clips_that_share_enough_frames_are_found_whatever_else_all_have_in_common(min_share: float) -> None:
    """Beside a comparison of all pairs of clips: of 1 to 12 frames, many from a pool, a title that each second one
    has."""
    title, pool = hashes(1), hashes(25)
    clips = []
    for i in range(150):
        own = flipped(RANDOM.choice(pool, RANDOM.integers(1, 13)), int(RANDOM.integers(0, 5)))
        strange = RANDOM.random(len(own)) < 0.4
        own[strange] = hashes(int(strange.sum()))
        clips.append(clip(str(i), np.concatenate([title, own]) if i % 2 else own))
    parent = np.arange(len(clips))
    for a, first in enumerate(clips):
        for b, second in enumerate(clips[a + 1 :], a + 1):
            short, long = (first, second) if len(first.hashes) <= len(second.hashes) else (second, first)
            close = np.bitwise_count(short.hashes[:, None] ^ long.hashes[None]) <= 6
            if close.any(axis=1).sum() >= min_share * len(short.hashes):
                parent[parent == parent[b]] = parent[a]
    expected = {i for i in range(len(clips)) if i != np.flatnonzero(parent == parent[i])[0]}
    found = {d.number for d in find_duplicates(clips, DuplicatesConfig(min_share=min_share))}
    assert expected
    assert found == expected


def test_the_share_counts_every_frame_of_the_shorter_clip() -> None:
    own = hashes(2)
    still = np.repeat(own[:1], 6)
    shorter = clip("shorter", np.concatenate([still, hashes(4)]))
    longer = clip("longer", np.concatenate([own[:1], hashes(19)]))
    assert [d.number for d in find_duplicates([longer, shorter], DuplicatesConfig(min_share=0.6))] == [1]
    assert not find_duplicates([longer, shorter], DuplicatesConfig(min_share=0.7))


@pytest.mark.parametrize("copies", [110, 3000])
@pytest.mark.parametrize("bits", [0, 1])
def test_of_any_number_of_copies_one_stays(copies: int, bits: int) -> None:
    own = hashes(4)
    clips = [clip(f"copy{i}", flipped(own, bits)) for i in range(copies)] + [
        clip(f"own{i}", hashes(10)) for i in range(1000)
    ]
    found = find_duplicates(clips, DuplicatesConfig())
    assert {d.number for d in found} == set(range(1, copies))


def test_clips_with_the_same_embedding_are_duplicates() -> None:
    vectors = RANDOM.normal(size=(3, 16))
    clips = [
        Candidate(str(i), np.empty(0, np.uint64), 100, 50, 1.0, v) for i, v in enumerate([*vectors, vectors[1] * 2])
    ]
    assert [(d.number, d.kept) for d in find_duplicates(clips, DuplicatesConfig(embedding_similarity=0.99))] == [(3, 1)]
