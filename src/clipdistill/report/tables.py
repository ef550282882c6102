"""What the report says in numbers: one entry per method, one column per protocol and metric, and who beat whom.

Numbers under different protocols never share a column. Several runs that differ only in their seed become one entry,
whose interval then comes from the seeds; a single run's interval comes from the test queries alone, and the words
say so. Retention is the student's score over the teacher's under the same protocol. Who is better is decided by
clipdistill.statistics.judge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from clipdistill.report.data import Question, ReportedRun
from clipdistill.statistics.bootstrap import seed_interval
from clipdistill.statistics.judge import Verdict, adjust, decide
from clipdistill.statistics.records import Record
from clipdistill.statistics.scores import BENCHMARKS

LEAD_METRICS = ("t2i_R@1", "i2t_R@1", "top1", "group_score", "accuracy")
"""The measures that the headline, the trade-off and the comparisons are about, the first available one in front."""

MAIN_METRICS = ("i2t_R@1", "t2i_R@1", "i2t_mAP@10", "t2i_mAP@10", "top1", "top5", *BENCHMARKS)
"""The columns of the short table; all others are in the full one."""

PLAIN_METHODS = ("contrastive", "clip")
"""Training without a teacher: what every distillation method has to beat."""

_METRIC_ORDER = [f"{d}_{m}" for m in ("R@1", "R@5", "R@10", "mAP@10", "MRR", "median_rank") for d in ("i2t", "t2i")]
_METRIC_ORDER += ["top1", "top5", "mean_per_class", *BENCHMARKS]
_PLAIN_METRICS = ("ties", "median_rank", "gap", "loss")  # not shares of one, so not shown in per cent


@dataclass(frozen=True)
class Estimate:
    """A value with a 95 % interval; half: its half-width, not cut at 0 or 1, None where it is not known."""

    value: float
    low: float | None = None
    high: float | None = None
    half: float | None = None
    n: int = 0
    seeds: int = 1
    per_seed: tuple[float, ...] = ()


@dataclass(eq=False)
class Entry:
    """A line of the table: the teacher, or the student(s) of one method. `colour` numbers its colour and marker."""

    label: str
    role: str
    method: str
    runs: list[ReportedRun]
    colour: int = 0

    @property
    def first(self) -> ReportedRun:
        """The run that stands for the entry where only one can be shown (curves of a single seed, commands)."""
        return self.runs[0]


@dataclass(eq=False)
class ScoreColumn:
    """One protocol and one metric. `number` counts protocols, so that a header can refer to the list of protocols."""

    metric: str
    protocol: Question
    label: str
    number: int
    cells: dict[str, Estimate] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The metric in words."""
        return metric_name(self.metric)

    @property
    def is_share(self) -> bool:
        """Whether values are shares of one, shown in per cent."""
        return is_share(self.metric)

    def best(self, entries: Sequence[Entry]) -> Entry | None:
        """The student with the best value (larger is better, except for ranks)."""
        scored = [e for e in entries if e.role == "student" and e.label in self.cells]
        if not scored:
            return None
        sign = -1 if "rank" in self.metric else 1
        return max(scored, key=lambda e: sign * self.cells[e.label].value)


@dataclass(frozen=True)
class PairComparison:
    """challenger minus baseline in one column, and the verdict on "the challenger is better".

    unequal: what differs between the two besides the method (budget, data, teacher, student), in words.
    """

    challenger: Entry
    baseline: Entry
    column: ScoreColumn
    difference: float
    verdict: Verdict
    unequal: tuple[str, ...]

    @property
    def decided(self) -> bool:
        return self.verdict.outcome != "undecided"

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The 95 % interval, where there is a finite one."""
        low, high = self.verdict.low, self.verdict.high
        return (low, high) if low is not None and high is not None and math.isfinite(high - low) else None


@dataclass
class ScoreTable:
    """All entries (teachers first, then students in the order given) and all columns (protocol by protocol)."""

    entries: list[Entry]
    columns: list[ScoreColumn]
    notices: list[str]

    @property
    def students(self) -> list[Entry]:
        """The entries that were trained."""
        return [e for e in self.entries if e.role == "student"]

    @property
    def teachers(self) -> list[Entry]:
        """The entries that were distilled from."""
        return [e for e in self.entries if e.role == "teacher"]

    @property
    def lead(self) -> list[ScoreColumn]:
        """The headline columns, the leading one first."""
        found = [(LEAD_METRICS.index(c.metric), c.number, c) for c in self.columns if c.metric in LEAD_METRICS]
        # one protocol's R@1 leads; a second protocol on the same data repeats the same news, so it comes later
        first = min((number for metric, number, _ in found if metric < 2), default=0)
        return [
            column
            for _, _, column in sorted(found, key=lambda item: (item[1] > first and item[0] < 2, item[0], item[1]))
        ]

    @property
    def protocols(self) -> list[tuple[int, str, Question]]:
        """(number, label, conditions) of each protocol."""
        return list({c.number: (c.number, c.label, c.protocol) for c in self.columns}.values())

    def title_of(self, column: ScoreColumn) -> str:
        """The metric in words, with the protocol's number when it was measured under several."""
        several = sum(other.metric == column.metric for other in self.columns) > 1
        return f"{column.title} [{column.number}]" if several else column.title

    def teacher_of(self, entry: Entry) -> Entry | None:
        """The teacher whose scores an entry's retention refers to: its own, or the only one that was measured.

        A student trained without a teacher is still compared with the teacher of its rivals.
        """
        own = next((t for t in self.teachers if any(run in t.runs for run in entry.runs)), None)
        if own is None and entry.first.teacher:
            own = next((t for t in self.teachers if any(r.teacher == entry.first.teacher for r in t.runs)), None)
        return own or (self.teachers[0] if len(self.teachers) == 1 else None)

    def is_taught(self, entry: Entry) -> bool:
        """Whether the teacher of `teacher_of` taught this entry; else it is that of the other methods."""
        return any(run.teacher for run in entry.runs)

    def whose(self, entry: Entry) -> str:
        """ "the teacher's", for a figure that an entry's is compared with."""
        return "the teacher's" if self.is_taught(entry) else "the other methods' teacher's"

    def retention(self, entry: Entry, column: ScoreColumn) -> Estimate | None:
        """Student / teacher in one column: over the same queries as the run stored it, else by the delta method."""
        teacher = self.teacher_of(entry)
        if teacher is None or entry.role != "student" or not column.is_share:
            return None
        mine, reference = column.cells.get(entry.label), column.cells.get(teacher.label)
        if mine is None or reference is None or reference.value <= 0:
            return None
        ratio = mine.value / reference.value
        stored = entry.first.retention.get((column.metric, column.protocol)) if mine.seeds == 1 else None
        if stored is not None and stored[1] is not None and abs(stored[0] - ratio) < 1e-9:
            return Estimate(*stored)
        if mine.half is None or reference.half is None:
            return Estimate(ratio)
        half = math.hypot(mine.half / reference.value, ratio * reference.half / reference.value)
        return Estimate(ratio, max(0.0, ratio - half), ratio + half)


def metric_name(metric: str) -> str:
    """ "Text→image R@1" for "t2i_R@1"."""
    names = {"top1": "Zero-shot top-1", "top5": "Zero-shot top-5", "mAP": "Zero-shot mAP"}
    names["mean_per_class"] = "Zero-shot mean per class"
    for short, long in (("i2t_", "Image→text "), ("t2i_", "Text→image ")):
        if metric.startswith(short):
            return long + metric.removeprefix(short).replace("_", " ")
    return names.get(metric, metric.replace("_", " "))


def is_share(metric: str) -> bool:
    """Whether a metric is a share of one, shown in per cent."""
    return not any(part in metric for part in _PLAIN_METRICS)


def build_table(runs: Sequence[ReportedRun]) -> ScoreTable:
    """Group runs into entries and their scores into columns. Runs without scores still appear as entries."""
    notices: list[str] = []
    students = _student_entries(runs)
    teachers = _teacher_entries(runs)
    _colour(students)
    table = ScoreTable([*teachers, *students], [], notices)
    columns: dict[tuple[str, Any], ScoreColumn] = {}
    numbers: dict[Question, int] = {}
    for run in runs:
        for row in run.scores:
            number = numbers.setdefault(row.question, len(numbers) + 1)
            label = row.measured.label() if row.measured else ""
            columns.setdefault((row.metric, row.question), ScoreColumn(row.metric, row.question, label, number))
    order = {metric: position for position, metric in enumerate(_METRIC_ORDER)}
    table.columns = sorted(columns.values(), key=lambda c: (c.number, order.get(c.metric, 99), c.metric))
    for column in table.columns:
        for entry in table.entries:
            rows = [_rows(run.scores, entry.role, column) for run in entry.runs]
            found = [row[0] for row in rows if row]
            if not found:
                continue
            if entry.role == "teacher":
                column.cells[entry.label] = _single(found[0])
                if len({round(row.value, 6) for row in found}) > 1:
                    scale = 100 if column.is_share else 1
                    values = ", ".join(f"{scale * row.value:.2f}" for row in found)
                    notices.append(
                        f"{entry.label} was measured with different results ({values}) in {column.title} "
                        f"under the same protocol; the first is shown."
                    )
            else:
                column.cells[entry.label] = _single(found[0]) if len(found) == 1 else _over_seeds(found)
    for run in runs:
        if run.status and run.status != "finished":
            notices.append(f"The run {run.name} is not finished (status: {run.status}): its figures are preliminary.")
        notices += [f"{run.name}: {note}" for note in run.notes]
        if run.stale:
            shown = [f"{metric_name(r.metric)} {_plain_value(r)}" for r in run.stale if r.metric in MAIN_METRICS]
            values = f" ({', '.join(shown)})" if shown else ""
            notices.append(
                f"{run.name}: {run.stale[0].unusable}. They{values} are in no table and nothing is judged by them: "
                f"measure again with  clipdistill eval {run.folder} --data ... --json {run.folder}/scores.json"
            )
        elif not run.scores:
            notices.append(f"The run {run.name} has no scores.json: it was not evaluated, so it is not in the table.")
        lost = sum(curve.not_finite for curve in run.losses.values())
        if lost:
            notices.append(
                f"The run {run.name} logged {lost} loss values that are not finite; the curves leave them out."
            )
    table.notices = list(dict.fromkeys(notices))
    return table


def compare(table: ScoreTable) -> list[PairComparison]:
    """Every pair of students in every lead column, with Holm's p over all of them."""
    found = []
    for column in table.lead:
        entries = [e for e in table.students if e.label in column.cells]
        for first, second in combinations(entries, 2):
            baseline, challenger = (first, second) if _rank(first) <= _rank(second) else (second, first)
            sides = [
                [r for run in entry.runs for r in _rows([*run.scores, *run.stale], "student", column)]
                for entry in (challenger, baseline)
            ]
            verdict = decide(*sides)
            means = [column.cells[entry.label].value for entry in (challenger, baseline)]
            difference = means[0] - means[1] if verdict.effect is None else verdict.effect
            unequal = tuple(_unequal(challenger, baseline))
            found.append(PairComparison(challenger, baseline, column, difference, verdict, unequal))
    verdicts = adjust([comparison.verdict for comparison in found])
    return [replace(comparison, verdict=verdict) for comparison, verdict in zip(found, verdicts, strict=True)]


def _student_entries(runs: Sequence[ReportedRun]) -> list[Entry]:
    groups: dict[tuple[Any, ...], list[ReportedRun]] = {}
    for run in runs:
        key = (run.method, run.student, run.teacher, run.data, run.samples_seen, _recipe_without_seed(run))
        group = groups.setdefault(key, [])
        if run.seed is None or any(run.seed == other.seed for other in group):  # the same seed twice is not two seeds
            groups[(*key, str(run.folder))] = [run]
            if not group:
                del groups[key]
        else:
            group.append(run)
    entries = [Entry(group[0].method_name, "student", group[0].method, group) for group in groups.values()]
    taken: dict[str, int] = {}
    for entry in entries:
        taken[entry.label] = taken.get(entry.label, 0) + 1
    for entry in entries:
        if taken[entry.label] > 1:
            entry.label = f"{entry.label} ({entry.first.name})"
    return entries


def _colour(students: Sequence[Entry]) -> None:
    """Number the colours: 1 (grey) for plain contrastive training, the natural baseline, 2 and on for the others."""
    following = 2
    for entry in students:
        if entry.method in PLAIN_METHODS and all(other.colour != 1 for other in students):
            entry.colour = 1
        else:
            entry.colour, following = following, following + 1


def _teacher_entries(runs: Sequence[ReportedRun]) -> list[Entry]:
    """One entry for each set of weights that was measured as a teacher; a run without one may have measured it too."""
    groups: dict[str, list[ReportedRun]] = {}
    for run in runs:
        prints = [row.fingerprint for row in run.scores if row.role == "teacher"]
        if prints:
            groups.setdefault(prints[0] or run.teacher or "", []).append(run)
    if len(groups) == 1:
        return [Entry("teacher", "teacher", "teacher", group) for group in groups.values()]
    names = [next((run.teacher for run in group if run.teacher), key[:8]) for key, group in groups.items()]
    entries = []
    for (key, group), name in zip(groups.items(), names):
        label = f"teacher {name}" if names.count(name) == 1 else f"teacher {name} ({key[:8]})"
        entries.append(Entry(label, "teacher", "teacher", group))
    return entries


def _recipe_without_seed(run: ReportedRun) -> str:
    """The recipe's text without the lines that name the seed or the run, so that seeds of one recipe compare equal."""
    ignored = ("seed:", "out:", "name:", "folder:")
    return "\n".join(line for line in run.recipe.splitlines() if not line.strip().startswith(ignored))


def _rows(records: Sequence[Record], role: str, column: ScoreColumn) -> list[Record]:
    return [r for r in records if r.metric == column.metric and r.role == role and r.question == column.protocol]


def _plain_value(row: Record) -> str:
    return f"{100 * row.value:.1f} %" if is_share(row.metric) else f"{row.value:.3g}"


def _single(row: Record) -> Estimate:
    """One run's score; the interval of a share of hits that came without is the binomial one."""
    low, high = row.low, row.high
    if (
        (low is None or high is None)
        and row.n > 0
        and is_share(row.metric)
        and 0 <= row.value <= 1
        and row.metric.endswith(("R@1", "R@5", "R@10", "top1", "top5"))
    ):
        from scipy import stats

        low, high = stats.binomtest(round(row.value * row.n), row.n).proportion_ci(method="wilson")
        low, high = float(low), float(high)
    half = None if low is None or high is None else (high - low) / 2
    return Estimate(row.value, low, high, half, row.n)


def _over_seeds(rows: Sequence[Record]) -> Estimate:
    """Mean over seeds with Student's interval; of a share no further than 0 to 100 %."""
    values = [row.value for row in rows]
    whole = seed_interval(values)
    kept = seed_interval(values, share=is_share(rows[0].metric))
    return Estimate(kept.value, kept.low, kept.high, whole.high - whole.value, rows[0].n, len(values), tuple(values))


def _unequal(a: Entry, b: Entry) -> list[str]:
    """In words, what differs between two entries besides the method."""
    found = []
    x, y = a.first, b.first
    if x.samples_seen != y.samples_seen:
        found.append(f"budget ({x.samples_seen:,} and {y.samples_seen:,} samples seen)")
    if x.data != y.data:
        found.append(f"training data ({x.data} and {y.data})")
    if x.student != y.student:
        found.append(f"student ({x.student} and {y.student})")
    if x.teacher and y.teacher and x.teacher != y.teacher:
        found.append(f"teacher ({x.teacher} and {y.teacher})")
    return found


def _rank(entry: Entry) -> int:
    """Where a method stands in the natural question "does X beat Y": plain training, others, CLIP-KD, CLIP-RD."""
    if entry.method in PLAIN_METHODS:
        return 0
    return {"clip-kd": 2, "clip-rd": 3}.get(entry.method, 1)
