"""An ablation in words: the Markdown page and the table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from clipdistill.ablate.results import Difference, MeasuredColumn, Results, VariantResult
from clipdistill.runtime.console import Coloured, TextTable
from clipdistill.statistics.judge import Uncertainty
from clipdistill.statistics.verdicts import basis_text, better_text, bounds_text, more_seeds, p_text, verdicts_markdown

_COLOURS = {"better": "green", "worse": "red"}
_NAMES = {"top1": "zero-shot top-1", "top5": "zero-shot top-5", "mean_per_class": "zero-shot mean per class"}


def column_title(column: MeasuredColumn, columns: Sequence[MeasuredColumn]) -> str:
    """'text→image R@1'; with the data set where several columns have the metric."""
    name = _NAMES.get(column.metric, column.metric)
    for short, long in (("i2t_", "image→text "), ("t2i_", "text→image ")):
        if name.startswith(short):
            name = long + name.removeprefix(short).replace("_", " ")
    several = sum(other.metric == column.metric for other in columns) > 1
    return f"{name} ({column.dataset})" if several else name


def markdown(results: Results, *, picture: str | None = None, command: str | None = None, level: int = 1) -> str:
    """The whole page. picture: address of the picture; command: what made it; level: of the first heading."""
    plan = results.plan
    blocks = [f"{'#' * level} {plan.title or 'Ablation'}", _setting(results)]
    if command:
        blocks.append(f"```\n{command}\n```")
    if results.missing:
        blocks.append(
            f"**Not finished:** {results.finished} of {results.runs} runs; missing: {', '.join(results.missing)}."
        )
    blocks.append(main_table(results).markdown())
    blocks.append(_legend(results))
    if picture:
        blocks.append(f"![differences from {plan.reference} and learning curves]({picture})")
    if results.verdicts:
        blocks += [f"{'#' * (level + 1)} Claims", verdicts_markdown(results.verdicts)]
    blocks += [f"{'#' * (level + 1)} Over seeds and over queries", detail_table(results).markdown()]
    blocks += [f"{'#' * (level + 1)} What was compared", _compared(results)]
    return "\n\n".join(block.strip("\n") for block in blocks) + "\n"


def main_table(results: Results) -> TextTable:
    """One row a variant: score (standard deviation over seeds), difference from the baseline, p by Holm, cost."""
    heads = ["variant"]
    for column in results.columns:
        heads += [column_title(column, results.columns), f"minus {results.plan.reference}"]
    table = TextTable([*heads, "seconds", "pairs/s"])
    if results.teacher:
        cells = ["teacher"]
        for column in results.columns:
            cells += [_percent(results.teacher.get(column), column), ""]
        table.rows.append([*cells, "", ""])
    for variant in results.variants:
        cells = [Coloured(variant.name, "bold" if variant.name == results.plan.reference else "")]
        for column in results.columns:
            cells += [_score(variant, column), _difference(results.difference(variant.name, column))]
        table.rows.append([*cells, f"{variant.seconds:.0f}", f"{variant.pairs_per_second:.0f}"])
    return table


def detail_table(results: Results) -> TextTable:
    """Each difference with both kinds of uncertainty apart and together."""
    heads = ["difference", "metric", "points", "over seeds", "over queries", "together", "p", "p (Holm)", "verdict"]
    table = TextTable(heads, text=range(len(heads)))
    for d in results.differences:
        scale = _scale(d.column)
        table.rows.append(
            [
                f"{d.variant} − {results.plan.reference}",
                column_title(d.column, results.columns),
                _signed(d.verdict.effect, scale),
                _range(d.verdict.over_seeds, scale),
                _range(d.verdict.over_queries, scale),
                _minus(bounds_text(d.verdict, scale)),
                "" if d.verdict.p is None else p_text(d.verdict.p),
                "" if d.verdict.p_holm is None else p_text(d.verdict.p_holm),
                _outlook(d),
            ]
        )
    return table


def terminal_table(results: Results) -> TextTable:
    """The main table for the terminal."""
    table = main_table(results)
    table.title, table.caption = results.plan.title or "ablation", _caption(results)
    return table


def _setting(results: Results) -> str:
    facts: dict[str, Any] = results.setting
    parameters = (facts.get("parameters") or {}).get("total")
    size = f" ({parameters / 1e6:.2f} M parameters)" if parameters else ""
    protocols = list(dict.fromkeys(c.protocol.partition(" #")[0] for c in results.columns if c.protocol))
    return (
        f"{len(results.variants)} variants x {len(results.plan.seeds)} seeds. Student {facts.get('student')}{size}; "
        f"data {facts.get('data')}; {facts.get('steps')} steps of {facts.get('batch_size')} pairs; "
        f"{facts.get('device')}. Measured: {'; '.join(protocols)}."
    )


def _legend(results: Results) -> str:
    return (
        "Scores in per cent: mean ± standard deviation over seeds. Differences in points with 95 % intervals and "
        f"two-sided p; bold where decided. {basis_text([d.verdict for d in results.differences])} Seconds of training "
        f"a run. {_caption(results)}"
    )


def _caption(results: Results) -> str:
    return " ".join(results.notes)


def _compared(results: Results) -> str:
    lines = []
    for variant in results.variants:
        about = f" ({variant.about})" if variant.about else ""
        if variant.name == results.plan.reference:
            text = "the baseline"
        else:
            text = "; ".join(variant.differs) or "no setting differs from the baseline's"
        lines.append(f"- **{variant.name}**{about}: {text}")
    return "\n".join(lines)


def _score(variant: VariantResult, column: MeasuredColumn) -> str:
    values = variant.scores.get(column, [])
    if not values:
        return ""
    mean, scale = sum(values) / len(values), _scale(column)
    text = f"{mean * scale:.1f}"
    if len(values) > 1:
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        text += f" ± {spread * scale:.1f}"
    return text


def _difference(difference: Difference | None) -> str:
    if difference is None or difference.verdict.effect is None:
        return ""
    verdict, scale = difference.verdict, _scale(difference.column)
    bounds = _minus(bounds_text(verdict, scale))
    text = _signed(verdict.effect, scale) + (f" [{bounds}]" if bounds else "")
    if verdict.p is not None:
        text += f", p {p_text(verdict.p)}"
    return Coloured(text, _COLOURS.get(difference.outcome, ""))


def _outlook(difference: Difference) -> str:
    verdict = difference.verdict
    if difference.outcome != "undecided":
        return Coloured(better_text(verdict), _COLOURS[difference.outcome])
    if verdict.seeds_needed is not None:
        return f"undecided; {more_seeds(verdict)} more seeds"
    if verdict.images_needed is not None:
        return f"undecided; more than {verdict.images_needed:,} test images"
    return "undecided" if verdict.effect is not None else f"undecided: {verdict.reason}"


def _range(uncertainty: Uncertainty | None, scale: float) -> str:
    if uncertainty is None or not math.isfinite(uncertainty.high - uncertainty.low):
        return ""
    return f"{_signed(uncertainty.low, scale)} to {_signed(uncertainty.high, scale)}, p {p_text(uncertainty.p)}"


def _signed(value: float | None, scale: float) -> str:
    return "" if value is None else _minus(f"{value * scale:+.2f}")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _percent(value: float | None, column: MeasuredColumn) -> str:
    return "" if value is None else f"{value * _scale(column):.1f}"


def _scale(column: MeasuredColumn) -> float:
    return 1.0 if column.metric.endswith("median_rank") or column.metric == "ties" else 100.0
