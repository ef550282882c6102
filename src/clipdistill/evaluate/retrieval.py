"""Image-text retrieval: R@K, mAP@K, MRR and median rank in both directions, streaming and exact, ties at chance.

    retrieval(image_embeddings, text_embeddings, text_to_image, ks=(1, 5, 10))

Definitions (docs/protocols.md):
  R@K   text-to-image: share of texts whose image is among the first K images; image-to-text: share of images with
        *any* of their texts among the first K texts.
  AP@K  (1 / min(K, G)) sum_{k <= K} Prec(k) rel(k), G positives of the query; mAP@K is its mean.
  MRR   mean of 1 / rank of the best-ranked positive; median rank: median over queries of that rank.
  Ties  items with equal scores are in uniformly random order, and every metric is the exact expectation over that
        order. Constant embeddings score chance. `ties` counts the queries whose result hangs on such an order.

The counting is in `ranking.py`; nothing here sorts or holds scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from clipdistill.arguments import checked
from clipdistill.errors import InputError
from clipdistill.evaluate.ranking import PositiveCounts, count_positives
from clipdistill.runtime.console import Shown, TextTable
from clipdistill.statistics.bootstrap import bootstrap

Direction = Literal["i2t", "t2i"]
DIRECTIONS: tuple[Direction, Direction] = ("i2t", "t2i")


class RetrievalScores(Shown, dict[str, Any]):
    """Scores by name; shows itself as a table in percent, with 95 % intervals where "per_query" is among them.

    `text_to_image` (M,) is the image of each text, by which the intervals of t2i are clustered.
    """

    text_to_image: np.ndarray

    def tables(self) -> list[TextTable]:
        metrics = dict.fromkeys(name[4:] for name in self if name.startswith(DIRECTIONS))
        rows = [(metric, *(self._cell(direction, metric) for direction in DIRECTIONS)) for metric in metrics]
        intervals = "with 95 % intervals" if "per_query" in self else "with per_query=True intervals too"
        caption = f"percent, {intervals}; {self.get('ties', 0)} queries with ties"
        return [TextTable(["metric", *DIRECTIONS], list(rows), "retrieval", caption)]

    def _cell(self, direction: Direction, metric: str) -> str:
        rank, name = metric == "median_rank", f"{direction}_{metric}"
        scale, clusters = 1 if rank else 100, self.text_to_image if direction == "t2i" else None
        text = f"{self[name] * scale:.1f}"
        if "per_query" not in self:
            return text
        found = bootstrap(self["per_query"][name], clusters, statistic="median" if rank else "mean")
        return f"{text} [{found.low * scale:.1f}, {found.high * scale:.1f}]"


@checked
def retrieval(
    image_embeddings: Any,
    text_embeddings: Any,
    text_to_image: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    map_ks: Sequence[int] = (10,),
    per_query: bool = False,
    distributed: bool = False,
) -> RetrievalScores:
    """Scores of zero-shot retrieval by cosine.

    image_embeddings (N, D), text_embeddings (M, D): tensors or arrays; rows need not be normalised, they are here.
    text_to_image: (M,) integers, the image each text belongs to; every image needs a text.
    ks: the K of R@K. map_ks: the K of mAP@K; 10 is always among them.
    per_query: also return "per_query", {metric: array over queries}, for the intervals of the table that the result
    shows and for paired tests; queries of t2i are the texts, those of i2t the images, in the order given.
    distributed: share the work between the ranks of torch.distributed; every rank must call with the same arguments
    and gets the whole result.

    Returns RetrievalScores, a dict: fractions in [0, 1] under "i2t_R@K", "t2i_R@K", "i2t_mAP@10", "t2i_mAP@10",
    "i2t_MRR", "t2i_MRR", the ranks "i2t_median_rank", "t2i_median_rank" (1 is best) and "ties" (number of queries, both
    directions).
    Never holds more than a tile of the N x M scores. Raises InputError on input that has no defined score.
    """
    ks, map_ks = _positive(ks, "ks"), tuple(dict.fromkeys((*_positive(map_ks, "map_ks"), 10)))
    ranks = retrieval_ranks(
        image_embeddings, text_embeddings, text_to_image, depth=max(map_ks), distributed=distributed
    )
    queries: dict[str, np.ndarray] = {}
    for direction in DIRECTIONS:
        queries |= {f"{direction}_R@{k}": ranks.recall(direction, k) for k in ks}
        queries |= {f"{direction}_mAP@{k}": ranks.average_precision(direction, k) for k in map_ks}
        queries[f"{direction}_MRR"] = ranks.reciprocal_rank(direction)
    result = RetrievalScores({name: float(values.mean()) for name, values in queries.items()})
    result.text_to_image = ranks.text_to_image
    for direction in DIRECTIONS:
        queries[f"{direction}_median_rank"] = ranks.best_rank(direction)
        result[f"{direction}_median_rank"] = float(np.median(queries[f"{direction}_median_rank"]))
    result["ties"] = int(sum(ranks.tied(direction).sum() for direction in DIRECTIONS))
    if per_query:
        result["per_query"] = queries
    return result


def retrieval_ranks(
    image_embeddings: Any,
    text_embeddings: Any,
    text_to_image: Any,
    *,
    depth: int | None = None,
    distributed: bool = False,
) -> RetrievalRanks:
    """Per-query results of `retrieval`: same arguments; see `RetrievalRanks`.

    depth: the largest k that image-to-text `average_precision` will be asked for; None for any k, which takes longer.
    """
    counts = count_positives(image_embeddings, text_embeddings, text_to_image, depth=depth, distributed=distributed)
    return RetrievalRanks(counts)


class RetrievalRanks:
    """Per-query metrics, each the exact expectation over uniformly random order of tied items.

    Arrays are float64 with one entry a query: (N,) images for "i2t", (M,) texts for "t2i".
    """

    def __init__(self, counts: PositiveCounts) -> None:
        self.counts = counts

    @property
    def text_to_image(self) -> np.ndarray:
        """(M,) image of each text: the clusters of bootstrap intervals."""
        return self.counts.text_to_image

    @cached_property
    def _best(self) -> dict[Direction, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Per query, for the tie group of its best positive: items above it, items in it, positives in it."""
        c = self.counts
        one = np.ones(len(c.text_to_image), dtype=np.int64)
        # the first text of each image in (image, items above) order is one of the image's best group
        order = np.lexsort((c.text_greater, c.text_to_image))
        first = order[np.searchsorted(c.text_to_image[order], np.arange(c.images))]
        return {
            "t2i": (c.image_greater, c.image_equal, one),
            "i2t": (c.text_greater[first], c.text_equal[first], c.positive_equal[first]),
        }

    def recall(self, direction: Direction, k: int) -> np.ndarray:
        """Probability that a positive is among the first k: 0 or 1 unless the query is tied across rank k."""
        above, group, positives = self._best[direction]
        places = np.clip(k - above, 0, group)
        # 1 - C(group - positives, places) / C(group, places), as a product over the places
        missed = np.ones(len(above))
        for r in range(int(places.max(initial=0))):
            if not missed.any():
                break
            factor = np.maximum(group - positives - r, 0) / np.maximum(group - r, 1)
            missed = np.where(r < places, missed * factor, missed)
        return 1.0 - missed

    def best_rank(self, direction: Direction) -> np.ndarray:
        """Expected rank of the best-ranked positive, 1 is best."""
        above, group, positives = self._best[direction]
        return above + (group + 1) / (positives + 1)

    def reciprocal_rank(self, direction: Direction) -> np.ndarray:
        """Expected 1 / rank of the best-ranked positive."""
        above, group, positives = self._best[direction]
        result = 1.0 / (above + 1)
        tied = np.flatnonzero(group > positives)
        if len(tied):
            cases, which = np.unique(
                np.stack([above[tied], group[tied], positives[tied]], axis=1), axis=0, return_inverse=True
            )
            result[tied] = np.array([_expected_reciprocal(*map(int, case)) for case in cases])[which.ravel()]
        return result

    def average_precision(self, direction: Direction, k: int) -> np.ndarray:
        """Expected AP@k = (1 / min(k, G)) sum_{r <= k} Prec(r) rel(r)."""
        c = self.counts
        if direction == "t2i":
            above, group = c.image_greater, c.image_equal
            before, positives = np.zeros_like(above), np.ones_like(above)
        else:
            above, group, before, positives = c.text_greater, c.text_equal, c.positive_greater, c.positive_equal
        # one positive of a group of T items with P positives stands at its x-th place with probability 1 / T, and
        # then has before + (x - 1)(P - 1)/(T - 1) positives ahead of it on average
        spread = (positives - 1) / np.maximum(group - 1, 1)
        total = np.zeros(len(above))
        for rank in range(1, min(k, int((above + group).max())) + 1):
            x = rank - above
            inside = (x >= 1) & (x <= group)
            total += np.where(inside, (before + 1 + (x - 1) * spread) / (rank * group), 0.0)
        if direction == "t2i":
            return total
        captions = np.bincount(c.text_to_image, minlength=c.images)
        return np.bincount(c.text_to_image, weights=total, minlength=c.images) / np.minimum(captions, k)

    def tied(self, direction: Direction) -> np.ndarray:
        """Whether a non-positive item ties with a positive of the query, so that order decides."""
        c = self.counts
        if direction == "t2i":
            return c.image_equal > 1
        return np.bincount(c.text_to_image, weights=c.text_equal > c.positive_equal, minlength=c.images) > 0


def _expected_reciprocal(above: int, group: int, positives: int) -> float:
    """E[1 / (above + X)], X the first of `positives` items in a random order of `group` items."""
    places = np.arange(1, group - positives + 2)
    # P(X = 1) = P / T and P(X = x + 1) = P(X = x) (T - x - P + 1) / (T - x)
    ratios = (group - places[:-1] - positives + 1) / (group - places[:-1])
    probability = positives / group * np.concatenate([[1.0], np.cumprod(ratios)])
    return float((probability / (above + places)).sum())


def _positive(values: Sequence[int], name: str) -> tuple[int, ...]:
    values = tuple(values)
    if not all(isinstance(v, int | np.integer) and not isinstance(v, bool) and 0 < v < 1 << 31 for v in values):
        raise InputError(f"{name} must be positive whole numbers below 2^31, got {values}")
    return tuple(dict.fromkeys(int(v) for v in values))
