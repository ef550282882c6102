"""Timing several tasks against each other on a machine that may be noisy, throttling or shared.

Tasks alternate in rounds, so that whatever disturbs the machine disturbs all of them: ratios between tasks of the
same round hold when absolute figures do not. A fixed piece of arithmetic (the probe) runs in every round and tells a
machine that slows down from a model that does. Figures that drift over the rounds are measured again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from scipy import stats

DRIFT = 0.05
"""A rate that changes by more than this share from the first to the last third of the rounds has drifted."""

UNTRUSTED = 3.0
"""When fixed arithmetic took this share longer in some round than in the fastest (so four times as long), the machine
was so busy with other work that ratios of its rounds mean nothing: they are withheld."""

MINIMUM_ROUNDS = 5
"""Fewer rounds show no trend: five in order happen by chance once in sixty times."""

_STEADY_WINDOW = 3


@dataclass
class TimedTask:
    """Something to time: `call` processes `items` items and returns when they are done (synchronised)."""

    name: str
    call: Callable[[], object]
    items: int


@dataclass(frozen=True)
class WarmUp:
    """Seconds of the first call and of a typical one at the end, calls made, and whether a steady state was reached."""

    first: float
    call: float
    calls: int
    steady: bool


@dataclass
class Timing:
    """Durations in seconds of every call of one task, by round, with how the warm-up went."""

    task: TimedTask
    rounds: list[list[float]] = field(default_factory=list)
    warm_up: WarmUp = field(default_factory=lambda: WarmUp(0.0, 0.0, 0, True))

    def rates(self) -> list[float]:
        """Items per second in each round, from the median call: one interrupted by other work counts little."""
        return [self.task.items / statistics.median(calls) for calls in self.rounds]

    def latency(self) -> tuple[float, float]:
        """(median, 95th percentile) of a call in seconds."""
        durations = sorted(d for calls in self.rounds for d in calls)
        return statistics.median(durations), durations[min(len(durations) - 1, math.ceil(0.95 * len(durations)) - 1)]

    @property
    def calls(self) -> int:
        """How many calls were timed."""
        return sum(len(calls) for calls in self.rounds)


@dataclass
class Session:
    """What one session of alternating measurements found. `probe`: seconds of the fixed arithmetic in each round."""

    timings: dict[str, Timing]
    probe: list[float]
    reruns: int
    drifting: list[str]
    warnings: list[str]

    @property
    def noise(self) -> float:
        """How much longer the fixed arithmetic took in the slowest round than in the fastest, as a share."""
        return max(self.probe) / min(self.probe) - 1


def measure(
    tasks: Sequence[TimedTask],
    *,
    seconds: float,
    rounds: int = 10,
    max_reruns: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    probe: Callable[[], object] | None = None,
) -> Session:
    """Time tasks in alternation: about `seconds` each after warm-up, in `rounds` rounds (at least one call in each).

    Slow calls get fewer rounds, at least MINIMUM_ROUNDS. A session whose rates drift is repeated up to `max_reruns`
    times; what still drifts is named in the warnings.
    """
    probe = probe if probe is not None else machine_probe()
    warm = {task.name: _warm_up(task, max(0.2, seconds), clock) for task in tasks}
    slowest = max(warm_up.call for warm_up in warm.values())
    rounds = min(rounds, max(MINIMUM_ROUNDS, int(seconds / slowest)))
    for attempt in range(max_reruns + 1):
        session = _session(tasks, warm, seconds, rounds, clock, probe)
        session.reruns = attempt
        for name, timing in session.timings.items():
            timing.warm_up = warm[name]
        session.drifting = [name for name, timing in session.timings.items() if abs(drift(timing.rates())) > DRIFT]
        if not session.drifting:
            break
    session.warnings = _warnings(session, warm)
    return session


def drift(rates: Sequence[float]) -> float:
    """Relative change of a rate from the first to the last third of the rounds; 0 when it is not a trend.

    A trend is a change that a rank correlation with time finds significant (Kendall's tau, p < 0.02, which five rounds
    in perfect order just reach): a single slow round is noise, and widens the interval instead.
    """
    third = len(rates) // 3
    if third == 0:
        return 0.0
    trend = stats.kendalltau(range(len(rates)), rates)
    if not trend.pvalue < 0.02:  # also when it is not a number: constant rates
        return 0.0
    first, last = statistics.median(rates[:third]), statistics.median(rates[-third:])
    return last / first - 1


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(median, low, high) over rounds: the narrowest interval between order statistics that covers 95 % (binomial).

    It assumes nothing about how the noise is distributed, which on a shared machine is never Gaussian. Fewer than six
    rounds cannot reach 95 %: the interval is then their whole range (94 % for five).
    """
    ordered = sorted(values)
    count = len(ordered)
    outside = [k for k in range((count + 1) // 2) if 2 * float(stats.binom.cdf(k, count, 0.5)) <= 0.05]
    inside = max(outside, default=0)  # how many values are left out at either end
    return statistics.median(ordered), ordered[inside], ordered[count - 1 - inside]


def ratio_interval(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float, float]:
    """(ratio, low, high) of two rates measured in the same rounds: the median of the rounds' ratios."""
    return median_interval([a / b for a, b in zip(values, reference)])


def pair_rates(image: Sequence[float], text: Sequence[float]) -> list[float]:
    """Image-text pairs per second in each round, 1 / (1/image + 1/text), as TinyCLIP combines them."""
    return [1 / (1 / a + 1 / b) for a, b in zip(image, text)]


def machine_probe(size: int = 192, repeats: int = 6) -> Callable[[], object]:
    """A few milliseconds of fixed arithmetic on the processor, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator) / math.sqrt(size)

    def run() -> object:
        result = matrix
        for _ in range(repeats):
            result = torch.tanh(result @ matrix)
        return result

    return run


def _session(
    tasks: Sequence[TimedTask],
    warm: Mapping[str, WarmUp],
    seconds: float,
    rounds: int,
    clock: Callable[[], float],
    probe: Callable[[], object],
) -> Session:
    timings = {task.name: Timing(task) for task in tasks}
    probes: list[float] = []
    slice_seconds = seconds / rounds
    probe()
    for number in range(rounds):
        durations = []
        for _ in range(3):
            start = clock()
            probe()
            durations.append(clock() - start)
        probes.append(min(durations))
        # back and forth, so that no task always follows the same other one or always comes last
        order = tasks if number % 2 == 0 else list(reversed(tasks))
        for task in order:
            calls: list[float] = []
            used = 0.0
            # one interrupted call must not be a round's only one where there is time for more
            least = min(5, max(1, int(slice_seconds / warm[task.name].call)))
            while len(calls) < least or used + calls[-1] / 2 < slice_seconds:
                start = clock()
                task.call()
                calls.append(clock() - start)
                used += calls[-1]
            timings[task.name].rounds.append(calls)
    return Session(timings, probes, 0, [], [])


def _warm_up(task: TimedTask, limit: float, clock: Callable[[], float]) -> WarmUp:
    """Call until the last few calls take as long as the few before, or `limit` seconds have passed."""
    start = clock()
    task.call()
    first = clock() - start
    durations: list[float] = []
    began = clock()
    while True:
        start = clock()
        task.call()
        durations.append(clock() - start)
        recent = statistics.median(durations[-_STEADY_WINDOW:])
        if len(durations) >= 2 * _STEADY_WINDOW:
            before = statistics.median(durations[-2 * _STEADY_WINDOW : -_STEADY_WINDOW])
            if abs(recent / before - 1) <= DRIFT:
                return WarmUp(first, recent, len(durations) + 1, True)
        if clock() - began >= limit and len(durations) >= 2:
            # too slow to see six calls is not unsteady: the drift check over the rounds still watches it
            return WarmUp(first, recent, len(durations) + 1, len(durations) < 2 * _STEADY_WINDOW)


def _warnings(session: Session, warm: Mapping[str, WarmUp]) -> list[str]:
    found = []
    slower = -drift([1 / p for p in session.probe])
    if slower > DRIFT:
        found.append(
            f"throttling: the machine itself became {100 * slower:.0f} % slower during the measurement "
            "(fixed arithmetic, no model); let it cool or fix its clock, and measure again"
        )
    elif session.noise > 0.5:
        advice = "ratios between models hold better than absolute figures"
        if session.noise > UNTRUSTED:
            advice = "ratios between models are withheld: measure again when the machine is idle"
        found.append(
            f"noise: fixed arithmetic took up to {100 * session.noise:.0f} % longer in some rounds, so other work ran "
            f"on this machine; {advice}"
        )
    for name in session.drifting:
        change = 100 * drift(session.timings[name].rates())
        found.append(f"{name}: the rate still drifted ({change:+.0f} %) after {session.reruns} repetitions")
    unsteady = [name for name, warm_up in warm.items() if not warm_up.steady]
    if unsteady:
        found.append(f"no steady state was reached in the warm-up of {', '.join(unsteady)}")
    return found
