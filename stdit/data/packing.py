"""Packed steps: which samples a step takes, and how they are shared out over ranks and micro-batches, by their tokens.

A step's samples follow from the positions before it alone, so they are the same for any number of ranks, and after a
resume.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np


def fill_step(
    position: Mapping[str, int], shares: Mapping[str, float], tokens: Mapping[str, int], budget: int
) -> tuple[str, ...]:
    """Bucket keys of the samples of one step, in order: each of the bucket furthest behind its share, until the next
    one's tokens would exceed `budget`. position: samples taken from each bucket so far; tokens: of a sample. At least
    one sample fits."""
    keys = list(position)
    # Sample n of a bucket is due at n / share: in that order, ties by the order of the buckets.
    most = [budget // tokens[key] + 1 for key in keys]
    due = np.concatenate(
        [np.arange(position[k] + 1, position[k] + n + 1) / shares[k] for k, n in zip(keys, most, strict=True)]
    )
    bucket = np.repeat(np.arange(len(keys)), most)
    order = bucket[np.argsort(due, kind="stable")]
    taken = np.cumsum(np.array([tokens[key] for key in keys])[order])
    return tuple(keys[i] for i in order[: int(np.searchsorted(taken, budget, side="right"))])


def micro_batches_of(tokens: Sequence[int], ranks: int, most: int | None) -> list[list[list[int]]]:
    """Samples, by their numbers, of each rank's micro-batches, as many on each. tokens: of each sample; most: tokens of
    a micro-batch (None: one micro-batch a rank).

    Longest first, each to the micro-batch with the fewest tokens (Graham 1969); in as few micro-batches as `most`
    allows.
    """
    order = sorted(range(len(tokens)), key=lambda i: -tokens[i])
    count = 1 if most is None else max(1, -(-sum(tokens) // (most * ranks)))
    while True:
        bins: list[list[int]] = [[] for _ in range(ranks * count)]
        loads = [(0, n) for n in range(ranks * count)]  # a heap
        for i in order:
            load, least = loads[0]
            bins[least].append(i)
            heapq.heapreplace(loads, (load + tokens[i], least))
        if most is None or max(loads)[0] <= most:
            break
        count += 1
    assert min(map(len, bins)) > 0, "check_packing_budget"
    # Of every `ranks` micro-batches in order of load, one to each rank, there and back.
    ranked = [n for _, n in sorted(loads, reverse=True)]
    rows = [ranked[n * ranks : (n + 1) * ranks] for n in range(count)]
    return [[sorted(bins[row[r] if n % 2 == 0 else row[-1 - r]]) for n, row in enumerate(rows)] for r in range(ranks)]
