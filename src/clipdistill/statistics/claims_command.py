"""`clipdistill claims`: claims judged from finished runs: supported, contradicted or undecided, with the evidence."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from clipdistill.arguments import checked
from clipdistill.errors import InputError
from clipdistill.runs.folder import distinct, run_folders
from clipdistill.statistics.claims import PUBLISHED, is_measured, judge, read_claims
from clipdistill.statistics.records import read_records
from clipdistill.statistics.verdicts import (
    FILE,
    Verdicts,
    require_verdicts_place,
    verdict_table,
    verdicts_markdown,
    write_verdicts,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which claims, which runs, where to write."""
    add = parser.add_argument
    add("claims", help=f"a YAML file of claims (docs/ablation.md), or '{PUBLISHED}': those of the papers")
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of ablations")
    add(
        "--json",
        type=Path,
        help=f"where to write the verdicts (default: {FILE} beside the runs, where reports find it)",
    )
    add("--markdown", action="store_true", help="print the verdicts as a Markdown table")
    add("--all", action="store_true", help="show the claims too that these runs say nothing about")
    add("--level", type=float, default=0.95, help="confidence level of the intervals (default: 0.95)")


def run(arguments: argparse.Namespace) -> int:
    """Judge, print, write. The exit code is 0 whatever the verdicts are."""
    if arguments.json is not None:
        require_verdicts_place(arguments.json)
    verdicts = claims(arguments.claims, arguments.runs, level=arguments.level)
    known = Verdicts(v for v in verdicts if is_measured(v))
    shown = verdicts if arguments.all else known
    path = arguments.json or _common(_runs(arguments.runs)) / FILE
    write_verdicts(shown, path, str(arguments.claims))
    if arguments.markdown:
        print(verdicts_markdown(shown))
    elif shown:
        verdict_table(shown).print()
    silent = len(verdicts) - len(known)
    if silent and not arguments.all:
        print(f"{silent} of {len(verdicts)} claims are about methods or data that these runs do not have (see --all)")
    print(f"verdicts: {path}")
    return 0


@checked
def claims(
    claims: str | Path | Sequence[str], runs: str | Path | Sequence[str | Path], *, level: float = 0.95
) -> Verdicts:
    """Judge claims by finished runs: supported, contradicted or undecided, each with its evidence.

    claims: a YAML file of claims, "published" for those of the papers, or a list of claims in the language of
    docs/protocols.md. runs: run folders, or folders of ablations. level: confidence level of the intervals.

    Returns Verdicts, a list: claim, outcome, effect, low, high, p, p_holm, seeds, queries; those of claims about
    methods or data that the runs do not have are undecided. Raises InputError for claims and folders that are none.
    """
    if not 0.5 <= level < 1:
        raise InputError(f"--level {level}: give a confidence level from 0.5 to below 1, for example 0.95")
    wanted = read_claims(claims) if isinstance(claims, str | Path) else list(claims)
    return Verdicts(judge(wanted, read_records(_runs([runs] if isinstance(runs, str | Path) else runs)), level=level))


def _runs(folders: Sequence[str | Path]) -> list[Path]:
    runs = distinct([run for folder in folders for run in run_folders(Path(folder))])
    if not runs:
        raise InputError(f"{', '.join(map(str, folders)) or 'no run'}: give run folders")
    return runs


def _common(runs: Sequence[Path]) -> Path:
    """The folder that holds all the runs, where a report of them looks for claims.json."""
    parents = {run.resolve().parent for run in runs}
    return parents.pop() if len(parents) == 1 else Path(os.path.commonpath([str(parent) for parent in parents]))
