"""`clipdistill report`: run folders in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.report import IMAGES
from clipdistill.runtime.console import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which runs, where to write, and what to compute for it."""
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, and exports of theirs")
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
    add("--images", type=int, default=IMAGES, help=f"how many of them at most (default: {IMAGES})")
    add("--device", help="for --look: cpu, cuda, cuda:1 (default: where the model is loaded, the CPU)")
    add("--claims", help="judge these claims on the runs: a YAML file, or 'published' for those of the papers")
    add("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> int:
    """Look, write the page, say what it says."""
    from clipdistill.report.report import report

    names = ("title", "claims", "look", "data", "split", "images", "device", "quiet")
    say(repr(report(arguments.runs, arguments.out, **{name: getattr(arguments, name) for name in names})))
    return 0
