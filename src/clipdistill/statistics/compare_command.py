"""`clipdistill compare`: is one model better than another, on the same queries and over training seeds?"""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.runs.folder import distinct
from clipdistill.runtime.console import say
from clipdistill.runtime.files import require_place, write_json
from clipdistill.statistics.compare import compare
from clipdistill.statistics.verdicts import basis_text


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
    distinct(first)
    distinct(second)
    repeated = next((name for name in arguments.metric if arguments.metric.count(name) > 1), None)
    if repeated is not None:
        raise InputError(f"--metric {repeated}: named twice")
    if arguments.json is not None:
        require_place(arguments.json, "comparisons", (b'"shared_seeds"',))
    result = compare(first, second, metrics=arguments.metric, model=arguments.model)
    if arguments.json is not None:
        write_json(arguments.json, result.to_dict())
    say(f"a: {result.a.name}\nb: {result.b.name}")
    for table in result.tables():
        table.print()
    say(basis_text([t.verdict for t in result.differences]))
    return 0
