"""The report: one self-contained HTML page about some runs, with Markdown and CSV beside it.

It reads run folders only, computes no embedding and needs no accelerator. See data.py for what it reads, tables.py
for how differences are judged and words.py for what it says about them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from clipdistill.arguments import checked
from clipdistill.errors import InputError
from clipdistill.registry import REPORT_PARTS
from clipdistill.report import IMAGES, report_place
from clipdistill.report.context import VERDICTS, Report
from clipdistill.report.data import ReportedRun, is_export, optional, read_optional, read_runs
from clipdistill.report.gallery import read_galleries
from clipdistill.report.geometry import read_geometry
from clipdistill.report.html import render, to_markdown
from clipdistill.report.tables import ScoreTable, build_table, compare
from clipdistill.report.text import to_csv
from clipdistill.report.trade import read_trade
from clipdistill.report.words import headline
from clipdistill.runs.folder import STAGES, RunFolder, distinct, run_folders
from clipdistill.runtime.console import Shown, file_size
from clipdistill.runtime.files import write_together
from clipdistill.statistics.claims import is_claim, is_measured, judge, read_claims
from clipdistill.statistics.judge import Verdict
from clipdistill.statistics.records import Record, read_records
from clipdistill.statistics.verdicts import evidence

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False)
class ReportSummary(Shown):
    """Where the three files are, the headline (one sentence a line), what could not be shown, the page's bytes."""

    html: Path
    markdown: Path
    csv: Path
    headline: str
    notices: tuple[str, ...]
    size: int

    def __repr__(self) -> str:
        written = f"report: {self.html} ({file_size(self.size)}), also {self.markdown.name} and {self.csv.name}"
        return "\n".join([self.headline, *(f"note: {notice}" for notice in self.notices), "", written])


@checked
def report(
    runs: str | Path | Sequence[str | Path],
    out: str | Path = "report.html",
    *,
    title: str | None = None,
    claims: str | Path | None = None,
    look: bool = False,
    data: str | None = None,
    split: str | None = None,
    images: int = IMAGES,
    device: str | torch.device | None = None,
    quiet: bool = False,
) -> ReportSummary:
    """One HTML page about run folders and exports, with Markdown and CSV beside it.

    runs: folders of runs, of ablations and of runs in stages, and exports of theirs. out: the page, NAME.html. title:
    None is made from the methods. claims: judged on the runs; a YAML file, or "published" for those of the papers.
    look: encode pictures with every model, for a gallery of what each retrieves and the geometry of its embeddings;
    then data, split: pairs to look at (None: each run's validation set), images: how many of them at most, device:
    None is the CPU, and quiet: no progress bars.

    Returns a ReportSummary: html, markdown, csv, the headline, notices, the page's size in bytes. Raises InputError for
    folders that are no runs, broken files, and a place that cannot be written.
    """
    notes: list[str] = []
    given = [Path(run) for run in ([runs] if isinstance(runs, str | Path) else runs)]
    exports = [folder for folder in given if is_export(folder)]
    found = distinct([run for folder in given if folder not in exports for run in _runs_of(folder, notes)])
    for run in found:
        if not run.is_dir():
            raise InputError(f"{run}: no such run folder")
        RunFolder(run).facts()
    out = report_place(out)
    if look:
        from clipdistill.report.look import look as look_at

        notes += look_at(found, data=data, split=split, images=images, device=device, progress=not quiet)
    elif unused := [name for name, one in (("data", data), ("split", split), ("device", device)) if one] + (
        ["images"] if images != IMAGES else []
    ):
        raise InputError(f"--{unused[0]} says what --look looks at, or how: give --look as well")
    return write_report([*found, *exports], out, title=title, claims=claims, notices=notes)


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


def write_report(
    runs: Sequence[Path | str],
    out: Path | str,
    *,
    title: str | None = None,
    claims: str | Path | None = None,
    notices: Sequence[str] = (),
) -> ReportSummary:
    """Write a report on run folders to `out` (.html), with the same name ending in .md and .csv beside it.

    runs: run folders, and exports of their students or teachers (those inside a run's folder are found).
    claims: judge these on the runs (a YAML file of claims, or "published"; see statistics/claims.py).
    notices: shown on the page beside its own.
    Read beside or in the run folders when present: bench.json, gallery.json, geometry.json, claims.json.
    Raises InputError for a folder that is no run, a broken file, or an `out` that is a folder.
    """
    out = report_place(out)
    report = collect([Path(run) for run in runs], title, claims)
    report.notices = [*notices, *report.notices]
    markdown, csv, html = out.with_suffix(".md"), out.with_suffix(".csv"), render(report)
    write_together({markdown: to_markdown(report), csv: to_csv(report), out: html})
    sentences = "\n".join(sentence.text for sentence in report.headline)
    return ReportSummary(out, markdown, csv, sentences, tuple(report.notices), out.stat().st_size)


def collect(folders: Sequence[Path], title: str | None = None, claims: str | Path | None = None) -> Report:
    """Read the run folders and work out everything that the three forms of the report say."""
    exports, folders = [f for f in folders if is_export(f)], [f for f in folders if not is_export(f)]
    runs = read_runs(folders)
    table = build_table(runs)
    comparisons = compare(table)
    trade = read_trade(runs, table)
    notices = [*table.notices, *trade.notices]
    report = Report(
        title=title or _title(table),
        runs=runs,
        table=table,
        comparisons=comparisons,
        trade=trade,
        gallery=read_galleries(runs, table, notices),
        headline=headline(table, comparisons, trade),
        geometry=read_geometry(runs, table, notices),
        exports=next((REPORT_PARTS.get(n)(exports, runs, table, notices) for n in REPORT_PARTS.names()), None),
        notices=notices,
        claims_source=None if claims is None else str(claims),
    )
    wanted = [] if claims is None else read_claims(claims)
    if wanted:
        verdicts = judge(wanted, read_records(folders))
        known = [_shown(verdict) for verdict in verdicts if is_measured(verdict)]
        report.claims = known
        if len(known) < len(verdicts):
            silent = f"{len(verdicts) - len(known)} of {len(verdicts)} claims ({claims})"
            report.claims_note = f"{silent} are about methods or data that these runs do not have."
    said = {claim["text"] for claim in report.claims}
    report.claims = [*(c for c in _stored_claims(runs, folders, notices) if c["text"] not in said), *report.claims]
    report.notices = list(dict.fromkeys(notices))
    return report


def _title(table: ScoreTable) -> str:
    names = [entry.label for entry in table.students]
    shown = names if len(names) <= 4 else [*names[:3], f"{len(names) - 3} more"]
    listed = ", ".join(shown[:-1]) + (" and " if len(shown) > 1 else "") + shown[-1]
    return f"Distilling CLIP: {listed}"


def _stored_claims(runs: Sequence[ReportedRun], folders: Sequence[Path], notices: list[str]) -> list[dict[str, str]]:
    """The claims of claims.json, judged again on these runs so that no other answer stands beside the table.

    What cannot be judged here (free text, other runs) keeps the verdict that is written there.
    """
    found: dict[str, dict[str, str]] = {}
    records: list[Record] | None = None
    for path, _, stored in read_optional(runs, "claims.json", notices):
        with optional(path, notices):
            for row in stored["claims"]:
                verdict = str(row.get("verdict", "undecided"))
                kind = verdict if verdict in VERDICTS else "undecided"
                text = _in_place(str(row.get("claim") or row.get("text") or ""))
                why = str(row.get("evidence") or row.get("why") or "")
                judged: list[Verdict] = []
                if is_claim(text) and all(run.seed is not None for run in runs):
                    records = read_records(folders) if records is None else records
                    judged = [verdict for verdict in judge([text], records) if is_measured(verdict)]
                for shown in map(_shown, judged) if judged else [_row(kind, text, why)]:
                    found[shown["text"]] = shown
    return list(found.values())


def _shown(verdict: Verdict) -> dict[str, str]:
    return _row(verdict.outcome, _in_place(verdict.claim), evidence(verdict))


def _row(verdict: str, text: str, evidence: str) -> dict[str, str]:
    return {"kind": verdict, "verdict": verdict, "text": text, "evidence": evidence}


def _in_place(claim: str) -> str:
    """ "a > b on flickr8k top1" for "a > b on * top1 [flickr8k]"."""
    return re.sub(r" on \* (\S+) \[(.+)\]$", r" on \2 \1", claim)
