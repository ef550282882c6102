"""What the page shows beside the tables: tiles, charts, gallery, and the variables of the templates.

Text stays text (the templates escape it); only charts made by svg.py are handed over as markup.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from clipdistill.report import grids, plots
from clipdistill.report.data import ReportedRun
from clipdistill.report.gallery import Gallery
from clipdistill.report.geometry import Geometry
from clipdistill.report.reproduce import eval_commands, run_facts, train_command
from clipdistill.report.svg import SMALL_WIDTH, WIDTH
from clipdistill.report.tables import MAIN_METRICS, Entry, PairComparison, ScoreTable
from clipdistill.report.trade import Trade
from clipdistill.report.words import Sentence, value_text
from clipdistill.runtime.console import compact, duration
from clipdistill.statistics.verdicts import basis_text

BADGES = {"win": "beats", "loss": "worse", "open": "undecided", "cost": "buys", "caution": "caution"}
VERDICTS = ("supported", "contradicted", "undecided")
Titled = list[dict[str, Any]]


@dataclass
class Report:
    """Everything read and computed, before it is written in any form."""

    title: str
    runs: list[ReportedRun]
    table: ScoreTable
    comparisons: list[PairComparison]
    trade: Trade
    gallery: Gallery | None
    headline: list[Sentence]
    claims: list[dict[str, str]] = field(default_factory=list)
    geometry: list[Geometry] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    exports: Any = None
    """What a part of its own read of the exports: charts, grid, rows, given (report/exports.py)."""
    claims_note: str = ""
    claims_source: str | None = None


def variables(report: Report) -> dict[str, Any]:
    """What the page's and the Markdown's template are filled with."""
    table = report.table
    found: dict[str, Any] = {
        "report": report,
        "table": table,
        "score": lambda entry, column: grids.score_cell(entry, column, table),
        "comparison_grid": grids.comparison_grid(report.comparisons, table),
        "speed_grids": [(device, grids.speed_grid(device)) for device in report.trade.devices],
        "size_grid": grids.size_grid(report.trade, table),
        "cost_grid": grids.cost_grid(table),
        "train_command": train_command,
        "eval_commands": eval_commands,
        "run_facts": run_facts,
        "bench_commands": bench_commands(report),
        "report_command": report_command(report),
    }
    return found


def page_variables(report: Report) -> dict[str, Any]:
    """What only the page shows."""
    table = report.table
    width = SMALL_WIDTH if len(table.lead) % 3 == 0 else WIDTH  # three charts abreast, or two
    main = [c for c in table.columns if c.metric in MAIN_METRICS] or table.columns
    forests = ((table.title_of(c), plots.forest_chart(c, table.entries, width)) for c in table.lead)
    differences = ((table.title_of(c), plots.difference_chart(c, report.comparisons, width)) for c in table.lead)
    histograms: dict[str, list[tuple[Entry, list[float], list[float]]]] = {}
    for one in report.geometry:
        for name, (edges, heights) in one.histograms.items():
            histograms.setdefault(name, []).append((one.entry, edges, heights))
    names: dict[str, str] = {}
    if report.gallery:
        shown = {a.key for q in report.gallery.queries for _, answers, _ in q.answers for a in answers}
        shown |= {q.key for q in report.gallery.queries}
        names = {key: f"p{i}" for i, key in enumerate(key for key in report.gallery.thumbnails if key in shown)}
    found: dict[str, Any] = {
        "badges": BADGES,
        "lead_kind": "three" if width == SMALL_WIDTH else "",
        "subtitle": _subtitle(report),
        "tiles": _tiles(report),
        "main_columns": main,
        "more_columns": table.columns if len(table.columns) > len(main) else [],
        "forests": _charts(forests),
        "differences": _charts(differences),
        "basis": basis_text([c.verdict for c in report.comparisons]),
        "trade_charts": _trade_charts(report),
        "evaluation_charts": _charts(plots.evaluation_charts(table)),
        "loss_charts": _charts(plots.loss_charts(table)),
        "symbols": names,
        "geometry_charts": _charts((n, plots.histogram_chart(n, series)) for n, series in histograms.items()),
        "geometry_grid": grids.geometry_grid(report.geometry),
        "bad_grid": grids.bad_grid(table),
        "bad_examples": [example for run in report.runs for example in run.bad_examples][:20],
    }
    found["sections"] = [
        (anchor, name)
        for anchor, name, needed in (
            ("scores", "Scores", table.columns),
            ("comparisons", "Who beats whom", found["differences"]),
            ("trade", "Speed and size", report.trade.devices),
            ("exports", "Exports", report.exports),
            ("curves", "Learning curves", found["loss_charts"]),
            ("gallery", "Gallery", report.gallery),
            ("geometry", "Geometry", found["geometry_grid"]),
            ("claims", "Claims", report.claims),
            ("cost", "Cost", True),
            ("reproduce", "Reproduce", True),
        )
        if needed
    ]
    return found


def report_command(report: Report) -> str:
    """The command that writes this page again."""
    claims = ["--claims", report.claims_source] if report.claims_source else []
    folders = [*(str(run.folder) for run in report.runs), *(report.exports.given if report.exports else ())]
    return shlex.join(["clipdistill", "report", *folders, *claims, "--out", "report.html"])


def bench_commands(report: Report) -> list[str]:
    """The commands that measured speed; where none was kept (a demo measures by itself), one that measures it again."""
    kept = list(dict.fromkeys(c for d in report.trade.devices for c in d.commands))
    if kept or not report.trade.devices:
        return kept
    teachers = list(dict.fromkeys(run.teacher for run in report.runs if run.teacher))
    return [shlex.join(["clipdistill", "bench", *teachers, *(str(run.folder) for run in report.runs)])]


def _subtitle(report: Report) -> str:
    runs = report.runs
    parts = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}"]
    for word, names in (
        ("student", [run.student for run in runs]),
        ("teacher", [run.teacher for run in runs]),
        ("trained on", [run.data for run in runs]),
    ):
        known = list(dict.fromkeys(name for name in names if name))
        parts += [f"{word} {', '.join(known)}"] if known else []
    return " · ".join(parts)


def _tiles(report: Report) -> list[tuple[str, str]]:
    """(number, what it is): the best student's score, what it keeps, how fast and how small it is, what it cost."""
    table, trade = report.table, report.trade
    best = table.lead[0].best(table.entries) if table.lead else None
    if best is None:
        return []
    column, teacher = table.lead[0], table.teacher_of(best)
    tiles = [(value_text(column.cells[best.label], column.is_share), f"{column.title}, {best.label}")]
    kept = table.retention(best, column)
    if kept is not None:
        tiles.append((f"{100 * kept.value:.0f} %", f"of {table.whose(best)} {column.title}"))
    for device in trade.devices[:1]:
        setting = device.best_setting()
        ratio = device.ratio(best, teacher, "pair", setting) if teacher is not None and setting is not None else None
        if ratio is not None:
            tiles.append((f"{ratio.value:.1f}×", f"{table.whose(best)} image-text pairs per second"))
    mine, theirs = trade.sizes.get(best.label), trade.sizes.get(teacher.label) if teacher else None
    if mine and theirs and mine.parameters and theirs.parameters:
        counts = f"{compact(mine.parameters)} of {compact(theirs.parameters)}"
        tiles.append(
            (f"{100 * mine.parameters / theirs.parameters:.3g} %", f"of {table.whose(best)} parameters ({counts})")
        )
    if best.first.seconds:
        tiles.append((duration(best.first.seconds), f"of training on {best.first.device or 'one device'}"))
    return tiles[:4]


def _charts(items: Iterable[tuple[str, str]]) -> Titled:
    return [{"title": title, "note": "", "svg": Markup(svg)} for title, svg in items if svg]


def _trade_charts(report: Report) -> Titled:
    table, charts = report.table, []
    wanted = list({column.metric: column for column in reversed(table.lead)}.values())[::-1]
    wanted = [c for c in wanted if c.metric != "i2t_R@1"] or wanted[:1]  # the two directions tell the same story
    for column in wanted:
        title = table.title_of(column)
        for device in report.trade.devices:
            setting = device.best_setting()
            svg = plots.speed_chart(device, table, column)
            if svg and setting:
                note = f"{device.label}; {setting[0]}, {setting[1]}, batch {setting[2]}"
                charts.append({"title": f"{title} against throughput", "note": note, "svg": Markup(svg)})
        svg = plots.size_chart(report.trade, table, column)
        if svg:
            note = "parameters of both towers together"
            charts.append({"title": f"{title} against size", "note": note, "svg": Markup(svg)})
    return charts
