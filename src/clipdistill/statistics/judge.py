"""The one judge: whether one side's results are better than the other's. Nothing else decides that.

    verdict = decide(records_of_one, records_of_other)        # one metric on one data set, one record each seed
    verdict.outcome, verdict.low, verdict.high, verdict.p

Two things are uncertain, and the interval adds them as independent errors add (the root of the sum of their squares):

seeds     Student's t. Paired where the sides share at least two seeds, on those alone. Else unpaired over all seeds of
          both: each side has its own spread and Satterthwaite's degrees of freedom; a side of one seed is taken to
          spread as the other does. With one seed on both sides how much training varies is not known: the verdict then
          rests on the test queries alone and says so (`Verdict.basis`).
queries   Bootstrap of the same queries for both sides, results averaged over seeds, clustered by image. Where at most
          13 clusters differ resampling is too sure of itself, and the half-width is widened until it agrees with the
          exact sign-flip test. Without per-query results: the widest that the sides' own intervals allow.

p is the level at which this interval would just reach the threshold, so p < 0.05 exactly where the 95 % interval ends
before it. Verdicts go by that interval alone: `adjust` adds Holm's p over what is shown together, as information.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from clipdistill.errors import InputError
from clipdistill.statistics.bootstrap import bootstrap, bootstrap_difference, bootstrap_ratio, holm, sign_flips
from clipdistill.statistics.records import Record

Outcome = Literal["supported", "contradicted", "undecided"]
Measure = Literal["difference", "ratio", "value"]
Basis = Literal["paired seeds and queries", "unpaired seeds and queries", "queries alone", ""]
MOST_SEEDS = 1000
_LEAST_P = 1e-12
"""p-values are not told apart below this."""
_NORMAL = NormalDist()


@dataclass(frozen=True)
class Uncertainty:
    """The interval, and p against the threshold, that one kind of uncertainty alone would give."""

    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Verdict:
    """What the results say of "left exceeds right", or of a claim, on one data set.

    effect with interval [low, high] against `threshold`, p two-sided (None without an interval); basis: what they rest
    on; seeds: training seeds behind each side (one side where the seeds are paired), 0 where nothing was trained;
    over_seeds, over_queries: each uncertainty alone. p_holm: adjusted over the `family` of verdicts shown together.
    queries, images: test queries and the images they share. seeds_needed: of each side in all, to decide, if mean and
    spread stay (None: no number would, or it cannot be told); images_needed: test images that would decide when seeds
    would not. left_out: results that could not be used, such as scores of other weights. parts: of a joint claim.
    """

    id: str = ""
    claim: str = ""
    outcome: Outcome = "undecided"
    reason: str = ""
    dataset: str | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    basis: Basis = ""
    seeds: int = 0
    seeds_right: int | None = None
    queries: int | None = None
    images: int | None = None
    p: float | None = None
    p_holm: float | None = None
    family: int = 0
    over_seeds: Uncertainty | None = None
    over_queries: Uncertainty | None = None
    seeds_needed: int | None = None
    images_needed: int | None = None
    left_out: int = 0
    source: str | None = None
    published: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    parts: tuple[Verdict, ...] = ()

    @property
    def better(self) -> Literal["better", "worse", "undecided"]:
        """Of the left side, where the question was which side is better."""
        words: dict[Outcome, Literal["better", "worse", "undecided"]]
        words = {"supported": "better", "contradicted": "worse", "undecided": "undecided"}
        return words[self.outcome]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; infinite bounds become None."""
        return _plain(asdict(self))


def decide(
    left: Sequence[Record],
    right: Sequence[Record] | None = None,
    *,
    measure: Measure = "difference",
    threshold: float = 0.0,
    level: float = 0.95,
    about: Verdict | None = None,
) -> Verdict:
    """The verdict on "measure(left, right) exceeds the threshold" from records of one metric on one data set.

    left, right: one record for each training seed, or one without a seed for what was not trained (a teacher); right
    is None for a statement on a value itself. about: what the verdict is of. Of ranks the lower is the better one.
    Unusable records (scores of other weights than the run's, speeds of a busy machine) are left out. What cannot be
    compared (other protocols, a seed twice, nothing left) is undecided, with the reason.
    """
    given = [left] if right is None else [left, right]
    sides = [[record for record in side if not record.unusable] for side in given]
    base = replace(about or Verdict(), threshold=threshold, left_out=sum(map(len, given)) - sum(map(len, sides)))
    falling = measure == "difference" and left[0].lower_is_better
    if falling:
        threshold = -threshold
    try:
        _check(sides, given)
        seeds = _over_seeds(measure, sides)
        sampling, queries, images = _over_queries(measure, seeds, threshold, level)
    except InputError as error:
        return replace(base, reason=str(error))
    counts = [len(side) if _is_trained(side) else 0 for side in seeds.sides]
    base = replace(
        base,
        effect=seeds.value,
        basis=seeds.basis if queries or left[0].dataset or seeds.freedom else "",  # a speed has no queries
        seeds=max(counts) if seeds.basis != "unpaired seeds and queries" else counts[0],
        seeds_right=counts[1] if seeds.basis == "unpaired seeds and queries" else None,
        queries=queries,
        images=images,
    )
    distance = abs(seeds.value - threshold)
    spread = seeds.error and seeds.error * _t_quantile((1 + level) / 2, seeds.freedom)
    if seeds.freedom:
        p = _p_value(distance, seeds, 0.0, level)
        base = replace(base, over_seeds=Uncertainty(seeds.value - spread, seeds.value + spread, p))
    if sampling is None:
        return replace(
            base,
            low=seeds.value - spread if seeds.freedom else None,
            high=seeds.value + spread if seeds.freedom else None,
            reason="the per-query results were not kept, so the uncertainty of the test set is not known",
        )
    own = sampling[0 if seeds.value > threshold else 1]
    low, high = (seeds.value - sampling[0], seeds.value + sampling[1])
    alone = replace(seeds, error=0.0)
    base = replace(base, over_queries=Uncertainty(low, high, _p_value(distance, alone, own, level)))
    low, high = (seeds.value - math.hypot(spread, sampling[0]), seeds.value + math.hypot(spread, sampling[1]))
    base = replace(base, low=low, high=high, p=_p_value(distance, seeds, own, level))
    above, below = low > threshold or (measure != "difference" and low >= threshold), high < threshold
    if falling:
        above, below = below, above
    if above:
        return replace(base, outcome="supported", reason="the whole interval lies beyond the threshold")
    if below:
        return replace(base, outcome="contradicted", reason="the whole interval lies short of the threshold")
    return _undecided(base, seeds, max(sampling), distance, level)


def adjust(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The same verdicts with Holm's p over those of them that have one: the family is what is shown together."""
    known = [i for i, verdict in enumerate(verdicts) if verdict.p is not None]
    adjusted = list(verdicts)
    for i, p in zip(known, holm([verdicts[i].p or 0.0 for i in known]), strict=True):
        adjusted[i] = replace(verdicts[i], p_holm=p, family=len(known))
    return adjusted


def _check(sides: Sequence[Sequence[Record]], given: Sequence[Sequence[Record]]) -> None:
    for side, whole in zip(sides, given):
        if not side:
            raise InputError(f"{whole[0].method}: {whole[0].unusable}")
    records = [record for side in sides for record in side]
    protocols = sorted({str(record.protocol) for record in records})
    if len(protocols) > 1:
        raise InputError(f"the results were measured under different protocols ({'; '.join(protocols)})")
    if len({record.pictures for record in records if record.pictures}) > 1:
        raise InputError(
            "the results are of other pictures under the same names and captions: measure all of them on the same ones"
        )
    for side in sides:
        weights = {record.fingerprint or i for i, record in enumerate(side) if record.seed is None}
        if side[0].role == "teacher" and len(weights) > 1:
            raise InputError(f"the results are of {len(weights)} teachers: judge the runs of each by themselves")
        seeds = [record.seed for record in side if record.seed is not None]
        twice = next((seed for seed in seeds if seeds.count(seed) > 1), None)
        if twice is not None:
            raise InputError(f"two results of {side[0].method} have the seed {twice}")


@dataclass(frozen=True)
class _Seeds:
    """The effect and what training seeds say of it.

    sides: the records used. error: standard error of the effect over seeds with its degrees of freedom (0: not known
    or nothing was trained). spread: standard deviation that n seeds of each side divide by the root of n.
    """

    sides: list[list[Record]]
    value: float
    error: float
    freedom: float
    spread: float
    basis: Basis


def _is_trained(side: Sequence[Record]) -> bool:
    return len(side) > 1 or side[0].seed is not None


def _over_seeds(measure: Measure, sides: list[list[Record]]) -> _Seeds:
    trained = [_is_trained(side) for side in sides]
    if len(sides) == 2 and all(trained):
        by_seed = [{record.seed: record for record in side if record.seed is not None} for side in sides]
        shared = sorted(set(by_seed[0]) & set(by_seed[1]))
        if len(shared) < 2:
            return _unpaired(measure, sides)
        sides = [[side[seed] for seed in shared] for side in by_seed]
    values = [np.array([record.value for record in side]) for side in sides]
    each = np.atleast_1d(_measured(measure, *values))
    if len(each) == 1:
        return _Seeds(sides, float(each[0]), 0.0, 0, 0.0, "queries alone")
    spread = float(each.std(ddof=1))
    error = spread / math.sqrt(len(each))
    return _Seeds(sides, float(each.mean()), error, len(each) - 1, spread, "paired seeds and queries")


def _unpaired(measure: Measure, sides: list[list[Record]]) -> _Seeds:
    values = [np.array([record.value for record in side]) for side in sides]
    means = [float(side.mean()) for side in values]
    value = float(_measured(measure, *(np.array([mean]) for mean in means))[0])
    counts = [len(side) for side in values]
    if max(counts) == 1:
        return _Seeds(sides, value, 0.0, 0, 0.0, "queries alone")
    known = [float(side.var(ddof=1)) if len(side) > 1 else None for side in values]
    # how the effect moves with each mean; a side of one seed spreads as the other does
    slopes = [1.0, 1.0] if measure == "difference" else [1 / means[1], means[0] / means[1] ** 2]
    variances = [(own if own is not None else other or 0.0) for own, other in zip(known, reversed(known))]
    parts = [slope**2 * variance / n for slope, variance, n in zip(slopes, variances, counts)]
    total = sum(parts)
    if min(counts) == 1:
        freedom = float(max(counts) - 1)
    elif total == 0:
        freedom = float(sum(counts) - 2)
    else:
        freedom = total**2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts))
    spread = math.sqrt(sum(slope**2 * variance for slope, variance in zip(slopes, variances)))
    return _Seeds(sides, value, math.sqrt(total), freedom, spread, "unpaired seeds and queries")


def _measured(measure: Measure, left: np.ndarray, right: np.ndarray | None = None) -> np.ndarray:
    if right is None:
        return left
    if measure == "difference":
        return left - right
    if not right.all():
        raise InputError("the ratio to a score of 0 is not defined")
    return left / right


def _over_queries(
    measure: Measure, seeds: _Seeds, threshold: float, level: float
) -> tuple[tuple[float, float] | None, int | None, int | None]:
    """Half-widths of the effect below and above from the sampling of test queries; queries; images."""
    records = [record for side in seeds.sides for record in side]
    if any(record.per_query is None for record in records):
        if any(record.low is None or record.high is None for record in records):
            return None, None, None
        widened = _NORMAL.inv_cdf((1 + level) / 2) / _NORMAL.inv_cdf(0.975)  # stored intervals are of 95 %
        below, above = (widened * half for half in _widest(measure, seeds))
        return (below, above), None, None
    if len({len(np.asarray(record.per_query)) for record in records}) > 1:
        raise InputError("the results are of different numbers of queries")
    # all seeds were tested on the same queries, so their results are averaged first
    means = [
        np.stack([np.asarray(record.per_query, dtype=np.float64) for record in side]).mean(axis=0)
        for side in seeds.sides
    ]
    clusters = records[0].clusters
    left, right = means[0], means[-1]
    if len(means) == 1:
        interval, contrast = bootstrap(left, clusters, level=level), left - threshold
    elif measure == "difference":
        interval, contrast = bootstrap_difference(left, right, clusters, level=level), left - right - threshold
    else:
        interval, contrast = bootstrap_ratio(left, right, clusters, level=level), left - threshold * right
    halves = [max(0.0, interval.value - interval.low), max(0.0, interval.high - interval.value)]
    exact = sign_flips(contrast, clusters)
    if exact is not None and interval.value != threshold:
        quantile = _NORMAL.inv_cdf((1 + level) / 2)
        # p near 1 only says that the signs are balanced, which resampling sees as well
        needed = abs(interval.value - threshold) * quantile / -_NORMAL.inv_cdf(min(exact, 0.5) / 2)
        halves = [max(half, needed) for half in halves]
    return (halves[0], halves[1]), interval.n, interval.clusters


def _widest(measure: Measure, seeds: _Seeds) -> tuple[float, float]:
    """What the sides' own intervals allow at most: for speeds, and scores whose per-query results were not kept."""
    means = [float(np.mean([record.value for record in side])) for side in seeds.sides]
    lows = [float(np.mean([record.low for record in side])) for side in seeds.sides]
    highs = [float(np.mean([record.high for record in side])) for side in seeds.sides]
    if len(means) == 1:
        return means[0] - lows[0], highs[0] - means[0]
    if measure == "difference":
        return (means[0] - lows[0]) + (highs[1] - means[1]), (highs[0] - means[0]) + (means[1] - lows[1])
    centre = means[0] / means[1]
    return centre - lows[0] / highs[1], (highs[0] / lows[1] if lows[1] > 0 else math.inf) - centre


def _undecided(base: Verdict, seeds: _Seeds, sampling: float, distance: float, level: float) -> Verdict:
    """Why the interval holds the threshold, and what would narrow it enough."""
    if distance > sampling and seeds.freedom:
        unpaired = base.seeds_right is not None
        needed = _seeds_needed(seeds.spread, math.sqrt(distance**2 - sampling**2), level, unpaired)
        if needed is None:
            return replace(base, reason=f"the interval holds the threshold; not even {MOST_SEEDS} seeds would decide")
        trained = min(base.seeds, base.seeds_right or base.seeds)
        more = max(1, needed - trained)
        reason = f"the interval holds the threshold; about {more} more seeds would decide, if mean and spread stay"
        return replace(base, reason=reason, seeds_needed=max(needed, trained + 1))
    reason = f"the test set alone is worth +-{sampling:.4f}, more than the distance of {distance:.4f}"
    if base.images and distance > 0 and math.isfinite(sampling):
        images = math.ceil(base.images * (sampling / distance) ** 2)
        if images < 10_000_000:
            reason += f": no number of seeds decides; more than {images:,} test images might"
            return replace(base, reason=reason, images_needed=images)
    return replace(base, reason=f"{reason}: no number of seeds decides")


def _seeds_needed(spread: float, distance: float, level: float, unpaired: bool) -> int | None:
    """Seeds of each side at which Student's t interval is narrower than `distance` to both sides."""
    n = np.arange(2, MOST_SEEDS + 1)
    enough = _t_quantile((1 + level) / 2, (n - 1) * (2 if unpaired else 1)) * spread / np.sqrt(n) < distance
    return int(n[np.argmax(enough)]) if enough.any() else None


def _p_value(distance: float, seeds: _Seeds, sampling: float, level: float) -> float:
    """Two-sided p of an effect that is `distance` away: the level at which the interval would just reach that far.

    sampling: half-width at `level`, taken as a normal's.
    """
    from scipy import optimize, stats

    sampled = sampling / _NORMAL.inv_cdf((1 + level) / 2)
    if seeds.error == sampled == 0:
        return float(distance == 0)
    if distance == 0 or not math.isfinite(sampled):
        return 1.0

    def excess(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        by_seeds = seeds.error * float(stats.t.isf(tail, seeds.freedom)) if seeds.error else 0.0
        return math.hypot(by_seeds, sampled * -_NORMAL.inv_cdf(tail)) - distance

    least = math.log(_LEAST_P)
    if excess(least) <= 0:
        return _LEAST_P
    return math.exp(optimize.brentq(excess, least, 0.0, xtol=1e-10))


def _t_quantile(share: float, freedom: Any) -> Any:
    from scipy import stats

    return stats.t.ppf(share, freedom)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
