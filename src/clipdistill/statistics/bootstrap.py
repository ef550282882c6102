"""Intervals and tests for scores: what sampling of queries, and of seeds, can and cannot tell (`judge` weighs them).

Queries about one image are not independent (five captions share a picture), so resampling draws images, with all
their queries. Models are compared on the same queries, pairwise. All resampling is seeded: same input, same interval.

Methods: percentile bootstrap over clusters (Efron and Tibshirani 1993), widened for few clusters as Hesterberg (2015)
advises; exact sign flips over clusters; exact McNemar; Student t over seeds; Holm (1979).
SciPy is imported where it is used: commands that compute nothing must start at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clipdistill.errors import InputError

REPLICATES = 2000
_BLOCK = 4_000_000
"""Random draws held at a time."""
_LISTED = 13
"""Clusters of which all sign patterns are listed."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval. n: observations; clusters: independent units among them."""

    value: float
    low: float
    high: float
    n: int
    clusters: int
    level: float = 0.95


def bootstrap(
    values: Any,
    clusters: Any = None,
    *,
    statistic: Literal["mean", "median"] = "mean",
    level: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Interval:
    """Confidence interval of the mean (or median) of per-query results, resampling clusters of queries.

    values: (Q,) one result a query. clusters: (Q,) integers, which queries belong together (the image of each
    caption); None when every query stands alone. Where all results are the same 0 or 1, resampling says nothing and
    the exact binomial bound for the number of clusters is used instead.
    """
    values, sums, counts, members = _by_cluster(values, clusters)
    n = len(counts)
    if statistic == "median":
        value = float(np.median(values))
        draws = _median_draws(values, members, n, replicates, seed)
    else:
        value = float(values.mean())
        if values.min() == values.max() and value in (0.0, 1.0):
            tail = float(((1 - level) / 2) ** (1 / n))
            low, high = (tail, 1.0) if value else (0.0, 1 - tail)
            return Interval(value, low, high, len(values), n, level)
        draws = _mean_draws(sums[:, None], counts, replicates, seed)[:, 0]
    low, high = _percentiles(draws, n, level)
    # where all results are alike the draws differ from their mean by rounding only
    return Interval(value, min(low, value), max(high, value), len(values), n, level)


def bootstrap_difference(
    a: Any, b: Any, clusters: Any = None, *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> Interval:
    """Interval of the mean difference a - b on the same queries; where hits never differ or always do: `_unseen`."""
    a, b = _pair(a, b)
    values, sums, counts, _ = _by_cluster(a - b, clusters)
    draws = _mean_draws(sums[:, None], counts, replicates, seed)[:, 0]
    low, high = _percentiles(draws, len(counts), level)
    if len(counts) > 1 and (unseen := _unseen(a, b, len(counts), level)):
        low, high = (float(side * unseen + values[0] * (1 - unseen)) for side in (-1, 1))
    return Interval(float(values.mean()), low, high, len(values), len(counts), level)


def bootstrap_ratio(
    a: Any, b: Any, clusters: Any = None, *, level: float = 0.95, replicates: int = REPLICATES, seed: int = 0
) -> Interval:
    """Interval of mean(a) / mean(b) on the same queries: the retention of a student a against a teacher b."""
    a, b = _pair(a, b)
    if b.mean() == 0:
        raise InputError("the ratio to a score of 0 is not defined")
    _, sums_a, counts, _ = _by_cluster(a, clusters)
    _, sums_b, _, _ = _by_cluster(b, clusters)
    draws = _mean_draws(np.stack([sums_a, sums_b], axis=1), counts, replicates, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = draws[:, 0] / draws[:, 1]
    low, high = _percentiles(ratios[np.isfinite(ratios)], len(counts), level)
    if len(counts) > 1 and (unseen := _unseen(a, b, len(counts), level)):
        left, right = (float(side.mean()) * (1 - unseen) for side in (a, b))
        low, high = left / (right + unseen), (left + unseen) / right
    return Interval(float(a.mean() / b.mean()), low, high, len(a), len(counts), level)


def sign_flips(differences: Any, clusters: Any = None) -> float | None:
    """The exact two-sided p-value of "every cluster's difference could have had the other sign".

    All 2^n sign patterns of the n clusters that differ are listed; None when there are more than 13.
    """
    _, sums, _, _ = _by_cluster(differences, clusters)
    sums = sums[sums != 0]
    n = len(sums)
    if n == 0:
        return 1.0
    if n > _LISTED:
        return None
    signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    return float((np.abs(signs @ sums) >= abs(sums.sum()) * (1 - 1e-12)).mean())


def mcnemar(correct_a: Any, correct_b: Any) -> tuple[float, int, int]:
    """Exact McNemar test of two classifiers on the same samples: (p-value, only a right, only b right)."""
    a, b = _pair(correct_a, correct_b)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise InputError("McNemar's test compares right and wrong answers: every entry must be 0 or 1")
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    if only_a + only_b == 0:
        return 1.0, 0, 0
    from scipy import stats

    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue), only_a, only_b


def seed_interval(values: Any, *, level: float = 0.95, share: bool = False) -> Interval:
    """Student's t interval of the mean over seeds. One seed has no interval: its bounds are infinite.

    share: the values are shares, so the interval reaches no further than 0 to 1.
    """
    from scipy import stats

    values = _finite(values)
    n = len(values)
    mean = float(values.mean())
    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.inf
    low, high = (max(mean - half, 0.0), min(mean + half, 1.0)) if share else (mean - half, mean + half)
    return Interval(mean, low, high, n, n, level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that hold together at the level each is read at."""
    p = np.asarray(p_values, dtype=np.float64)
    if p.size == 0:
        return []
    if not ((p >= 0) & (p <= 1)).all():
        raise InputError("p-values lie between 0 and 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    result = np.empty(len(p))
    result[order] = np.minimum(adjusted, 1.0)
    return [float(v) for v in result]


def _by_cluster(values: Any, clusters: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(values (Q,), their sum and number in each cluster (C,), the cluster of each (Q,))."""
    values = _finite(values)
    if clusters is None:
        return values, values, np.ones(len(values)), np.arange(len(values))
    labels = np.asarray(clusters)
    if labels.shape != values.shape:
        raise InputError(f"{len(values)} results need as many cluster labels, got an array of shape {labels.shape}")
    _, members = np.unique(labels, return_inverse=True)
    return values, np.bincount(members, weights=values), np.bincount(members).astype(np.float64), members


def _finite(values: Any) -> np.ndarray:
    result = np.asarray(values, dtype=np.float64)
    if result.ndim != 1 or result.size == 0:
        raise InputError(f"statistics need a list of at least one number, got an array of shape {result.shape}")
    if not np.isfinite(result).all():
        raise InputError(f"entry {int(np.flatnonzero(~np.isfinite(result))[0])} of the results is not finite")
    return result


def _pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape:
        raise InputError(f"a paired comparison needs the same queries on both sides, got {len(a)} and {len(b)}")
    return a, b


def _unseen(a: np.ndarray, b: np.ndarray, n: int, level: float) -> float:
    """The largest share of other clusters of which n may hold none, where hits a, b differ alike in all; else 0."""
    alike = np.isin([a, b], (0, 1)).all() and np.ptp(a - b) == 0
    return 1 - float(((1 - level) / 2) ** (1 / n)) if alike else 0.0


def _draws(n: int, replicates: int, seed: int) -> Any:
    """Blocks of (replicates, n) counts: how often each of n clusters is drawn in n draws with replacement."""
    rng = np.random.default_rng([seed, n])
    step = max(1, _BLOCK // n)
    for start in range(0, replicates, step):
        size = min(step, replicates - start)
        drawn = rng.integers(0, n, size=(size, n)) + n * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)


def _mean_draws(sums: np.ndarray, counts: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """Means of bootstrap replicates: (replicates, K) for cluster sums (C, K)."""
    blocks = []
    for weights in _draws(len(counts), replicates, seed):
        weights = weights.astype(np.float64)
        blocks.append((weights @ sums) / (weights @ counts)[:, None])
    return np.concatenate(blocks)


def _median_draws(values: np.ndarray, members: np.ndarray, n: int, replicates: int, seed: int) -> np.ndarray:
    """Medians of bootstrap replicates: the midpoint of the lower and the upper weighted median."""
    order = np.argsort(values, kind="stable")
    ordered, owner = values[order], members[order]
    result = []
    for weights in _draws(n, replicates, seed):
        for row in weights:
            total = np.cumsum(row[owner])
            half = total[-1] / 2
            low = np.searchsorted(total, half, side="left")
            high = np.searchsorted(total, half, side="right")
            result.append((ordered[low] + ordered[min(high, len(ordered) - 1)]) / 2)
    return np.array(result)


def _percentiles(draws: np.ndarray, n: int, level: float) -> tuple[float, float]:
    """Percentile bounds, their levels widened so that few clusters are treated as Student's t would (Hesterberg)."""
    if n < 2:
        return -math.inf, math.inf
    from scipy import stats

    tail = float(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)
