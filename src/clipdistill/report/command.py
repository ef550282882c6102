"""`clipdistill report`: run folders in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.report import report_place
from clipdistill.report.data import is_export
from clipdistill.runs.folder import STAGES, RunFolder, distinct, run_folders
from clipdistill.runtime.console import say

IMAGES = 1000


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
    notes: list[str] = []
    exports = [folder for folder in arguments.runs if is_export(folder)]
    runs = distinct([found for run in arguments.runs if run not in exports for found in _runs_of(run, notes)])
    for run in runs:
        if not run.is_dir():
            raise InputError(f"{run}: no such run folder")
        RunFolder(run).facts()
    out = report_place(arguments.out)
    for option, given in (
        ("data", arguments.data),
        ("split", arguments.split),
        ("images", arguments.images != IMAGES),
        ("device", arguments.device),
    ):
        if given and not arguments.look:
            raise InputError(f"--{option} says what --look looks at, or how: give --look as well")
    if arguments.look:
        from clipdistill.report.look import look

        notes += look(
            runs,
            data=arguments.data,
            split=arguments.split,
            images=arguments.images,
            device=arguments.device,
            progress=not arguments.quiet,
        )
    from clipdistill.report.report import write_report

    summary = write_report([*runs, *exports], out, title=arguments.title, claims=arguments.claims, notices=notes)
    say(summary.headline)
    for notice in summary.notices:
        say(f"note: {notice}")
    say(f"\nreport: {summary.html} ({summary.size / 1e6:.1f} MB), also {summary.markdown.name} and {summary.csv.name}")
    return 0


def _runs_of(folder: Path, notes: list[str]) -> list[Path]:
    """The runs that a folder stands for; of one whose list of stages is damaged, those that lie in it."""
    try:
        return run_folders(folder)
    except InputError as error:
        inside = sorted(path.parent for path in folder.glob("*/run.json"))
        if not inside or not (folder / STAGES).is_file():
            raise
        notes.append(f"{error}; the runs in the folder are shown.")
        return inside
