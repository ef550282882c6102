"""What a grid's finished runs say: scores by variant and seed, paired differences from the baseline, costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.ablate.grid import GridRun
from clipdistill.ablate.plan import AblationPlan
from clipdistill.errors import InputError, nearest
from clipdistill.runs.folder import RunFolder
from clipdistill.statistics.claims import judge
from clipdistill.statistics.judge import Verdict, adjust, decide
from clipdistill.statistics.records import Record, read_records
from clipdistill.train.opening import changes, stored_settings

SETTING = ("student", "data", "validation", "device", "steps", "batch_size", "parameters", "versions")
HEADLINE = ("t2i_R@1", "i2t_R@1", "top1", "mean_per_class")


@dataclass(frozen=True)
class MeasuredColumn:
    """One metric under one protocol: what may stand in one column."""

    metric: str
    dataset: str | None
    protocol: str | None

    def holds(self, record: Record) -> bool:
        return (record.metric, record.dataset, record.protocol) == (self.metric, self.dataset, self.protocol)


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline in one column; the verdict's p_holm is adjusted over all differences of the table."""

    variant: str
    column: MeasuredColumn
    verdict: Verdict

    @property
    def outcome(self) -> str:
        """'better', 'worse' or 'undecided'."""
        return self.verdict.better


@dataclass
class VariantResult:
    """One row of the table. runs: names of their folders; scores: column -> one value a seed; seconds,
    pairs_per_second: means over seeds.
    """

    name: str
    about: str
    seeds: tuple[int, ...]
    runs: tuple[str, ...]
    scores: dict[MeasuredColumn, list[float]]
    seconds: float
    pairs_per_second: float
    pairs_seen: int
    parameters: int | None
    differs: list[str] = field(default_factory=list)


@dataclass
class Results:
    """Everything that tables, pictures and files show."""

    plan: AblationPlan
    folder: Path
    runs: int
    finished: int
    columns: list[MeasuredColumn]
    variants: list[VariantResult]
    differences: list[Difference]
    verdicts: list[Verdict]
    teacher: dict[MeasuredColumn, float]
    curves: dict[str, dict[int, list[tuple[int, dict[str, float]]]]]
    notes: list[str]
    setting: dict[str, Any]
    missing: list[str]

    def difference(self, variant: str, column: MeasuredColumn) -> Difference | None:
        return next((d for d in self.differences if (d.variant, d.column) == (variant, column)), None)


def collect(plan: AblationPlan, grid: Sequence[GridRun], out: Path) -> Results | None:
    """Results of the finished runs of a grid; None when there is none. Unfinished ones are listed as missing."""
    done = {run: RunFolder(run.folder).facts() for run in grid if run.state() == "finished"}
    if not done:
        return None
    records = read_records([run.folder for run in done])
    columns = _columns(plan, records)
    variants = [_variant(plan, name, done, records, columns) for name in plan.variants]
    variants = [variant for variant in variants if variant.seeds]
    baseline = next((run for run in done if run.variant == plan.reference), None)
    for variant in variants:
        other = next(run for run in done if run.variant == variant.name)
        variant.differs = [] if baseline is None else _differing(baseline, other)
    first = next(iter(done.values()))
    return Results(
        plan=plan,
        folder=out,
        runs=len(grid),
        finished=len(done),
        columns=columns,
        variants=variants,
        differences=_differences(plan, variants, records, columns),
        verdicts=judge(plan.claims, records),
        teacher=_teacher(records, columns),
        curves=_curves(done),
        notes=_notes(done),
        setting={name: first.get(name) for name in SETTING},
        missing=[run.name for run in grid if run not in done],
    )


def _columns(plan: AblationPlan, records: Sequence[Record]) -> list[MeasuredColumn]:
    """The compared columns: the plan's metrics, else the headline ones; those of students alone."""
    metrics = list(dict.fromkeys(record.metric for record in records if record.seed is not None))
    for name in plan.metrics:
        if name not in metrics:
            raise InputError(f"ablation: no run has the metric '{name}'{nearest(name, metrics)}")
    wanted = plan.metrics or [metric for metric in HEADLINE if metric in metrics]
    if "top1" in wanted and not plan.metrics and "mean_per_class" in wanted:
        wanted = [metric for metric in wanted if metric != "mean_per_class"]
    found = [
        MeasuredColumn(record.metric, record.dataset, record.protocol)
        for metric in wanted
        for record in records
        if record.metric == metric and record.seed is not None
    ]
    return list(dict.fromkeys(found))


def _variant(
    plan: AblationPlan,
    name: str,
    done: Mapping[GridRun, dict[str, Any]],
    records: Sequence[Record],
    columns: Sequence[MeasuredColumn],
) -> VariantResult:
    own = {run.seed: facts for run, facts in done.items() if run.variant == name}
    seconds = [float(facts["seconds"]) for facts in own.values()]
    pairs = [int(facts["samples_seen"]) for facts in own.values()]
    first = next(iter(own.values()), {})
    return VariantResult(
        name=name,
        about=plan.variants[name].about or "",
        seeds=tuple(sorted(own)),
        runs=tuple(run.name for run in sorted(done, key=lambda run: run.seed) if run.variant == name),
        scores={c: [r.value for r in _by_seed(records, name, c).values()] for c in columns},
        seconds=float(np.mean(seconds)) if seconds else 0.0,
        pairs_per_second=float(np.mean([n / max(s, 1e-9) for n, s in zip(pairs, seconds)])) if seconds else 0.0,
        pairs_seen=pairs[0] if pairs else 0,
        parameters=first.get("parameters", {}).get("total"),
    )


def _by_seed(records: Sequence[Record], method: str, column: MeasuredColumn) -> dict[int, Record]:
    own = [r for r in records if r.method == method and r.seed is not None and column.holds(r)]
    return {r.seed: r for r in sorted(own, key=lambda r: r.seed or 0) if r.seed is not None}


def _differences(
    plan: AblationPlan, variants: Sequence[VariantResult], records: Sequence[Record], columns: Sequence[MeasuredColumn]
) -> list[Difference]:
    found = []
    for column in columns:
        base = list(_by_seed(records, plan.reference, column).values())
        for variant in variants:
            own = list(_by_seed(records, variant.name, column).values())
            if variant.name != plan.reference and own and base:
                found.append(Difference(variant.name, column, decide(own, base)))
    verdicts = adjust([difference.verdict for difference in found])
    return [replace(difference, verdict=verdict) for difference, verdict in zip(found, verdicts, strict=True)]


def _teacher(records: Sequence[Record], columns: Sequence[MeasuredColumn]) -> dict[MeasuredColumn, float]:
    found = {}
    for column in columns:
        values = {r.value for r in records if r.method == "teacher" and column.holds(r)}
        if len(values) == 1:
            found[column] = values.pop()
    return found


def _curves(done: Mapping[GridRun, Any]) -> dict[str, dict[int, list[tuple[int, dict[str, float]]]]]:
    """variant -> seed -> [(pairs seen, {metric: value})] of the evaluations during training."""
    curves: dict[str, dict[int, list[tuple[int, dict[str, float]]]]] = {}
    for run in done:
        points = [(int(line.get("samples", line["step"])), line["scores"]) for line in RunFolder(run.folder).curve()]
        if points:
            curves.setdefault(run.variant, {})[run.seed] = points
    return curves


def _differing(baseline: GridRun, other: GridRun) -> list[str]:
    """Settings of `other` that are not the baseline's, apart from seed and names."""
    if baseline.variant == other.variant:
        return []
    stored = [stored_settings(RunFolder(run.folder)) for run in (baseline, other)]
    weights = [{k: v for k, v in values["objective"].pop("weights").items() if v} for values in stored]
    for values in stored:
        values["train"].pop("seed")
        values.pop("recipe")
    found = []
    if weights[0] != weights[1]:
        found.append("objective: " + " + ".join(k if v == 1 else f"{v:g} {k}" for k, v in weights[1].items()))
    return found + changes(stored[0], stored[1])


def _notes(done: Mapping[GridRun, dict[str, Any]]) -> list[str]:
    """What was held equal, as the runs recorded it; a sentence for whatever was not."""
    starts: dict[tuple[int, Any], set[str]] = {}
    orders: dict[int, set[tuple[Any, ...]]] = {}
    for run, facts in done.items():
        starts.setdefault((run.seed, facts.get("student")), set()).add(str(facts.get("initial_weights")))
        order = (facts.get("data_fingerprint"), facts.get("batch_size"), facts.get("ranks"))
        orders.setdefault(run.seed, set()).add(order)
    seen = sorted({int(facts.get("samples_seen", 0)) for facts in done.values()})
    notes = [
        "The runs of a seed started from the same weights (fingerprints equal)."
        if all(len(found) == 1 for found in starts.values())
        else "The runs of a seed did NOT all start from the same weights.",
        "The runs of a seed saw the same pairs in the same order."
        if all(len(found) == 1 for found in orders.values())
        else "The runs of a seed did NOT all see the same pairs in the same order (data or batch size differ).",
        f"Every run saw {seen[0]:,} pairs."
        if len(seen) == 1
        else f"The budgets differ: {', '.join(f'{n:,}' for n in seen)} pairs.",
    ]
    bad = sum(int(facts.get("bad_samples", 0)) for facts in done.values())
    skipped = sum(int(facts.get("skipped_steps", 0)) for facts in done.values())
    if bad or skipped:
        notes.append(f"Over all runs {bad} samples could not be read and {skipped} steps were skipped.")
    return notes


def to_json(results: Results) -> dict[str, Any]:
    """JSON-able: the numbers of the table, by variant and metric."""

    plan = results.plan
    variants = [
        {name: value for name, value in vars(v).items() if name != "scores"}
        | {"scores": [asdict(column) | {"by_seed": values} for column, values in v.scores.items()]}
        for v in results.variants
    ]
    differences = [
        asdict(d.column)
        | {"variant": d.variant, "outcome": d.outcome, "p_holm": d.verdict.p_holm, "both": d.verdict.to_dict()}
        for d in results.differences
    ]
    return {
        "format": 1,
        "title": plan.title,
        "baseline": plan.reference,
        "seeds": list(plan.seeds),
        **{name: getattr(results, name) for name in ("runs", "finished", "missing", "setting", "notes")},
        "teacher": [asdict(column) | {"value": value} for column, value in results.teacher.items()],
        "variants": variants,
        "differences": differences,
        "claims": [verdict.to_dict() for verdict in results.verdicts],
    }
