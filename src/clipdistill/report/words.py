"""The headline in words, made from numbers with intervals and nothing else.

Each sentence says whether what it states is decided by the evidence. A difference whose interval contains zero is
never called a gain, and "X does not beat Y here" is said in those words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clipdistill.report.tables import Estimate, PairComparison, ScoreColumn, ScoreTable
from clipdistill.report.trade import Trade
from clipdistill.runtime.console import compact, rate
from clipdistill.statistics.records import NOISY
from clipdistill.statistics.verdicts import QUERIES_ALONE


@dataclass(frozen=True)
class Sentence:
    """kind: "lead", "win", "loss", "open" (undecided), "cost" or "caution"; `text` is plain text."""

    kind: str
    text: str


def value_text(estimate: Estimate, share: bool, digits: int = 1) -> str:
    """ "41.3 %" for a share, "3" for anything else."""
    return f"{100 * estimate.value:.{digits}f} %" if share else compact(estimate.value)


def interval_text(estimate: Estimate, share: bool, digits: int = 1) -> str:
    """ "39.1 to 43.5", "" when there is no interval."""
    if estimate.low is None or estimate.high is None:
        return ""
    if share:
        return f"{100 * estimate.low:.{digits}f} to {100 * estimate.high:.{digits}f}"
    return f"{rate(estimate.low)} to {rate(estimate.high)}"


def points_text(comparison: PairComparison) -> str:
    """ "+3.1 points (0.8 to 5.4)"."""
    text = f"{100 * comparison.difference:+.1f} points".replace("-", "−")
    if comparison.bounds is None:
        return f"{text} (no interval)"
    low, high = comparison.bounds
    return f"{text} ({100 * low:+.1f} to {100 * high:+.1f})".replace("-", "−")


def metric_text(column: ScoreColumn, table: ScoreTable) -> str:
    """The metric inside a sentence: "text→image R@1", with its protocol when it was measured under several."""
    title = table.title_of(column)
    return title[0].lower() + title[1:]


def headline(table: ScoreTable, comparisons: Sequence[PairComparison], trade: Trade) -> list[Sentence]:
    """The sentences at the head of the report: the best student, each pair of methods, speed and size, cautions."""
    if not table.lead:
        return [Sentence("caution", "No run has scores of its student: nothing can be said about accuracy.")]
    sentences = [_best_student(table, comparisons)]
    sentences += _pairs(table, comparisons)
    sentences += _price(table, trade)
    sentences += _cautions(table, comparisons)
    return [sentence for sentence in sentences if sentence.text]


def _best_student(table: ScoreTable, comparisons: Sequence[PairComparison]) -> Sentence:
    column = table.lead[0]
    best = column.best(table.entries)
    if best is None:
        return Sentence("caution", "No student was measured.")
    cell = column.cells[best.label]
    interval = interval_text(cell, column.is_share)
    text = (
        f"{_capital(best.label)} has the highest {metric_text(column, table)} of the students: "
        if len(table.students) > 1
        else ""
    )
    text = text or f"{_capital(best.label)} reaches {metric_text(column, table)} "
    text += value_text(cell, column.is_share) + (f" ({interval})" if interval else "")
    teacher = table.teacher_of(best)
    kept = table.retention(best, column)
    if teacher is not None and kept is not None:
        reference = value_text(column.cells[teacher.label], column.is_share)
        text += f", {100 * kept.value:.0f} % of {table.whose(best)} {reference}"
    rivals = [
        (c.baseline if c.challenger is best else c.challenger).label
        for c in comparisons
        if c.column is column and not c.decided and best in (c.challenger, c.baseline)
    ]
    if rivals:
        text += f"; {_and(rivals)} {'are' if len(rivals) > 1 else 'is'} too close to call"
    return Sentence("lead", text + ".")


def _pairs(table: ScoreTable, comparisons: Sequence[PairComparison]) -> list[Sentence]:
    pairs: dict[tuple[int, int], list[PairComparison]] = {}
    for comparison in comparisons:
        pairs.setdefault((id(comparison.challenger), id(comparison.baseline)), []).append(comparison)
    return [_pair(found, table) for found in pairs.values()]


def _pair(found: Sequence[PairComparison], table: ScoreTable) -> Sentence:
    """One sentence on two methods over all lead measures."""
    a, b = found[0].challenger.label, found[0].baseline.label
    wins = [c for c in found if c.verdict.better == "better"]
    losses = [c for c in found if c.verdict.better == "worse"]
    undecided = [c for c in found if not c.decided]

    def listed(comparisons: Sequence[PairComparison]) -> str:
        return _and([f"{metric_text(c.column, table)} {points_text(c)}" for c in comparisons])

    if wins and not losses:
        scope = "in every headline measure" if len(found) == len(table.lead) > 1 and not undecided else ""
        text = f"{_capital(a)} beats {b} {scope}".rstrip() + f": {listed(wins)}."
        if undecided:
            text += f" Not decided: {listed(undecided)}."
        return Sentence("win", text)
    if losses and not wins:
        text = f"{_capital(a)} does not beat {b} here, it does worse: {listed(losses)}."
        if undecided:
            text += f" Not decided: {listed(undecided)}."
        return Sentence("loss", text)
    if wins and losses:
        return Sentence("open", f"{_capital(a)} and {b} trade places: {listed([*wins, *losses])}.")
    return Sentence(
        "open", f"{_capital(a)} does not beat {b} here. No headline measure separates them: {listed(undecided)}."
    )


def _price(table: ScoreTable, trade: Trade) -> list[Sentence]:
    """What the best student costs in size and buys in speed, one sentence per device."""
    best = table.lead[0].best(table.entries)
    teacher = table.teacher_of(best) if best is not None else None
    if best is None or teacher is None:
        return []
    sentences = []
    mine, theirs = trade.sizes.get(best.label), trade.sizes.get(teacher.label)
    size = ""
    if mine and theirs and mine.parameters and theirs.parameters:
        share = 100 * mine.parameters / theirs.parameters
        counts = (
            f"{compact(mine.parameters)} parameters, {share:.3g} % of {table.whose(best)} {compact(theirs.parameters)}"
        )
        size = f"{_capital(best.label)} has {counts}"
    for device in trade.devices:
        setting = device.best_setting()
        if setting is None:
            continue
        fast, slow = device.rate(best, "pair", setting), device.rate(teacher, "pair", setting)
        ratio = device.ratio(best, teacher, "pair", setting)
        if setting in device.noisy:
            start = f"{size}. Its speed" if size else f"The speed of {best.label}"
            sentences.append(Sentence("cost", f"{start} on {device.label} was {NOISY}, so no ratio is given."))
            size = ""
            continue
        if fast is None or slow is None or ratio is None:
            continue
        start = f"{size}, and encodes" if size else f"{_capital(best.label)} encodes"
        size = ""
        similar = 0.95 < ratio.value < 1.05
        compared = "about as many" if similar else f"{ratio.value:.{1 + (ratio.value < 1)}f} times as many"
        reach = interval_text(Estimate(ratio.value, ratio.low, ratio.high), False)
        sentences.append(
            Sentence(
                "cost",
                f"{start} {compared} image-text pairs per second ({reach} times; "
                f"{rate(fast.value)} against {rate(slow.value)}) on {device.label}, "
                f"{setting[0]}, {setting[1]}, batch {setting[2]}.",
            )
        )
    if size:
        sentences.append(Sentence("cost", f"{size}. Its speed was not measured."))
    return sentences


def _cautions(table: ScoreTable, comparisons: Sequence[PairComparison]) -> list[Sentence]:
    found = []
    unequal = dict.fromkeys(
        f"{_capital(c.challenger.label)} and {c.baseline.label} differ in more than the method: "
        f"{_and(list(c.unequal))}."
        for c in comparisons
        if c.unequal
    )
    found += [Sentence("caution", text) for text in unequal]
    if any(c.verdict.basis == "queries alone" for c in comparisons):
        found.append(Sentence("caution", f"Where a method has one training seed, its verdicts rest {QUERIES_ALONE}."))
    return found


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _and(items: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c" (semicolons when the items hold commas themselves)."""
    if len(items) < 2:
        return "".join(items)
    return ("; " if any("," in item for item in items) else ", ").join(items[:-1]) + " and " + items[-1]
