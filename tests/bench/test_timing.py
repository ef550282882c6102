"""Timing on a clock that only moves when told: rounds, alternation, drift, throttling, intervals."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from clipdistill.bench.timing import (
    MINIMUM_ROUNDS,
    Session,
    TimedTask,
    drift,
    machine_probe,
    measure,
    median_interval,
    pair_rates,
    ratio_interval,
)
from tests.bench.synthetic import Clock


def run(
    clock: Clock, costs: dict[str, Callable[[], float]], probe: Callable[[], float] = lambda: 0.001, **options: object
) -> tuple[Session, list[str]]:
    """Measure tasks whose calls cost what `costs` says; also the order of all calls."""
    order: list[str] = []

    def task(name: str) -> TimedTask:
        def call() -> None:
            order.append(name)
            clock.spend(costs[name]())

        return TimedTask(name, call, 4)

    settings = {"seconds": 1.0, "rounds": 10, **options}
    tasks = [task(name) for name in costs]
    return measure(tasks, clock=clock, probe=lambda: clock.spend(probe()), **settings), order  # type: ignore[arg-type]


def test_constant_costs_give_exact_rates() -> None:
    clock = Clock()
    session, _ = run(clock, {"a": lambda: 0.01, "b": lambda: 0.02})
    a, b = session.timings["a"], session.timings["b"]
    assert a.rates() == pytest.approx([400.0] * 10)
    assert b.rates() == pytest.approx([200.0] * 10)
    assert a.latency() == pytest.approx((0.01, 0.01))
    assert (session.reruns, session.drifting, session.warnings) == (0, [], [])
    assert a.warm_up.steady
    assert 90 <= a.calls <= 110  # a second of calls of ten milliseconds


def test_tasks_alternate_back_and_forth() -> None:
    clock = Clock()
    _, order = run(clock, {"a": lambda: 0.2, "b": lambda: 0.2, "c": lambda: 0.2}, seconds=1.0, rounds=10)
    rounds = order[-3 * MINIMUM_ROUNDS :]  # a call in each round, as one takes more than its share of time
    forth, back = ["a", "b", "c"], ["c", "b", "a"]
    expected = list(itertools.chain.from_iterable([forth, back, forth, back, forth]))
    assert rounds == expected


def test_slow_calls_get_fewer_rounds_but_never_fewer_than_needed_to_see_a_trend() -> None:
    session, _ = run(Clock(), {"a": lambda: 3.0}, seconds=1.0)
    assert len(session.timings["a"].rounds) == MINIMUM_ROUNDS
    assert all(len(calls) == 1 for calls in session.timings["a"].rounds)


def test_warm_up_waits_for_a_steady_state() -> None:
    durations = itertools.chain([5.0, 1.0, 0.5, 0.2, 0.1, 0.05], itertools.repeat(0.01))
    session, _ = run(Clock(), {"a": lambda: next(durations)}, seconds=30.0)
    timing = session.timings["a"]
    assert timing.warm_up.first == 5.0
    assert timing.warm_up.steady
    assert max(d for calls in timing.rounds for d in calls) == pytest.approx(0.01)


def test_a_call_that_never_settles_is_named() -> None:
    growing = (0.001 * 1.3**i for i in itertools.count())
    costs = itertools.chain(itertools.islice(growing, 26), itertools.repeat(0.01))
    session, _ = run(Clock(), {"restless": lambda: next(costs)})
    assert not session.timings["restless"].warm_up.steady
    assert any("no steady state" in w and "restless" in w for w in session.warnings)


def test_a_single_slow_round_is_noise_and_not_drift() -> None:
    assert drift([100, 100, 60, 101, 99, 100, 102, 98, 100, 101]) == 0.0
    assert drift([100.0] * 10) == 0.0
    assert drift([1.0, 2.0]) == 0.0


def test_a_trend_is_drift() -> None:
    assert drift([100, 98, 96, 93, 91, 88, 86, 84, 82, 80]) == pytest.approx(82 / 98 - 1)
    assert drift([100, 95, 90, 85, 80]) == pytest.approx(-0.2)


def test_a_drifting_session_is_measured_again() -> None:
    clock = Clock()
    # slows down for the first three seconds, then holds still
    session, _ = run(clock, {"a": lambda: 0.01 * (1 + min(clock.now, 3.0))}, seconds=2.0, max_reruns=3)
    assert session.reruns >= 1
    assert session.drifting == []
    assert session.warnings == []


def test_what_still_drifts_is_named_and_throttling_is_told_from_it() -> None:
    clock = Clock()
    slowing = lambda: 0.01 * (1 + clock.now / 5)  # noqa: E731
    model_only, _ = run(clock, {"a": slowing}, max_reruns=1)
    assert model_only.reruns == 1
    assert model_only.drifting == ["a"]
    assert any(w.startswith("a: the rate still drifted (-") for w in model_only.warnings)
    assert not any("throttling" in w for w in model_only.warnings)
    clock = Clock()
    machine, _ = run(clock, {"a": slowing}, probe=lambda: 0.001 * (1 + clock.now / 5), max_reruns=1)
    assert any(w.startswith("throttling: the machine itself became") for w in machine.warnings)


def test_other_work_on_the_machine_is_noise_that_ratios_survive() -> None:
    clock = Clock()
    rng = np.random.default_rng(0)
    disturbed = {"factor": 1.0}

    def probe() -> float:
        disturbed["factor"] = float(rng.choice([1.0, 3.0]))  # the machine changes from round to round
        return 0.001 * disturbed["factor"]

    costs = {"a": lambda: 0.001 * disturbed["factor"], "b": lambda: 0.003 * disturbed["factor"]}
    session, _ = run(clock, costs, probe=probe, rounds=20)
    assert any(w.startswith("noise: fixed arithmetic took up to 200 % longer") for w in session.warnings)
    rates = {name: timing.rates() for name, timing in session.timings.items()}
    assert ratio_interval(rates["a"], rates["b"]) == pytest.approx((3.0, 3.0, 3.0))
    _, low, high = median_interval(rates["a"])
    assert high > 2.5 * low


def test_an_interrupted_call_does_not_make_a_round() -> None:
    costs = itertools.cycle([0.001] * 30 + [0.09])
    session, _ = run(Clock(), {"a": lambda: next(costs)})
    assert all(len(calls) >= 5 for calls in session.timings["a"].rounds)
    assert session.timings["a"].rates() == pytest.approx([4000.0] * 10)
    median, p95 = session.timings["a"].latency()
    assert median == pytest.approx(0.001)
    assert p95 >= median


@pytest.mark.parametrize("count", [6, 9, 10, 13, 20])
def test_the_median_interval_covers(count: int) -> None:
    rng = np.random.default_rng(count)
    samples = rng.exponential(size=(800, count))
    inside = sum(low <= np.log(2) <= high for _, low, high in map(median_interval, samples))
    nominal = stats.binom(800, 0.95)
    assert inside >= nominal.ppf(0.001)
    tighter = np.sort(samples, axis=1)  # one value further in would not cover
    value, low, high = median_interval(samples[0])
    k = int(np.searchsorted(tighter[0], low))
    assert 1 - 2 * stats.binom.cdf(k + 1, count, 0.5) < 0.95
    assert low <= value <= high


def test_few_rounds_give_their_range() -> None:
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_pairs_per_second() -> None:
    assert pair_rates([100.0, 50.0], [100.0, 200.0]) == pytest.approx([50.0, 40.0])


def test_the_probe_is_the_same_work_every_time() -> None:
    import torch

    assert torch.equal(machine_probe()(), machine_probe()())  # type: ignore[arg-type]
