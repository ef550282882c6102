"""Intervals and tests: scipy as oracle, exact small cases, and coverage measured by simulation."""

from __future__ import annotations

import inspect
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from clipdistill.errors import InputError
from clipdistill.statistics import bootstrap as statistics
from clipdistill.statistics.bootstrap import (
    bootstrap,
    bootstrap_difference,
    bootstrap_ratio,
    holm,
    mcnemar,
    seed_interval,
    sign_flips,
)

# SciPy 1.15 renamed it
SEED = {"rng" if "rng" in inspect.signature(stats.bootstrap).parameters else "random_state": 1}


def clustered(rng: np.random.Generator, clusters: int, size: int, p: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """0/1 results of `size` captions for each image; images differ in difficulty, so captions are correlated."""
    difficulty = rng.beta(2 * p, 2 * (1 - p), clusters)
    owner = np.repeat(np.arange(clusters), size)
    return (rng.random(clusters * size) < difficulty[owner]).astype(float), owner


def test_bootstrap_agrees_with_scipy_without_clusters() -> None:
    values = np.random.default_rng(0).exponential(size=400)
    ours = bootstrap(values, replicates=8000)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=8000, **SEED).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.high, abs=0.01)


def test_median_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=301)
    ours = bootstrap(values, statistic="median", replicates=4000)
    theirs = stats.bootstrap((values,), np.median, method="percentile", n_resamples=4000, **SEED).confidence_interval
    assert ours.value == np.median(values)
    assert ours.low == pytest.approx(theirs.low, abs=0.03)
    assert ours.high == pytest.approx(theirs.high, abs=0.03)


def test_median_of_even_numbers_and_clusters_is_the_weighted_median() -> None:
    assert bootstrap([1.0, 2.0, 3.0, 10.0], statistic="median").value == 2.5
    draws = statistics._median_draws(np.array([5.0, 1.0, 3.0]), np.array([0, 0, 1]), 2, 50, seed=0)
    # two images drawn with replacement: {0, 0} gives (1 + 5) / 2, {0, 1} gives 3, {1, 1} gives 3
    assert set(draws) == {3.0}


def test_coverage_is_95_percent_when_captions_share_images() -> None:
    rng = np.random.default_rng(5)
    trials = 400
    covered = ignoring = 0
    for trial in range(trials):
        values, owner = clustered(rng, clusters=60, size=5)
        interval = bootstrap(values, owner, replicates=400, seed=trial)
        covered += interval.low <= 0.4 <= interval.high
        alone = bootstrap(values, replicates=100, seed=trial)
        ignoring += alone.low <= 0.4 <= alone.high
    # 95 % +- three standard errors of 400 trials
    assert abs(covered / trials - 0.95) < 3 * math.sqrt(0.95 * 0.05 / trials)
    assert ignoring / trials < 0.85  # what happens when captions of one image count as independent


def test_coverage_of_paired_difference_and_seed_interval() -> None:
    rng = np.random.default_rng(6)
    trials, covered, by_seed = 400, 0, 0
    for trial in range(trials):
        easy = rng.random(150)
        a, b = (rng.random(150) < easy + 0.05).astype(float), (rng.random(150) < easy).astype(float)
        truth = 0.05 - 0.05**2 / 2
        interval = bootstrap_difference(a, b, replicates=400, seed=trial)
        covered += interval.low <= truth <= interval.high
        seeds = seed_interval(rng.normal(3.0, 2.0, size=5))
        by_seed += seeds.low <= 3.0 <= seeds.high
    limit = 3 * math.sqrt(0.95 * 0.05 / trials)
    assert abs(covered / trials - 0.95) < limit
    assert abs(by_seed / trials - 0.95) < limit


def test_a_perfect_score_still_has_an_interval() -> None:
    interval = bootstrap(np.ones(100))
    exact = stats.binomtest(100, 100).proportion_ci(0.95)
    assert (interval.low, interval.high) == pytest.approx((exact.low, exact.high))
    assert bootstrap(np.zeros(500), np.arange(500) // 5).high == pytest.approx(
        stats.binomtest(0, 100).proportion_ci(0.95).high
    )


def test_intervals_are_repeatable_and_clusters_are_labels() -> None:
    values, owner = clustered(np.random.default_rng(1), 40, 5)
    assert bootstrap(values, owner) == bootstrap(values, owner)
    assert bootstrap(values, owner * 17 - 3) == bootstrap(values, owner)
    assert bootstrap(values, owner).clusters == 40
    assert bootstrap(values, owner).n == 200
    assert bootstrap([0.5]).low == -math.inf


def test_sign_flips_list_every_pattern_of_few_clusters() -> None:
    differences = np.array([0.3, -0.1, 0.4, 0.2, 0.0, 0.5])
    patterns = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=6)]
    expected = np.mean([value >= abs(differences.sum()) - 1e-12 for value in patterns])
    assert sign_flips(differences) == pytest.approx(expected)
    assert sign_flips(np.ones(14)) is None
    assert sign_flips(np.ones(14), np.arange(14) // 2) == 2 / 2**7
    theirs = stats.permutation_test(
        (differences[:5], np.zeros(5)), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples",
        vectorized=True, n_resamples=10_000,
    ).pvalue  # fmt: skip
    assert sign_flips(differences[:5]) == pytest.approx(theirs)


def test_differences_of_equal_and_of_better_models() -> None:
    rng = np.random.default_rng(2)
    a, owner = clustered(rng, 100, 5)
    same = bootstrap_difference(a, a, owner)
    bound = 1 - 0.025 ** (1 / 100)
    assert (same.value, same.low, same.high) == pytest.approx((0, -bound, bound))
    better = np.maximum(a, rng.random(500) < 0.3)
    found = bootstrap_difference(better, a, owner)
    assert found.low > 0
    assert found.value == pytest.approx(better.mean() - a.mean())
    assert found.clusters == 100


def test_ratio_keeps_the_pairing() -> None:
    rng = np.random.default_rng(2)
    teacher, owner = clustered(rng, 80, 5, p=0.6)
    ratio = bootstrap_ratio(0.5 * teacher, teacher, owner)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(InputError, match="ratio to a score of 0"):
        bootstrap_ratio(teacher, np.zeros(400))


def test_mcnemar_is_the_exact_binomial() -> None:
    a, b = np.array([1] * 30 + [0] * 12 + [1] * 50), np.array([0] * 30 + [1] * 12 + [1] * 50)
    assert mcnemar(a, b) == (pytest.approx(stats.binomtest(30, 42).pvalue), 30, 12)
    assert mcnemar(a, a)[0] == 1.0
    with pytest.raises(InputError, match="must be 0 or 1"):
        mcnemar([0.5], [1])


def test_seeds_agree_with_scipy() -> None:
    a = np.array([0.41, 0.43, 0.40, 0.44, 0.42])
    theirs = stats.t.interval(0.95, 4, loc=a.mean(), scale=stats.sem(a))
    assert (seed_interval(a).low, seed_interval(a).high) == pytest.approx(theirs)
    assert seed_interval([0.4]).high == math.inf


def test_holm_by_hand_and_properties() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(InputError, match="between 0 and 1"):
        holm([0.1, 1.2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap([]), "at least one number"),
        (lambda: bootstrap([1.0, math.nan]), "entry 1 of the results is not finite"),
        (lambda: bootstrap([1.0, 2.0], [1]), "as many cluster labels"),
        (lambda: bootstrap_difference([1.0], [1.0, 2.0]), "same queries on both sides, got 1 and 2"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize("n", [2, 14, 300])
def test_sides_that_never_differ_are_as_sure_as_their_queries_are_many(n: int) -> None:
    """The ratio and the difference of two perfect scores are no surer than the perfect score is."""
    hits = np.ones(n)
    least = bootstrap(hits).low
    ratio, difference = bootstrap_ratio(hits, hits), bootstrap_difference(hits, hits)
    assert (ratio.low, ratio.high) == pytest.approx((least, 1 / least))
    assert (difference.low, difference.high) == pytest.approx((least - 1, 1 - least))
    against = bootstrap_difference(hits, np.zeros(n))
    assert (against.low, against.high) == pytest.approx((least - (1 - least), 1))
    assert bootstrap_ratio(np.zeros(n), hits).high == pytest.approx((1 - least) / least)


def test_the_bound_of_sides_that_never_differ_is_binomial() -> None:
    """Were 9.6 % of queries the other way, 36 of them would hold none in one of forty cases."""
    high = bootstrap_difference(np.ones(36), np.ones(36)).high
    assert stats.binom.cdf(0, 36, high) == pytest.approx(0.025)
