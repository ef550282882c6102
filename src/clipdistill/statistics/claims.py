"""Claims judged from results: supported, contradicted or undecided, and what would decide them.

    verdicts = judge(read_claims("published"), read_records(folders))

A claim is one line of a small language, or several joined by " and ":

    clip-rd > clip-kd on flickr8k t2i_R@1              the first is better (by 0.01: "... > clip-kd by 0.01 on ...")
    clip-rd keeps >= 90 % of teacher on cifar10 top1   ratio of scores
    clip-kd >= 10 x teacher on * pairs_per_second      ratio of anything
    clip-rd >= 0.4 on flickr8k t2i_R@1                 the score itself

`*` as data set means each one that has results. Each statement is decided by `judge.decide`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from clipdistill.config import Config, build, read_yaml
from clipdistill.errors import InputError
from clipdistill.statistics.judge import Measure, Outcome, Verdict, adjust, decide
from clipdistill.statistics.records import SPEED, Record

PUBLISHED = "published"
_AND = " and "
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
            if kind == "share" and found["metric"].endswith("median_rank"):
                raise InputError(f"the claim '{text}': of a rank the lower is better, so none is kept: write 'a > b'")
            measure: Measure = "ratio" if kind == "share" else kind
            dataset = None if found["dataset"] in (None, "*") else found["dataset"]
            threshold = number / 100 if kind == "share" else number
            return cls(found["left"], found.get("right"), measure, threshold, found["metric"], dataset)
        raise InputError(
            f"the claim '{text}' is not understood: write 'a > b on DATA METRIC', 'a keeps >= 90 % of b on DATA"
            " METRIC', 'a >= 10 x b on DATA METRIC' or 'a >= 0.4 on DATA METRIC'"
        )


class Claim(Config):
    """One claim of a YAML file."""

    id: str
    """Name of the claim in reports."""
    claim: str
    """The text to judge, in the claim language (docs/ablation.md)."""
    source: str | None = None
    """Who made it."""
    published: dict[str, Any] = Field(default_factory=dict)
    """The figures as printed."""
    note: str | None = None
    """What to know when reading them."""

    @field_validator("claim")
    @classmethod
    def _readable(cls, text: str) -> str:
        for part in text.split(_AND):
            Statement.parse(part)
        return text

    def statements(self) -> list[Statement]:
        """The comparisons that must all hold."""
        return [Statement.parse(part) for part in self.claim.split(_AND)]


class _ClaimFile(Config):
    claims: tuple[Claim, ...]


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


def is_claim(text: str) -> bool:
    """Whether a text is of the claim language."""
    try:
        return bool(Claim(id="", claim=text))
    except ValueError:  # InputError among them
        return False


def is_measured(verdict: Verdict) -> bool:
    """Whether the results say anything of the claim."""
    return verdict.effect is not None or any(part.effect is not None for part in verdict.parts)


def judge(
    claims: Iterable[Claim | str], records: Iterable[Mapping[str, Any] | Record], *, level: float = 0.95
) -> list[Verdict]:
    """A verdict for each claim and data set, in the order of the claims, with Holm's p over all of them.

    Claims may be plain lines of text. records: see `Record`. A claim is supported when the whole interval lies beyond
    its threshold, contradicted when it lies before it, else undecided.
    """
    listed = [Record.of(record) for record in records]
    verdicts: list[Verdict] = []
    for claim in claims:
        if isinstance(claim, str):
            claim = build(Claim, {"id": claim, "claim": claim}, "claim")
        verdicts += _judge_claim(claim, listed, level)
    return adjust(verdicts)


def _judge_claim(claim: Claim, records: Sequence[Record], level: float) -> list[Verdict]:
    statements = claim.statements()
    found: dict[str | None, list[Verdict]] = {}
    for text, statement in zip(claim.claim.split(_AND), statements, strict=True):
        for dataset in _datasets(statement, records):
            verdict = _judge_statement(claim.id, text, statement, dataset, records, level)
            # of several statements, what names its data set must hold beside each data set of the others
            group = None if len(statements) > 1 and statement.dataset else dataset
            found.setdefault(group, []).append(verdict)
    if len(statements) == 1:
        verdicts = [verdict for group in found.values() for verdict in group]
    else:
        # parts that hold everywhere (a speed has no data set) belong to every data set
        everywhere = found.pop(None, [])
        named = {part.dataset for part in everywhere} - {None}
        groups = found or {named.pop() if len(named) == 1 else None: []}
        verdicts = [_joint(claim, dataset, everywhere + parts, len(statements)) for dataset, parts in groups.items()]
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
    name: str, text: str, statement: Statement, dataset: str | None, records: Sequence[Record], level: float
) -> Verdict:
    text = text if dataset is None or statement.dataset else f"{text} [{dataset}]"
    base = Verdict(name, text, dataset=dataset, threshold=statement.threshold)
    sides: list[list[Record]] = []
    for method in (statement.left, statement.right):
        if method is None:
            continue
        own = [r for r in records if (r.method, r.metric) == (method, statement.metric) and r.dataset == dataset]
        if not own:
            where = f" on {dataset}" if dataset else ""
            return replace(base, reason=f"no result of {method} in {statement.metric}{where}")
        sides.append(own)
    if statement.metric == SPEED and len(sides) == 2:  # of several devices one that both were measured on
        shared = next((r.protocol for r in sides[0] if r.protocol in {r.protocol for r in sides[1]}), None)
        sides = [[r for r in side if shared in (None, r.protocol)] for side in sides]
    measure, threshold = statement.measure, statement.threshold
    return decide(*sides, measure=measure, threshold=threshold, level=level, about=base)
