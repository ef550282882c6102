"""`clipdistill compare`: is one model better than another, on the same queries and over training seeds?"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from clipdistill.errors import InputError
from clipdistill.statistics.compare import ModelComparison, Tested, compare
from clipdistill.statistics.verdicts import p_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The two sides, and what to do with the answer."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="two runs; with --against, the seeds of the first side")
    add("--against", nargs="+", type=Path, default=[], metavar="RUN", help="the seeds of the second side")
    add(
        "--metric",
        action="append",
        default=[],
        help="a metric to compare (repeatable; default: R@K, MRR, top-1, top-5)",
    )
    add("--model", choices=("student", "teacher"), default="student", help="whose scores of the runs")
    add("--json", type=Path, help="write the comparison here")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, write."""
    first, second = arguments.runs, arguments.against
    if not second:
        if len(first) != 2:
            raise InputError("compare: name two runs, or the seeds of two methods:  compare A1 A2 --against B1 B2")
        first, second = first[:1], first[1:]
    result = compare(first, second, metrics=arguments.metric, model=arguments.model)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(f"a: {result.a.name}\nb: {result.b.name}", markup=False, highlight=False)
    for label in dict.fromkeys(t.protocol.label() for t in result.differences):
        console.print(label, style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(_table([t for t in result.differences if t.protocol.label() == label]))
    console.print(_about(result), soft_wrap=True)
    return 0


def _table(rows: list[Tested]) -> Table:
    table = Table("metric", box=None)
    for head in ("a", "b", "a - b in points (95 % interval)", "p", "p (Holm)", "better"):
        table.add_column(head, justify="right")
    for row in rows:
        bounds = "" if row.bounds is None else f" ({100 * row.bounds[0]:+.2f} to {100 * row.bounds[1]:+.2f})"
        table.add_row(
            row.metric,
            f"{100 * row.a:.1f}",
            f"{100 * row.b:.1f}",
            f"{100 * row.value:+.2f}{bounds}",
            "" if row.p is None else p_text(row.p),
            "" if row.p_holm is None else p_text(row.p_holm),
            row.outcome if row.outcome != "undecided" else _undecided(row),
        )
    return table


def _undecided(row: Tested) -> str:
    needed = None if row.verdict is None else row.verdict.seeds_needed
    if row.verdict is None or needed is None:
        return "undecided"
    return f"undecided ({max(1, needed - row.verdict.seeds)} more seeds)"


def _about(result: ModelComparison) -> str:
    if result.seeds > 1:
        return (
            f"{result.seeds} shared seeds: intervals hold the spread over seeds (Student's t, paired) and the sampling "
            "of test queries (bootstrap, clustered by image) together; Holm over the metrics."
        )
    if max(len(result.a.seeds), len(result.b.seeds)) > 1:
        return (
            "The two sides share at most one seed: intervals hold the sampling of test queries alone, p is the larger "
            "of the test over queries and, with several seeds a side, Welch's test over seeds; Holm over the metrics."
        )
    return (
        "One run a side: interval (bootstrap) and p (permutation), both clustered by image, say whether these two "
        "models differ, not whether one way of training is better; that needs several seeds a side (--against). "
        "Holm over the metrics."
    )
