"""The order of a bucket's samples: a function of the seed, the same from any position on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stdit.config import Bucket


class Stream:
    """The endless order of one bucket's samples. number: of their set, of several."""

    def __init__(self, ids: np.ndarray, seed: int, bucket: Bucket, number: int | None = None) -> None:
        self.ids = ids
        self._seed = (seed, bucket.frames, bucket.height, bucket.width, *(() if number is None else (number,)))
        self._orders: dict[int, np.ndarray] = {}

    def at(self, position: int) -> int:
        """Id of the sample at `position` = 0, 1, 2, …"""
        epoch, within = divmod(position, len(self.ids))
        if epoch not in self._orders:
            # A step spans at most two epochs of a stream longer than itself; orders of shorter ones are recomputed.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = np.random.default_rng((*self._seed, epoch)).permutation(len(self.ids))
        return int(self.ids[self._orders[epoch][within]])

    def epoch_of(self, position: int) -> int:
        """How often the sample at `position` was in the stream before."""
        return position // len(self.ids)


class MixedStream:
    """The endless order of one bucket's samples of several sets. An epoch has `counts` of each, in a new order; each
    set goes on, epoch after epoch, in a Stream of its own."""

    def __init__(self, ids: Sequence[np.ndarray], counts: Sequence[int], seed: int, bucket: Bucket) -> None:
        self.streams = [Stream(own, seed, bucket, number) for number, own in enumerate(ids)]
        self.counts, self.length = np.array(counts), sum(counts)
        # Behind the seeds of the sets' own streams.
        self._seed = (seed, bucket.frames, bucket.height, bucket.width, len(ids))
        # Of an epoch: the set at each place, and the places of each set.
        self._orders: dict[int, tuple[np.ndarray, list[np.ndarray]]] = {}

    def at(self, position: int) -> int:
        """Id of the sample at `position`."""
        number, own = self._find(position)
        return self.streams[number].at(own)

    def epoch_of(self, position: int) -> int:
        """How often the sample at `position` was in the stream before."""
        number, own = self._find(position)
        return self.streams[number].epoch_of(own)

    def samples_before(self, position: int) -> np.ndarray:
        """Samples of each set before `position`."""
        epoch, within = divmod(position, self.length)
        return epoch * self.counts + [np.searchsorted(places, within) for places in self._order(epoch)[1]]

    def _find(self, position: int) -> tuple[int, int]:
        """The set of the sample at `position`, and its position in that set's stream."""
        epoch, within = divmod(position, self.length)
        numbers, places = self._order(epoch)
        number = int(numbers[within])
        return number, epoch * int(self.counts[number]) + int(np.searchsorted(places[number], within))

    def _order(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Of an epoch. Threads may ask at once: the dictionary is replaced, never changed."""
        orders = self._orders
        if epoch not in orders:
            numbers = np.repeat(np.arange(len(self.counts)), self.counts)
            numbers = np.random.default_rng((*self._seed, epoch)).permutation(numbers)
            places = [np.flatnonzero(numbers == number) for number in range(len(self.counts))]
            orders = {e: order for e, order in orders.items() if e == epoch - 1} | {epoch: (numbers, places)}
            self._orders = orders
        return orders[epoch]
