"""Two models, or two ways of training with several seeds each, compared on the same queries under the same protocol.

comparison = compare([Path("runs/a")], [Path("runs/b")])
comparison.differences[0].verdict.better
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.arguments import checked
from clipdistill.errors import InputError
from clipdistill.runs.folder import RunFolder
from clipdistill.runtime.console import Coloured, TextTable, html_page
from clipdistill.statistics.bootstrap import mcnemar
from clipdistill.statistics.judge import Verdict, adjust, decide
from clipdistill.statistics.protocol import Protocol, difference
from clipdistill.statistics.records import Record, records_of
from clipdistill.statistics.scores import BENCHMARKS, FILE, Scores
from clipdistill.statistics.verdicts import basis_text, better_text, bounds_text, more_seeds, p_text

_TESTED = (
    "t2i_R@1",
    "i2t_R@1",
    "t2i_R@5",
    "i2t_R@5",
    "t2i_R@10",
    "i2t_R@10",
    "t2i_MRR",
    "i2t_MRR",
    "top1",
    "top5",
    *BENCHMARKS,
)
"""Metrics compared unless others are named: where there are per-query results, and a mean of them is the score."""


@dataclass(frozen=True)
class ComparedSide:
    """What is compared: the records of each seed. seeds: of the runs, None where the files do not say."""

    name: str
    seeds: tuple[int | None, ...]
    records: tuple[tuple[Record, ...], ...]
    model: str

    def of(self, metric: str, protocol: Protocol) -> list[Record]:
        """The records of one metric, one each seed."""
        question = protocol.question()
        return [next(r for r in run if r.metric == metric and r.question == question) for run in self.records]


@dataclass(frozen=True)
class MetricComparison:
    """a - b in one metric under one protocol. mcnemar: (p, only a right, only b right) of single classifiers."""

    metric: str
    protocol: Protocol
    a: float
    b: float
    verdict: Verdict
    mcnemar: tuple[float, int, int] | None

    @property
    def value(self) -> float:
        """The difference a - b, in fractions."""
        return self.a - self.b

    @property
    def outcome(self) -> str:
        """'a', 'b' (which is better) or 'undecided'."""
        return {"better": "a", "worse": "b"}.get(self.verdict.better, "undecided")


@dataclass(frozen=True)
class ModelComparison:
    """All metrics of two sides."""

    a: ComparedSide
    b: ComparedSide
    differences: tuple[MetricComparison, ...]

    @property
    def shared_seeds(self) -> int:
        """Seeds that both sides have, where there are several on a side."""
        if max(len(self.a.seeds), len(self.b.seeds)) < 2:
            return 0
        return len({s for s in self.a.seeds if s is not None} & {s for s in self.b.seeds if s is not None})

    def tables(self) -> list[TextTable]:
        """A table a protocol: a row a metric, the difference in points with its 95 % interval, p, which is better."""
        found = []
        for label in dict.fromkeys(t.protocol.label() for t in self.differences):
            rows = [t for t in self.differences if t.protocol.label() == label]
            reasons = dict.fromkeys(t.verdict.reason for t in rows if t.verdict.p is None)
            found.append(replace(_table(rows), title=label, caption=" ".join(reasons)))
        return found

    def __repr__(self) -> str:
        lines = [line for table in self.tables() for line in table.lines()]
        basis = basis_text([t.verdict for t in self.differences])
        return "\n".join([f"a: {self.a.name}", f"b: {self.b.name}", *lines, basis])

    def _repr_html_(self) -> str:
        basis = basis_text([t.verdict for t in self.differences])
        return html_page(self.tables(), f"a: {self.a.name}\nb: {self.b.name}\n{basis}")

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "format": 1,
            "a": {"name": self.a.name, "seeds": list(self.a.seeds)},
            "b": {"name": self.b.name, "seeds": list(self.b.seeds)},
            "shared_seeds": self.shared_seeds,
            "differences": [
                t.verdict.to_dict()
                | {
                    "metric": t.metric,
                    "protocol": t.protocol.label(),
                    "a": t.a,
                    "b": t.b,
                    "difference": t.value,
                    "outcome": t.outcome,
                    "mcnemar": t.mcnemar,
                }
                for t in self.differences
            ],
        }


@checked
def compare(
    a: str | Path | Sequence[str | Path],
    b: str | Path | Sequence[str | Path],
    *,
    metrics: Sequence[str] = (),
    model: str = "student",
) -> ModelComparison:
    """Compare two models on the same queries, or two ways of training with several seeds each.

    a, b: run folders, or files of scores; of a file that holds several models FILE.json@MODEL; a list holds the seeds
    of one method.
    metrics: which (default: R@K, MRR, top-1, top-5). model: whose scores in the files, "student" or "teacher".

    Returns a ModelComparison: a difference a metric, in fractions, with 95 % interval, p and verdict. Raises InputError
    when the two were measured on the same data under different protocols, or share no measurement.
    """
    first, second = ([Path(one) for one in ([side] if isinstance(side, str | Path) else side)] for side in (a, b))
    sides = read_side(first, model), read_side(second, model)
    found = []
    for protocol in _shared_protocols(*sides):
        question = protocol.question()
        present = [{r.metric for r in run if r.question == question} for side in sides for run in side.records]
        for metric in metrics or _TESTED:
            if all(metric in group for group in present):
                found.append(_compared(metric, protocol, *sides))
    if not found:
        raise InputError(
            f"{sides[0].name} and {sides[1].name} have none of the metrics {', '.join(metrics or _TESTED)}"
        )
    verdicts = adjust([one.verdict for one in found])
    return ModelComparison(
        *sides, tuple(replace(one, verdict=verdict) for one, verdict in zip(found, verdicts, strict=True))
    )


def read_side(paths: Sequence[Path], model: str) -> ComparedSide:
    """The scores of one side: run folders, or JSON files that `clipdistill eval --json` wrote."""
    if not paths:
        raise InputError("compare: a side needs at least one run folder")
    seeds: list[int | None] = []
    records: list[tuple[Record, ...]] = []
    names: list[str] = []
    asked = model
    for path in paths:
        file, several, own_name = str(path).partition(".json@")
        path, model = (Path(f"{file}.json"), own_name) if several else (path, asked)
        scores = Scores.of_run(path) if path.is_dir() else Scores.load(path)
        if scores is None:
            raise InputError(
                f"{path}: no scores.json there; measure the run with  "
                f"clipdistill eval {path} --data ... --json {path}/scores.json"
            )
        if model not in scores.models():
            raise InputError(
                f"{path / FILE if path.is_dir() else path}: no scores of '{model}'; it holds those of "
                + (", ".join(scores.models()) or "none")
                + (f"; one of them is {path}@{scores.models()[0]}" if path.is_file() else "")
            )
        facts = RunFolder(path).facts() if RunFolder(path).is_run else {}
        seed = facts["seed"] if isinstance(facts.get("seed"), int) else None
        if seed is not None and seed in seeds:
            raise InputError(f"{path}: another run of this side has the seed {seed} too; two methods are two sides")
        seeds.append(seed)
        names.append(str(facts.get("method") or path.stem) if len(paths) > 1 else own_name or path.name)
        own = Scores(score for score in scores if score.model == model)
        own.queries = scores.queries
        records.append(tuple(records_of(own, names[-1], seed, facts)))
    return ComparedSide(" + ".join(dict.fromkeys(names)), tuple(seeds), tuple(records), model)


def _shared_protocols(a: ComparedSide, b: ComparedSide) -> list[Protocol]:
    """Protocols that every file of both sides has. InputError for the same data set under different ones."""
    listed = [{r.question: r.measured for r in run if r.measured} for side in (a, b) for run in side.records]
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


def _compared(metric: str, protocol: Protocol, a: ComparedSide, b: ComparedSide) -> MetricComparison:
    ours, theirs = a.of(metric, protocol), b.of(metric, protocol)
    verdict = decide(ours, theirs)
    exact = None
    if metric == "top1" and len(ours) == len(theirs) == 1:
        pair = ours[0].per_query, theirs[0].per_query
        if ours[0].clusters is None and all(p is not None and np.isin(p, (0, 1)).all() for p in pair):  # no ties
            exact = mcnemar(*pair)
    if verdict.basis == "paired seeds and queries":  # the figures are those of the seeds that were compared
        shared = {record.seed for record in ours} & {record.seed for record in theirs}
        ours, theirs = ([r for r in side if r.seed in shared] or side for side in (ours, theirs))
    means = [float(np.mean([record.value for record in side])) for side in (ours, theirs)]
    return MetricComparison(metric, protocol, means[0], means[1], verdict, exact)


def _table(rows: list[MetricComparison]) -> TextTable:
    heads = ["metric", "a", "b", "a - b in points (95 % interval)", "p", "p (Holm)", "better"]
    table = TextTable(heads, text=(0, 6))
    for row in rows:
        scale = 1 if row.metric.endswith("median_rank") else 100
        verdict, bounds = row.verdict, bounds_text(row.verdict, scale)
        more = f" ({more_seeds(verdict)} more seeds)" if verdict.seeds_needed else ""
        change = f"{scale * row.value:+.2f}" + (f" ({bounds})" if bounds else "")
        if verdict.effect is None:
            change = "stale" if verdict.left_out else ""
        table.rows.append(
            [
                row.metric,
                f"{scale * row.a:.1f}",
                f"{scale * row.b:.1f}",
                change,
                *("" if p is None else p_text(p) for p in (verdict.p, verdict.p_holm)),
                Coloured(better_text(verdict, "a", "b") + more, {"undecided": ""}.get(verdict.better, "bold")),
            ]
        )
    return table
