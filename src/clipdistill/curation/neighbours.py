"""Batches of the teacher's neighbours: each is made of groups whose pictures and captions the teacher holds for near.

A contrastive loss learns from what it could confuse, and a random batch of a large set holds little of that. The
teacher's rows of all pairs are known from its cache, so their nearest neighbours are found once. In each epoch every
pair is still seen once: in the epoch's random order a pair that is free takes its nearest free neighbours into a group,
and the groups follow each other in random order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipdistill.data.pairs import DerivedPairs, PairSource
from clipdistill.data.sampler import StepSampler, epoch_order
from clipdistill.errors import needing

EXACT = 50_000
"""Pairs up to which every product is computed; above, the graph is built by usearch (HNSW, nearly the same lists)."""
LISTED = 8
"""Neighbours listed for each place of a group: some are taken already."""
_PART = 2048


def nearest(rows: Tensor, count: int) -> np.ndarray:
    """(N, count) numbers of each row's nearest others, nearest first, by cosine; rows (N, D) of one length."""
    count = min(count, len(rows) - 1)
    if len(rows) > EXACT:
        with needing("usearch", "search", "neighbours of more than 50,000 pairs"):
            from usearch.index import Index
        index = Index(ndim=rows.shape[1], metric="cos", dtype="f16")
        index.add(np.arange(len(rows)), rows.numpy())
        found = index.search(rows.numpy(), count + 1).keys.astype(np.int64)
        return _without_self(found, count)
    parts = []
    for start in range(0, len(rows), _PART):
        scores = rows[start : start + _PART] @ rows.T
        scores[torch.arange(len(scores)), torch.arange(start, start + len(scores))] = -torch.inf
        parts.append(scores.topk(count).indices)
    return torch.cat(parts).numpy()


def _without_self(found: np.ndarray, count: int) -> np.ndarray:
    """The lists without the row itself, which comes first or, among doubles, anywhere or nowhere."""
    own = found == np.arange(len(found))[:, None]
    own[~own.any(1), -1] = True
    return found[~own].reshape(len(found), count)


def grouped_order(order: np.ndarray, near: np.ndarray, size: int, shuffle: np.ndarray) -> np.ndarray:
    """The permutation `order` of N samples put in groups of at most `size` neighbours.

    near (N, K): neighbours, nearest first. shuffle: a permutation of at least as many numbers as there are groups, by
    which they follow each other.
    """
    free = np.ones(len(order), dtype=bool)
    groups: list[np.ndarray] = []
    for i in order.tolist():
        if free[i]:
            free[i] = False
            listed = near[i]
            taken = listed[free[listed]][: size - 1]
            free[taken] = False
            groups.append(np.concatenate([[i], taken]))
    places = shuffle[shuffle < len(groups)]
    return np.concatenate([groups[place] for place in places.tolist()]).astype(np.int64)


class GroupedSampler(StepSampler):
    """A StepSampler whose epochs go by groups of neighbours."""

    def __init__(self, near: np.ndarray, size: int, samples: int, *where: int) -> None:
        super().__init__(samples, *where)
        self.near, self.size = near, size

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation: all samples, once."""
        plain = epoch_order(self.n, self.seed, epoch)
        return grouped_order(plain, self.near, self.size, epoch_order(self.n, self.seed + 1, epoch))


class Grouped(DerivedPairs):
    """A training set whose batches are made of groups of neighbours."""

    def __init__(self, source: PairSource, near: np.ndarray, size: int) -> None:
        super().__init__(source, source.name, source.problems)
        self.near, self.group = near, size

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def images_fingerprint(self, count: int = 8) -> str:
        return self.source.images_fingerprint(count)

    def sampler(self, batch_size: int, seed: int, rank: int = 0, world: int = 1) -> StepSampler:
        return GroupedSampler(self.near, self.group, len(self), batch_size, seed, rank, world)
