"""Claims judged from results: supported, contradicted or undecided, and what would decide them.

    verdicts = judge(read_claims("published"), read_records(folders))

A claim is one line of a small language, or several joined by " and ":

    clip-rd > clip-kd on flickr8k t2i_R@1              the first is better (by 0.01: "... > clip-kd by 0.01 on ...")
    clip-rd keeps >= 90 % of teacher on cifar10 top1   ratio of scores
    clip-kd >= 10 x teacher on * pairs_per_second      ratio of anything
    clip-rd >= 0.4 on flickr8k t2i_R@1                 the score itself

`*` as data set means each one that has results. A verdict needs an interval, and a claim about methods needs several
training seeds: the interval adds the spread over seeds (Student's t, paired where both sides have the same seeds) to
the sampling of the test queries (bootstrap, clustered by image, on the same queries), as independent errors add.
Without one of the two the claim is undecided.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from clipdistill.config import Config, build, read_yaml
from clipdistill.errors import InputError
from clipdistill.statistics.bootstrap import bootstrap, bootstrap_difference, bootstrap_ratio, holm, seed_interval
from clipdistill.statistics.records import Record

Outcome = Literal["supported", "contradicted", "undecided"]
Measure = Literal["difference", "ratio", "value"]
PUBLISHED = "published"
MOST_SEEDS = 1000
_LEAST_P = 1e-12
"""p-values are not told apart below this."""

_NUMBER = r"(?P<number>-?\d+(?:\.\d+)?)"
_WHERE = r"(?: on (?P<dataset>\S+))? (?P<metric>\S+)"
_FORMS: tuple[tuple[re.Pattern[str], Literal["difference", "ratio", "value", "share"]], ...] = (
    (re.compile(rf"(?P<left>\S+) > (?P<right>[^\s\d]\S*)(?: by {_NUMBER})?{_WHERE}"), "difference"),
    (re.compile(rf"(?P<left>\S+) keeps >= {_NUMBER} ?% of (?P<right>\S+){_WHERE}"), "share"),
    (re.compile(rf"(?P<left>\S+) >= {_NUMBER} ?x (?P<right>\S+){_WHERE}"), "ratio"),
    (re.compile(rf"(?P<left>\S+) >= {_NUMBER}{_WHERE}"), "value"),
)


@dataclass(frozen=True)
class Statement:
    """One comparison: measure(left, right) reaches `threshold` ("difference": exceeds it) in `metric` on `dataset`."""

    left: str
    right: str | None
    measure: Measure
    threshold: float
    metric: str
    dataset: str | None

    @classmethod
    def parse(cls, text: str) -> Statement:
        """Read one line of the claim language; InputError that shows the forms."""
        for pattern, kind in _FORMS:
            match = pattern.fullmatch(" ".join(text.split()))
            if match is None:
                continue
            found = match.groupdict()
            number = float(found["number"]) if found.get("number") else 0.0
            measure: Measure = "ratio" if kind == "share" else kind
            dataset = None if found["dataset"] in (None, "*") else found["dataset"]
            threshold = number / 100 if kind == "share" else number
            return cls(found["left"], found.get("right"), measure, threshold, found["metric"], dataset)
        raise InputError(
            f"the claim '{text}' is not understood: write 'a > b on DATA METRIC', 'a keeps >= 90 % of b on DATA"
            " METRIC', 'a >= 10 x b on DATA METRIC' or 'a >= 0.4 on DATA METRIC'"
        )


class Claim(Config):
    """One claim of a YAML file. claim: the text to judge; source: who made it; published: the figures as printed;
    note: what to know when reading them."""

    id: str
    claim: str
    source: str | None = None
    published: dict[str, Any] = Field(default_factory=dict)
    note: str | None = None

    @field_validator("claim")
    @classmethod
    def _readable(cls, text: str) -> str:
        for part in text.split(" and "):
            Statement.parse(part)
        return text

    def statements(self) -> list[Statement]:
        """The comparisons that must all hold."""
        return [Statement.parse(part) for part in self.claim.split(" and ")]


class _ClaimFile(Config):
    claims: tuple[Claim, ...]


@dataclass(frozen=True)
class Verdict:
    """What the results say of one claim on one data set.

    effect with interval [low, high] against `threshold`; seeds: training seeds behind it; queries, images: test queries
    and the images they share; p: two-sided, against the threshold (None without an interval), p_holm: adjusted over
    all judged claims; seeds_needed: in all, to decide, if mean and spread stay (None: no number of seeds would, or it
    cannot be told); images_needed: test images that would decide when seeds would not. parts: of a joint claim.
    """

    id: str
    claim: str
    outcome: Outcome
    reason: str
    dataset: str | None = None
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    threshold: float | None = None
    seeds: int = 0
    queries: int | None = None
    images: int | None = None
    p: float | None = None
    p_holm: float | None = None
    seeds_needed: int | None = None
    images_needed: int | None = None
    source: str | None = None
    published: dict[str, Any] = field(default_factory=dict)
    note: str | None = None
    parts: tuple[Verdict, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; infinite bounds (one seed) become None."""
        return _plain(asdict(self))


def read_claims(source: str | Path) -> list[Claim]:
    """Claims of a YAML file {claims: [{id, claim, source, published, note}]}, or "published": the shipped ones."""
    if str(source) == PUBLISHED:
        with resources.as_file(resources.files("clipdistill.statistics").joinpath("published_claims.yaml")) as path:
            values = read_yaml(path)
    else:
        values = read_yaml(Path(source))
    claims = list(build(_ClaimFile, values, str(source)).claims)
    names = [claim.id for claim in claims]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{source}: two claims have the id '{name}'")
    return claims


def judge(
    claims: Iterable[Claim | str], records: Iterable[Mapping[str, Any] | Record], *, level: float = 0.95
) -> list[Verdict]:
    """A verdict for each claim and data set, in the order of the claims. Claims may be plain lines of text.

    records: see `Record`. A claim is supported when the whole interval lies beyond its threshold, contradicted when it
    lies before it, else undecided.
    """
    listed = [Record.of(record) for record in records]
    verdicts: list[Verdict] = []
    for claim in claims:
        if isinstance(claim, str):
            claim = build(Claim, {"id": claim, "claim": claim}, "claim")
        verdicts += _judge_claim(claim, listed, level)
    known = [i for i, verdict in enumerate(verdicts) if verdict.p is not None]
    for i, p in zip(known, holm([verdicts[i].p or 0.0 for i in known]), strict=True):
        verdicts[i] = replace(verdicts[i], p_holm=p)
    return verdicts


def judge_difference(left: Sequence[Record], right: Sequence[Record], *, level: float = 0.95) -> Verdict:
    """The verdict on "left is better than right" from their records of one metric on one data set, one each seed.

    Raises InputError when the records were measured under different protocols.
    """
    one = left[0]
    protocols = sorted({str(record.protocol) for record in (*left, *right)})
    if len(protocols) > 1:
        raise InputError(f"{one.metric} was measured under different protocols: {'; '.join(protocols)}")
    text = f"{one.method} > {right[0].method} in {one.metric}"
    statement = Statement(one.method, right[0].method, "difference", 0.0, one.metric, one.dataset)
    base = Verdict(text, text, "undecided", "", one.dataset, threshold=0.0)
    return _weigh(base, statement, [list(left), list(right)], level)


def _judge_claim(claim: Claim, records: Sequence[Record], level: float) -> list[Verdict]:
    statements = claim.statements()
    found: dict[str | None, list[Verdict]] = {}
    for statement in statements:
        for dataset in _datasets(statement, records):
            found.setdefault(dataset, []).append(_judge_statement(claim, statement, dataset, records, level))
    if len(statements) == 1:
        verdicts = [verdict for group in found.values() for verdict in group]
    else:
        # parts that hold everywhere (a speed has no data set) belong to every data set
        everywhere = found.pop(None, []) if len(found) > 1 else []
        verdicts = [_joint(claim, dataset, everywhere + parts, len(statements)) for dataset, parts in found.items()]
    return [replace(v, source=claim.source, published=claim.published, note=claim.note) for v in verdicts]


def _joint(claim: Claim, dataset: str | None, parts: list[Verdict], statements: int) -> Verdict:
    """Contradicted when a part is, supported when all are."""
    outcomes = {part.outcome for part in parts}
    outcome: Outcome = "undecided"
    if "contradicted" in outcomes:
        outcome = "contradicted"
    elif outcomes == {"supported"} and len(parts) == statements:
        outcome = "supported"
    reason = "; ".join(f"{part.outcome}: {part.reason}" for part in parts)
    return Verdict(claim.id, claim.claim, outcome, reason, dataset, parts=tuple(parts))


def _datasets(statement: Statement, records: Sequence[Record]) -> list[str | None]:
    if statement.dataset is not None:
        return [statement.dataset]
    sides = {statement.left, statement.right} - {None}
    seen = [r.dataset for r in records if r.metric == statement.metric and r.method in sides]
    return list(dict.fromkeys(seen)) or [None]


def _judge_statement(
    claim: Claim, statement: Statement, dataset: str | None, records: Sequence[Record], level: float
) -> Verdict:
    text = claim.claim if dataset is None or statement.dataset else f"{claim.claim} [{dataset}]"
    base = Verdict(claim.id, text, "undecided", "", dataset, threshold=statement.threshold)
    sides: list[list[Record]] = []
    for method in (statement.left, statement.right):
        if method is None:
            continue
        own = [r for r in records if (r.method, r.metric) == (method, statement.metric) and r.dataset == dataset]
        if not own:
            where = f" on {dataset}" if dataset else ""
            return replace(base, reason=f"no result of {method} in {statement.metric}{where}")
        sides.append(own)
    protocols = {r.protocol for side in sides for r in side}
    if len(protocols) > 1:
        listed = "; ".join(sorted(str(p) for p in protocols))
        return replace(base, reason=f"the results were measured under different protocols ({listed})")
    return _weigh(base, statement, sides, level)


@dataclass(frozen=True)
class _Effect:
    """Measure by seed, and what is uncertain about it."""

    by_seed: np.ndarray
    trained: bool  # whether a training seed stands behind any side
    sampling: tuple[float, float] | None  # half-widths below and above from the test queries (or timing rounds)
    queries: int | None
    images: int | None


def _weigh(base: Verdict, statement: Statement, sides: list[list[Record]], level: float) -> Verdict:
    """The verdict from the records of the two sides."""
    try:
        effect = _effect(statement, sides, level)
    except InputError as error:
        return replace(base, reason=str(error))
    seeds = len(effect.by_seed)
    value = float(effect.by_seed.mean())
    base = replace(base, effect=value, seeds=seeds if effect.trained else 0)
    base = replace(base, queries=effect.queries, images=effect.images)
    if effect.trained and seeds < 2:
        return replace(base, reason="one training seed: how much training varies is not known; train at least 2 seeds")
    spread = 0.0
    if effect.trained:
        interval = seed_interval(effect.by_seed, level=level)
        spread = interval.high - interval.value
    if effect.sampling is None:
        return replace(
            base,
            low=value - spread,
            high=value + spread,
            reason="the per-query results were not kept, so the uncertainty of the test set is not known",
        )
    below, above = (math.hypot(spread, part) for part in effect.sampling)
    base = replace(base, low=value - below, high=value + above)
    distance = abs(value - statement.threshold)
    own = effect.sampling[0 if value > statement.threshold else 1]
    base = replace(base, p=_p_value(distance, spread, seeds if effect.trained else 0, own, level))
    low, threshold = value - below, statement.threshold
    if low > threshold or (statement.measure != "difference" and low >= threshold):
        return replace(base, outcome="supported", reason="the whole interval lies beyond the threshold")
    if value + above < statement.threshold:
        return replace(base, outcome="contradicted", reason="the whole interval lies short of the threshold")
    return _undecided(base, effect, distance, level)


def _undecided(base: Verdict, effect: _Effect, distance: float, level: float) -> Verdict:
    """Why the interval holds the threshold, and what would narrow it enough."""
    sampling = max(effect.sampling or (0.0, 0.0))
    if distance > sampling and effect.trained:
        needed = _seeds_needed(effect.by_seed, math.sqrt(distance**2 - sampling**2), level)
        if needed is not None:
            more = max(1, needed - len(effect.by_seed))
            reason = f"the interval holds the threshold; about {more} more seeds would decide, if mean and spread stay"
            return replace(base, reason=reason, seeds_needed=max(needed, len(effect.by_seed) + 1))
        return replace(base, reason=f"the interval holds the threshold; not even {MOST_SEEDS} seeds would decide")
    reason = f"the test set alone is worth +-{sampling:.4f}, more than the distance of {distance:.4f}"
    if effect.images and distance > 0:
        images = math.ceil(effect.images * (sampling / distance) ** 2)
        if images < 10_000_000:
            return replace(
                base,
                reason=f"{reason}: no number of seeds decides; more than {images:,} test images might",
                images_needed=images,
            )
    return replace(base, reason=f"{reason}: no number of seeds decides")


def _effect(statement: Statement, sides: list[list[Record]], level: float) -> _Effect:
    """Pair the seeds of the two sides and measure the effect for each."""
    trained = any(r.seed is not None for side in sides for r in side)
    by_seed = [_by_seed(side) for side in sides]
    if len(sides) == 1:
        pairs: list[tuple[Record, Record | None]] = [(one, None) for one in by_seed[0].values()]
    else:
        left, right = by_seed
        shared = sorted(set(left) & set(right), key=str)
        if shared:
            pairs = [(left[seed], right[seed]) for seed in shared]
        elif len(left) == 1 and None in left:
            pairs = [(left[None], other) for other in right.values()]
        elif len(right) == 1 and None in right:
            pairs = [(one, right[None]) for one in left.values()]
        else:
            raise InputError("the two sides share no training seed, so they cannot be paired")
    values = np.array([_measure(statement.measure, a.value, b.value if b else None) for a, b in pairs])
    sampling, queries, images = _sampling(statement.measure, pairs, level)
    return _Effect(values, trained, sampling, queries, images)


def _by_seed(side: Sequence[Record]) -> dict[int | None, Record]:
    found: dict[int | None, Record] = {}
    for record in side:
        if record.seed in found:
            raise InputError(f"two results of {record.method} have the seed {record.seed}")
        found[record.seed] = record
    return found


def _measure(measure: str, a: float, b: float | None) -> float:
    if b is None:
        return a
    if measure == "difference":
        return a - b
    if b == 0:
        raise InputError("the ratio to a score of 0 is not defined")
    return a / b


def _sampling(
    measure: str, pairs: Sequence[tuple[Record, Record | None]], level: float
) -> tuple[tuple[float, float] | None, int | None, int | None]:
    """Half-widths below and above of the mean effect from the sampling of test queries; queries; images.

    Per-query results are averaged over seeds first: all seeds were tested on the same queries. Measurements without
    queries (speeds) bring their own interval.
    """
    records = [record for pair in pairs for record in pair if record is not None]
    if all(r.per_query is not None for r in records):
        sides = [
            np.stack([np.asarray(r.per_query, dtype=np.float64) for r in side]).mean(axis=0) for side in _columns(pairs)
        ]
        clusters = records[0].clusters
        if len({len(side) for side in sides}) > 1:
            raise InputError("the two sides were tested on different numbers of queries")
        if len(sides) == 1:
            interval = bootstrap(sides[0], clusters, level=level)
        elif measure == "difference":
            interval = bootstrap_difference(sides[0], sides[1], clusters, level=level)
        else:
            interval = bootstrap_ratio(sides[0], sides[1], clusters, level=level)
        halves = (max(0.0, interval.value - interval.low), max(0.0, interval.high - interval.value))
        return halves, interval.n, interval.clusters
    if all(r.low is not None and r.high is not None for r in records) and all(r.seed is None for r in records):
        values = [_spread(measure, *pair) for pair in pairs]
        return (max(v[0] for v in values), max(v[1] for v in values)), None, None
    return None, None, None


def _columns(pairs: Sequence[tuple[Record, Record | None]]) -> list[list[Record]]:
    left = [a for a, _ in pairs]
    right = [b for _, b in pairs if b is not None]
    return [left, right] if right else [left]


def _spread(measure: str, a: Record, b: Record | None) -> tuple[float, float]:
    """Half-widths of an effect of two measurements with intervals of their own, the widest they allow."""
    a_low, a_high = float(a.low or 0), float(a.high or 0)
    if b is None:
        return a.value - a_low, a_high - a.value
    b_low, b_high = float(b.low or 0), float(b.high or 0)
    centre = _measure(measure, a.value, b.value)
    if measure == "difference":
        return centre - (a_low - b_high), (a_high - b_low) - centre
    return centre - a_low / b_high, (a_high / b_low if b_low > 0 else math.inf) - centre


def _seeds_needed(values: np.ndarray, distance: float, level: float) -> int | None:
    """Seeds at which Student's t interval is narrower than `distance` to both sides."""
    from scipy import stats

    spread = float(values.std(ddof=1))
    n = np.arange(2, MOST_SEEDS + 1)
    enough = stats.t.ppf((1 + level) / 2, n - 1) * spread / np.sqrt(n) < distance
    return int(n[np.argmax(enough)]) if enough.any() else None


def _p_value(distance: float, spread: float, seeds: int, sampling: float, level: float) -> float:
    """Two-sided p of an effect that is `distance` away: the level at which the interval would just reach that far.

    spread: half-width from Student's t over `seeds` (0: nothing was trained); sampling: half-width, taken as a
    normal's. Inverting the interval keeps the two in agreement: p is below 0.05 exactly where the 95 % interval ends
    before the threshold.
    """
    from scipy import optimize, stats

    share = (1 + level) / 2
    trained = spread / float(stats.t.ppf(share, seeds - 1)) if seeds > 1 else 0.0
    sampled = sampling / float(stats.norm.ppf(share))
    if trained == sampled == 0:
        return float(distance == 0)

    def excess(log_p: float) -> float:
        tail = math.exp(log_p) / 2
        by_seeds = trained * float(stats.t.isf(tail, seeds - 1)) if trained else 0.0
        return math.hypot(by_seeds, sampled * float(stats.norm.isf(tail))) - distance

    least = math.log(_LEAST_P)
    if excess(least) <= 0:
        return _LEAST_P
    if excess(0.0) >= 0:  # no distance at all
        return 1.0
    return math.exp(optimize.brentq(excess, least, 0.0, xtol=1e-10))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
