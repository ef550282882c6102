"""Two models, or two ways of training with several seeds each, compared on the same queries under the same protocol.

comparison = compare([Path("runs/a")], [Path("runs/b")])
comparison.differences[0].verdict.outcome
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError
from clipdistill.statistics.bootstrap import Comparison, holm, mcnemar, paired_bootstrap, paired_seeds, welch
from clipdistill.statistics.claims import Verdict, judge_difference
from clipdistill.statistics.protocol import Protocol, difference
from clipdistill.statistics.records import Record
from clipdistill.statistics.scores import Scores

_TESTED = ("t2i_R@1", "i2t_R@1", "t2i_R@5", "i2t_R@5", "t2i_R@10", "i2t_R@10", "t2i_MRR", "i2t_MRR", "top1", "top5")
"""Metrics compared unless others are named: where there are per-query results, and a mean of them is the score."""


@dataclass(frozen=True)
class Side:
    """What is compared: one score list for each seed. seeds: of the runs, None where the files do not say."""

    name: str
    seeds: tuple[int | None, ...]
    scores: tuple[Scores, ...]
    model: str


@dataclass(frozen=True)
class Tested:
    """a - b in one metric under one protocol.

    over_queries: bootstrap and permutation on the same queries (results averaged over seeds); over_seeds: Student's t,
    paired where both sides have the same seeds, else Welch's; verdict: both together, for several shared seeds;
    mcnemar: (p, only a right, only b right) of single classifiers; p_holm: adjusted over the metrics compared.
    """

    metric: str
    protocol: Protocol
    a: float
    b: float
    over_queries: Comparison | None
    over_seeds: Comparison | None
    verdict: Verdict | None
    mcnemar: tuple[float, int, int] | None
    p: float | None
    p_holm: float | None = None

    @property
    def value(self) -> float:
        return self.a - self.b

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The interval that holds everything known to be uncertain."""
        if self.verdict is not None and self.verdict.low is not None and self.verdict.high is not None:
            return self.verdict.low, self.verdict.high
        return None if self.over_queries is None else (self.over_queries.low, self.over_queries.high)

    @property
    def outcome(self) -> str:
        """'a', 'b' (which is better) or 'undecided', by interval and adjusted p."""
        bounds = self.bounds
        if bounds is None or self.p_holm is None or self.p_holm >= 0.05 or bounds[0] <= 0 <= bounds[1]:
            return "undecided"
        return "a" if bounds[0] > 0 else "b"


@dataclass(frozen=True)
class ModelComparison:
    """All metrics of two sides. seeds: shared ones (0: the two are single models)."""

    a: Side
    b: Side
    seeds: int
    differences: tuple[Tested, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "format": 1,
            "a": {"name": self.a.name, "seeds": list(self.a.seeds)},
            "b": {"name": self.b.name, "seeds": list(self.b.seeds)},
            "shared_seeds": self.seeds,
            "differences": [
                {
                    "metric": t.metric,
                    "protocol": t.protocol.label(),
                    "a": t.a,
                    "b": t.b,
                    "difference": t.value,
                    "low": None if t.bounds is None else t.bounds[0],
                    "high": None if t.bounds is None else t.bounds[1],
                    "p": t.p,
                    "p_holm": t.p_holm,
                    "outcome": t.outcome,
                    "over_queries": None if t.over_queries is None else asdict(t.over_queries),
                    "over_seeds": None if t.over_seeds is None else asdict(t.over_seeds),
                    "mcnemar": t.mcnemar,
                    "seeds_needed": None if t.verdict is None else t.verdict.seeds_needed,
                }
                for t in self.differences
            ],
        }


def compare(
    a: Sequence[Path], b: Sequence[Path], *, metrics: Sequence[str] = (), model: str = "student"
) -> ModelComparison:
    """Compare the models of two lists of run folders (or files of scores): a list holds the seeds of one method.

    metrics: which (default: R@K, MRR, top-1, top-5). model: whose scores in the files, "student" or "teacher".
    Raises InputError when the two were measured on the same data under different protocols, or share no measurement.
    """
    sides = read_side(a, model), read_side(b, model)
    shared = _shared_protocols(*sides)
    seeds = _shared_seeds(*sides)
    found = []
    for protocol in shared:
        for metric in _metrics(sides, protocol, metrics):
            found.append(_tested(metric, protocol, sides, seeds))
    if not found:
        raise InputError(
            f"{sides[0].name} and {sides[1].name} have none of the metrics {', '.join(metrics or _TESTED)}"
        )
    known = [i for i, t in enumerate(found) if t.p is not None]
    for i, p in zip(known, holm([found[i].p or 0.0 for i in known]), strict=True):
        found[i] = replace(found[i], p_holm=p)
    return ModelComparison(*sides, len(seeds), tuple(found))


def read_side(paths: Sequence[Path], model: str) -> Side:
    """The scores of one side: run folders, or JSON files that `clipdistill eval --json` wrote."""
    if not paths:
        raise InputError("compare: a side needs at least one run folder")
    seeds: list[int | None] = []
    scores: list[Scores] = []
    names: list[str] = []
    for path in paths:
        file = path / "scores.json" if path.is_dir() else path
        if path.is_dir() and not file.is_file():
            raise InputError(
                f"{path}: no scores.json there; measure the run with  "
                f"clipdistill eval {path} --data ... --json {path}/scores.json"
            )
        found = Scores.load(file)
        if model not in found.models():
            raise InputError(
                f"{file}: no scores of the {model}; it holds those of {', '.join(found.models()) or 'none'}"
            )
        described = path / "run.json"
        facts = json.loads(described.read_text(encoding="utf-8")) if described.is_file() else {}
        seed = facts.get("seed")
        if seed is not None and seed in seeds:
            raise InputError(f"{path}: another run of this side has the seed {seed} too; two methods are two sides")
        seeds.append(seed)
        scores.append(found)
        names.append(str(facts.get("method") or path.stem) if len(paths) > 1 else path.name)
    return Side(" + ".join(dict.fromkeys(names)), tuple(seeds), tuple(scores), model)


def _protocols(side: Side) -> Iterator[dict[Any, Protocol]]:
    for scores in side.scores:
        yield {s.protocol.question(): s.protocol for s in scores if s.model == side.model}


def _shared_protocols(a: Side, b: Side) -> list[Protocol]:
    """Protocols that every file of both sides has. InputError for the same data set under different ones."""
    listed = [*_protocols(a), *_protocols(b)]
    shared = [protocol for question, protocol in listed[0].items() if all(question in other for other in listed[1:])]
    taken = {(protocol.task, protocol.dataset) for protocol in shared}
    for other in listed[1:]:
        for ours in listed[0].values():
            for theirs in other.values():
                place = (ours.task, ours.dataset)
                if place == (theirs.task, theirs.dataset) and place not in taken:
                    raise InputError(
                        f"{a.name} and {b.name} were measured under different protocols on {ours.dataset} "
                        f"({difference(ours, theirs)}), so their scores are not compared: measure both with the same "
                        "`clipdistill eval`"
                    )
    if not shared:
        sets = [
            ", ".join(sorted({p.dataset for p in group.values()})) or "nothing" for group in (listed[0], listed[-1])
        ]
        raise InputError(f"{a.name} was measured on {sets[0]}, {b.name} on {sets[1]}: no data set in common")
    return shared


def _shared_seeds(a: Side, b: Side) -> list[int]:
    """Seeds that both sides have, where there are several on a side."""
    if max(len(a.seeds), len(b.seeds)) < 2:
        return []
    return sorted({s for s in a.seeds if s is not None} & {s for s in b.seeds if s is not None})


def _metrics(sides: tuple[Side, Side], protocol: Protocol, wanted: Sequence[str]) -> list[str]:
    present = [
        {s.metric for s in scores if s.model == side.model and s.protocol.question() == protocol.question()}
        for side in sides
        for scores in side.scores
    ]
    return [metric for metric in (wanted or _TESTED) if all(metric in group for group in present)]


def _tested(metric: str, protocol: Protocol, sides: tuple[Side, Side], seeds: list[int]) -> Tested:
    records = [_records(side, metric, protocol) for side in sides]
    if seeds:
        paired = [[record for record in group if record.seed in seeds] for group in records]
        paired = [sorted(group, key=lambda record: record.seed or 0) for group in paired]
    else:
        paired = records
    values = [[record.value for record in group] for group in paired]
    over_queries = over_seeds = verdict = mc = None
    if all(record.per_query is not None for group in paired for record in group):
        means = [np.mean([np.asarray(r.per_query, dtype=np.float64) for r in group], axis=0) for group in paired]
        clusters = paired[0][0].clusters
        over_queries = paired_bootstrap(means[0], means[1], clusters)
        if clusters is None and len(paired[0]) == len(paired[1]) == 1 and metric == "top1":
            mc = mcnemar(means[0], means[1])
    p = None if over_queries is None else over_queries.p
    if len(seeds) > 1:
        over_seeds = paired_seeds(values[0], values[1])
        verdict = judge_difference(paired[0], paired[1])
        p = verdict.p
    elif min(len(values[0]), len(values[1])) > 1:  # several seeds, none in common: the unpaired test stands alone
        over_seeds = welch(values[0], values[1])
        p = max(over_seeds.p, p or 0.0)
    return Tested(
        metric, protocol, float(np.mean(values[0])), float(np.mean(values[1])), over_queries, over_seeds, verdict, mc, p
    )


def _records(side: Side, metric: str, protocol: Protocol) -> list[Record]:
    question = protocol.question()
    found = []
    for seed, scores in zip(side.seeds, side.scores, strict=True):
        score = next(
            s for s in scores if s.model == side.model and s.metric == metric and s.protocol.question() == question
        )
        queries = scores.queries.get((side.model, question))
        found.append(
            Record(
                method=side.name,
                metric=metric,
                value=score.value,
                seed=seed,
                dataset=protocol.dataset,
                protocol=protocol.label(),
                per_query=None if queries is None else queries.values.get(metric),
                clusters=None if queries is None else queries.clusters.get(metric),
            )
        )
    return found
