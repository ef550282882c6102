"""`clipdistill report`: run folders in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.report.report import write_report
from clipdistill.runs.folder import run_folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, where to write, and what to compute for it."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    add("--out", type=Path, default=Path("report.html"), help="the page (default: report.html)")
    add("--title", help="its title (default: made from the methods)")
    add(
        "--look",
        action="store_true",
        help="encode pictures with every model: a gallery of what each retrieves and the geometry of its embeddings, "
        "kept in the run folders for later reports",
    )
    add("--data", help="pairs for --look (default: each run's own validation set)")
    add("--split", help="their split")
    add("--images", type=int, default=1000, help="how many of them at most (default: 1000)")
    add("--device", help="for --look: cpu, cuda, cuda:1 (default: where the model is loaded, the CPU)")
    add("--claims", help="judge these claims on the runs: a YAML file, or 'published' for those of the papers")
    add("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Look, write the page, say what it says."""
    runs = [stage for run in arguments.runs for stage in run_folders(run)]
    notes: list[str] = []
    if arguments.look:
        from clipdistill.report.look import look

        notes = look(
            runs,
            data=arguments.data,
            split=arguments.split,
            images=arguments.images,
            device=arguments.device,
            progress=not arguments.quiet,
        )
    elif arguments.data or arguments.split:
        raise InputError("--data and --split say what --look looks at: give --look as well")
    summary = write_report(runs, arguments.out, title=arguments.title, claims=arguments.claims)
    print(summary.headline)
    for notice in (*notes, *summary.notices):
        print(f"note: {notice}")
    print(
        f"\nreport: {summary.html} ({summary.size / 1e6:.1f} MB), also {summary.markdown.name} and {summary.csv.name}"
    )
    return 0
