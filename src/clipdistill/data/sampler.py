"""Sample order as a function of (seed, epoch, position): the same for any number of ranks and workers.

The state of a run's data is one integer, the step; epoch and position follow from it.
Tail policy: an epoch has floor(n / batch) steps and at least one; the samples left over by an epoch's permutation are
not seen in that epoch (another permutation leaves out others). A data set smaller than the batch gives batches of n.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clipdistill.errors import InputError

_ORDER, _SAMPLE, _STEP = 0, 1, 2  # what a random stream is for


def _philox(seed: int, epoch: int, purpose: int, index: int) -> np.random.Philox:
    """A counter-based stream that depends on nothing but its arguments."""
    key = np.array([seed, epoch], dtype=np.uint64)
    # the low words count within a stream; purpose and index choose among streams 2^128 draws apart
    counter = np.array([0, 0, index, purpose], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (int64, n) in which epoch `epoch` visits n samples.

    Sorted raw 64-bit Philox words rather than Generator.permutation: numpy guarantees the former across its versions.
    """
    words = _philox(seed, epoch, _ORDER, 0).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of sample `index` in `epoch`: its caption and its view, whoever prepares it."""
    return np.random.Generator(_philox(seed, epoch, _SAMPLE, index))


def step_sample(n: int, count: int, seed: int, step: int) -> np.ndarray:
    """`count` of n numbers, sorted (int64), all different: a function of (seed, step), the same on every rank."""
    stream = _philox(seed, step, _STEP, 0)
    if n <= 1 << 16 or 2 * count > n:
        return np.sort(np.argsort(stream.random_raw(n), kind="stable")[:count])
    found = np.zeros(0, dtype=np.int64)
    while len(found) < count:
        # in the order of their drawing, so that none is preferred
        drawn = np.concatenate([found, (stream.random_raw(2 * count) % n).astype(np.int64)])
        found = drawn[np.sort(np.unique(drawn, return_index=True)[1])]
    return np.sort(found[:count])


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Steps in an epoch of n samples at global batch `batch_size`: floor(n / batch), at least 1."""
    return max(1, n // batch_size)


def pairs_a_step(source: Any, batch_size: int) -> int:
    """Pairs of the largest batch over all ranks: of a set that is smaller than `batch_size`, all of it."""
    return min(batch_size, max(map(len, getattr(source, "sets", [source]))))


class StepSampler:
    """For each global step, the samples of this rank.

    n: samples; batch_size: over all ranks (fewer when n is smaller); rank r of W takes positions r B // W to
    (r + 1) B // W, so the ranks' shares differ by at most one sample and, put together in order of rank, are the
    batch of one process.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if n < 1:
            raise InputError("the data set is empty: there is nothing to draw batches from")
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= seed < 2**64:
            raise InputError(f"the seed must lie between 0 and 2^64 - 1, got {seed}")
        if not 0 <= rank < world:
            raise InputError(f"rank {rank} does not exist among {world} processes")
        if min(n, batch_size) < world:
            raise InputError(
                f"{world} processes cannot share batches of {min(n, batch_size)} samples: use fewer processes"
            )
        self.n = n
        self.batch_size = min(batch_size, n)
        self.seed = seed
        self.steps_per_epoch = steps_per_epoch(n, batch_size)
        self._begin = rank * self.batch_size // world
        self._end = (rank + 1) * self.batch_size // world
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def local_batch_size(self) -> int:
        """Samples of this rank in every step."""
        return self._end - self._begin

    @property
    def dropped_per_epoch(self) -> int:
        """Samples that each epoch leaves out."""
        return self.n - self.steps_per_epoch * self.batch_size

    def epoch(self, step: int) -> int:
        """The epoch that global step `step` belongs to."""
        return step // self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """The permutation (int64, n) of an epoch."""
        return epoch_order(self.n, self.seed, epoch)

    def indices(self, step: int) -> np.ndarray:
        """The samples (int64) of this rank in global step `step`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            order = self.order(epoch)
            self._order = (epoch, order.astype(np.uint32) if self.n < 2**32 else order)
        start = within * self.batch_size
        return self._order[1][start + self._begin : start + self._end].astype(np.int64)
