"""`clipdistill report`: run folders in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.report.report import write_report
from clipdistill.report.stages import stage_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, and where to write."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--title", help="its title (default: made from the methods)")


def run(arguments: argparse.Namespace) -> int:
    """Write the page, say what it says."""
    runs = [stage for run in arguments.runs for stage in stage_folders(run)]
    summary = write_report(runs, arguments.out, title=arguments.title)
    print(summary.headline)
    for notice in summary.notices:
        print(f"note: {notice}")
    print(
        f"\nreport: {summary.html} ({summary.size / 1e6:.1f} MB), also {summary.markdown.name} and {summary.csv.name}"
    )
    return 0
