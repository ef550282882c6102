"""`clipdistill compare`: is one model better than another, on the same queries and over training seeds?"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.runtime.console import Coloured, TextTable, say
from clipdistill.runtime.files import make_folder, write_json
from clipdistill.statistics.compare import MetricComparison, compare
from clipdistill.statistics.verdicts import basis_text, better_text, bounds_text, more_seeds, p_text


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
        make_folder(arguments.json.parent, "comparison")
        write_json(arguments.json, result.to_dict())
    say(f"a: {result.a.name}\nb: {result.b.name}")
    for label in dict.fromkeys(t.protocol.label() for t in result.differences):
        say(label, colour="bold")
        rows = [t for t in result.differences if t.protocol.label() == label]
        _table(rows).print()
        for reason in dict.fromkeys(t.verdict.reason for t in rows if t.verdict.p is None):
            say(reason)
    say(basis_text([t.verdict for t in result.differences]))
    return 0


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
