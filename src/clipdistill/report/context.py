"""What the page shows, section by section, as plain values for the template: text stays text (the template escapes it),
and only charts made by svg.py are handed over as markup.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from clipdistill.report import plots
from clipdistill.report.data import Run
from clipdistill.report.gallery import Gallery
from clipdistill.report.geometry import Shape
from clipdistill.report.reproduce import reproduce
from clipdistill.report.svg import SMALL_WIDTH, WIDTH, compact
from clipdistill.report.svg import rate as show
from clipdistill.report.tables import MAIN_METRICS, Column, Entry, Estimate, PairComparison, ScoreTable
from clipdistill.report.trade import Device, Speed, Trade
from clipdistill.report.words import Sentence, interval_text, metric_text, points_text, value_text
from clipdistill.statistics.verdicts import basis_text, better_text, p_text

BADGES = {"win": "beats", "loss": "worse", "open": "undecided", "cost": "buys", "caution": "caution"}
VERDICTS = ("supported", "contradicted", "undecided")


@dataclass
class Report:
    """Everything read and computed, before it is written in any form."""

    title: str
    runs: list[Run]
    table: ScoreTable
    comparisons: list[PairComparison]
    trade: Trade
    gallery: Gallery | None
    headline: list[Sentence]
    claims: list[dict[str, str]]
    geometry: list[Shape]
    notices: list[str]
    claims_note: str = ""
    claims_source: str | None = None


def page(report: Report) -> dict[str, Any]:
    """The template's variables (without the assets, which html.py adds)."""
    table = report.table
    lead = next((s.text for s in report.headline if s.kind == "lead"), "")
    width = SMALL_WIDTH if len(table.lead) % 3 == 0 else WIDTH  # three charts abreast, or two
    context: dict[str, Any] = {
        "lead_kind": "three" if width == SMALL_WIDTH else "",
        "title": report.title,
        "subtitle": _subtitle(report),
        "lead": lead,
        "tiles": _tiles(report),
        "verdicts": [
            {"kind": s.kind, "badge": BADGES[s.kind], "text": s.text} for s in report.headline if s.kind != "lead"
        ],
        "notices": report.notices,
        "entries": table.entries,
        "students": table.students,
        "main_table": _score_table(
            table, [c for c in table.columns if c.metric in MAIN_METRICS] or table.columns, "Scores"
        ),
        "full_table": _score_table(table, table.columns, "All scores"),
        "forests": _charts((table.title_of(c), plots.forest_chart(c, table.entries, width)) for c in table.lead),
        "differences": _charts(
            (table.title_of(c), plots.difference_chart(c, report.comparisons, width)) for c in table.lead
        ),
        "comparison_table": comparison_table(report),
        "basis": basis_text([c.verdict for c in report.comparisons]),
        "trade_charts": _trade_charts(report),
        "speed_tables": [
            {
                "label": d.label,
                "table": speed_table(d),
                "warnings": list(dict.fromkeys(d.warnings)),
                "libraries": _libraries(d),
            }
            for d in report.trade.devices
        ],
        "size_table": size_table(report),
        "failures": report.trade.failures,
        "evaluation_charts": _charts(plots.evaluation_charts(table)),
        "loss_charts": _charts(plots.loss_charts(table)),
        "comparable_losses": len(table.students) < 2,
        "gallery": _gallery(report.gallery),
        "geometry_charts": _geometry_charts(report),
        "geometry_table": _geometry_table(report),
        "claims": report.claims,
        "claims_note": report.claims_note,
        "cost_table": cost_table(table),
        "bad_table": _bad_table(table),
        "bad_examples": [example for run in report.runs for example in run.bad_examples][:20],
        "protocols": [
            {"number": number, "label": label, "conditions": _conditions(conditions)}
            for number, label, conditions in table.protocols
        ],
        "reproduce": [reproduce(run) for run in report.runs],
        "bench_commands": bench_commands(report),
        "report_command": report_command(report),
    }
    context["symbols"] = {key: symbol for symbol, key in context["gallery"]["names"]} if context["gallery"] else {}
    if not table.columns:
        context["main_table"] = None
    if len(table.columns) <= len([c for c in table.columns if c.metric in MAIN_METRICS]):
        context["full_table"] = None
    context["sections"] = _sections(context)
    return context


def report_command(report: Report) -> str:
    """The command that writes this page again."""
    claims = ["--claims", report.claims_source] if report.claims_source else []
    folders = [str(run.folder) for run in report.runs]
    return shlex.join(["clipdistill", "report", *folders, *claims, "--out", "report.html"])


def bench_commands(report: Report) -> list[str]:
    """The commands that measured speed; where none was kept (a demo measures by itself), one that measures it again."""
    kept = list(dict.fromkeys(c for d in report.trade.devices for c in d.commands))
    if kept or not report.trade.devices:
        return kept
    teachers = list(dict.fromkeys(run.teacher for run in report.runs if run.teacher))
    return [shlex.join(["clipdistill", "bench", *teachers, *(str(run.folder) for run in report.runs)])]


def comparison_table(report: Report) -> dict[str, Any] | None:
    """Every comparison as a row."""
    if not report.comparisons:
        return None
    rows = []
    for c in report.comparisons:
        cells = [
            _cell(c.baseline.label),
            _cell(metric_text(c.column, report.table)),
            _cell(points_text(c)),
            _cell("–" if c.verdict.p is None else p_text(c.verdict.p)),
            _cell("–" if c.verdict.p_holm is None else p_text(c.verdict.p_holm)),
            _cell(better_text(c.verdict)),
        ]
        rows.append({"entry": c.challenger, "cells": cells})
    titles = ["Student", "Against", "Measure", "Difference", "p", "p (Holm)", "Verdict"]
    return {"name": "Comparisons", "titles": titles, "texts": [0, 1, 2], "rows": rows}


def speed_table(device: Device) -> dict[str, Any]:
    """All speeds of one device; batch 1 adds latency."""

    def rate(speed: Speed, tower: str) -> dict[str, str]:
        found = speed.rates.get(tower)
        if found is None:
            return _cell("–")
        return _cell(show(found.value), interval_text(found, False))

    def latency(speed: Speed) -> dict[str, str]:
        parts = [f"{tower} {m:.3g} ms" for tower, (m, _) in speed.latency.items() if tower in ("image", "text")]
        tails = [f"{tower} {p:.3g} ms" for tower, (_, p) in speed.latency.items() if tower in ("image", "text")]
        return _cell(", ".join(parts) or "–", f"p95 {', '.join(tails)}" if tails else "")

    rows = []
    for s in device.speeds:
        borrowed = f"as {s.borrowed}: same architecture" if s.borrowed else ""
        row = [
            _cell(f"{s.backend}, {s.dtype}, batch {s.batch}", borrowed),
            rate(s, "image"),
            rate(s, "text"),
            rate(s, "pair"),
        ]
        row += [rate(s, "end-to-end"), latency(s), _cell(_bytes(s.peak_bytes))]
        rows.append({"entry": s.entry, "name": s.name, "cells": row})
    titles = [
        "Model",
        "Setting",
        "Images/s",
        "Texts/s",
        "Pairs/s",
        "End to end images/s",
        "Latency of a call",
        "Peak memory",
    ]
    return {"name": f"Speed on {device.label}", "titles": titles, "texts": [0, 1], "rows": rows}


def size_table(report: Report) -> dict[str, Any] | None:
    """Parameters, bytes and FLOPs of each entry."""
    rows = []
    for entry in report.table.entries:
        size = report.trade.sizes.get(entry.label)
        if size is None:
            continue
        values = [size.parameters, size.image_parameters, size.text_parameters]
        cells = [_cell(compact(v) if v else "–") for v in values] + [_cell(_bytes(size.bytes))]
        cells += [_cell(compact(v) if v else "–") for v in (size.image_flops, size.text_flops)]
        rows.append({"entry": entry, "cells": cells})
    titles = ["Model", "Parameters", "Image tower", "Text tower", "On disk", "FLOPs per image", "FLOPs per text"]
    return {"name": "Size", "titles": titles, "texts": [0], "rows": rows} if rows else None


def cost_table(table: ScoreTable) -> dict[str, Any]:
    """What each run took: time, samples, rate, waiting for data, device."""
    rows = []
    for entry in table.students:
        for run in entry.runs:
            wait = run.vitals.get("data_wait")
            share = f"{100 * sum(wait.y) / len(wait.y):.0f} %" if wait and wait.y else "–"
            rate = run.samples_seen / run.seconds if run.seconds else 0.0
            cells = [
                _cell("–" if run.seed is None else str(run.seed)),
                _cell(duration(run.seconds)),
                _cell(f"{run.samples_seen:,}"),
                _cell(f"{rate:,.0f}" if rate else "–"),
                _cell(share),
                _cell(", ".join(part for part in (run.device, run.dtype) if part) or "–"),
                _cell(run.status or "–"),
            ]
            rows.append({"entry": entry, "cells": cells})
    titles = ["Run", "Seed", "Time", "Samples seen", "Samples/s", "Waiting for data", "Device", "Status"]
    return {"name": "Cost of training", "titles": titles, "texts": [0], "rows": rows}


def duration(seconds: float) -> str:
    """ "48 s", "3 min 20 s", "5 h 12 min"."""
    if seconds <= 0:
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def _subtitle(report: Report) -> str:
    runs = report.runs
    teachers = list(dict.fromkeys(run.teacher for run in runs if run.teacher))
    students = list(dict.fromkeys(run.student for run in runs if run.student))
    data = list(dict.fromkeys(run.data for run in runs if run.data))
    parts = [f"{len(runs)} run{'s' if len(runs) != 1 else ''}"]
    parts += [f"student {', '.join(students)}"] if students else []
    parts += [f"teacher {', '.join(teachers)}"] if teachers else []
    parts += [f"trained on {', '.join(data)}"] if data else []
    return " · ".join(parts)


def _tiles(report: Report) -> list[dict[str, str]]:
    table, trade = report.table, report.trade
    column = table.lead[0] if table.lead else None
    best = column.best(table.entries) if column else None
    teacher = table.teacher_of(best) if best else None
    if column is None or best is None:
        return []
    tiles = [{"value": value_text(column.cells[best.label], column.is_share), "text": f"{column.title}, {best.label}"}]
    kept = table.retention(best, column)
    if kept is not None:
        tiles.append({"value": f"{100 * kept.value:.0f} %", "text": f"of the teacher's {column.title} kept"})
    for device in trade.devices[:1]:
        setting = device.best_setting()
        ratio = device.ratio(best, teacher, "pair", setting) if teacher is not None and setting is not None else None
        if ratio is not None:
            tiles.append({"value": f"{ratio.value:.1f}×", "text": "the teacher's image-text pairs per second"})
    mine, theirs = trade.sizes.get(best.label), trade.sizes.get(teacher.label) if teacher else None
    if mine and theirs and mine.parameters and theirs.parameters:
        share = f"{100 * mine.parameters / theirs.parameters:.3g} %"
        tiles.append(
            {
                "value": share,
                "text": f"of the teacher's parameters ({compact(mine.parameters)} of {compact(theirs.parameters)})",
            }
        )
    if len(tiles) < 4 and best.first.seconds:
        tiles.append(
            {"value": duration(best.first.seconds), "text": f"of training on {best.first.device or 'one device'}"}
        )
    return tiles[:4]


def _score_table(table: ScoreTable, columns: Sequence[Column], name: str) -> dict[str, Any]:
    groups: list[dict[str, Any]] = []
    for column in columns:
        if groups and groups[-1]["number"] == column.number:
            groups[-1]["span"] += 1
        else:
            groups.append({"number": column.number, "label": column.label, "span": 1})
    best = {id(column): column.best(table.entries) for column in columns}
    rows = []
    for entry in table.entries:
        cells: list[dict[str, Any] | None] = []
        for column in columns:
            cell = column.cells.get(entry.label)
            if cell is None:
                cells.append(None)
                continue
            kept = table.retention(entry, column)
            seeds = f" over {cell.seeds} seeds" if cell.seeds > 1 else ""
            cells.append(
                {
                    "value": value_text(cell, column.is_share).removesuffix(" %"),
                    "interval": interval_text(cell, column.is_share) + seeds,
                    "kept": f"{100 * kept.value:.0f} % kept" if kept else "",
                    "best": best[id(column)] is entry and len(table.students) > 1,
                }
            )
        rows.append({"entry": entry, "cells": cells})
    return {"name": name, "groups": groups, "titles": [c.title for c in columns], "rows": rows}


def _charts(items: Any) -> list[dict[str, Any]]:
    return [{"title": title, "note": "", "svg": Markup(svg)} for title, svg in items if svg]


def _trade_charts(report: Report) -> list[dict[str, Any]]:
    table, charts = report.table, []
    wanted = list({column.metric: column for column in reversed(table.lead)}.values())[::-1]
    wanted = [c for c in wanted if c.metric != "i2t_R@1"] or wanted[:1]  # the two directions tell the same story
    for column in wanted:
        for device in report.trade.devices:
            setting = device.best_setting()
            svg = plots.speed_chart(device, table, column)
            if svg and setting:
                note = f"{device.label}; {setting[0]}, {setting[1]}, batch {setting[2]}"
                charts.append(
                    {"title": f"{table.title_of(column)} against throughput", "note": note, "svg": Markup(svg)}
                )
        svg = plots.size_chart(report.trade, table, column)
        if svg:
            note = "parameters of both towers together"
            charts.append({"title": f"{table.title_of(column)} against size", "note": note, "svg": Markup(svg)})
    return charts


def _libraries(device: Device) -> str:
    return "Measured with " + ", ".join(f"{k} {v}" for k, v in device.libraries.items()) if device.libraries else ""


def _gallery(gallery: Gallery | None) -> dict[str, Any] | None:
    if gallery is None or not gallery.queries:
        return None
    shown = {a.key for q in gallery.queries for _, answers, _ in q.answers for a in answers} | {
        q.key for q in gallery.queries
    }
    names = [(f"p{i}", key) for i, key in enumerate(k for k in gallery.thumbnails if k in shown)]
    symbols = [{"id": name, "uri": gallery.thumbnails[key][0]} for name, key in names]
    return {"selection": gallery.selection, "queries": gallery.queries, "symbols": symbols, "names": names}


def _geometry_charts(report: Report) -> list[dict[str, Any]]:
    found: dict[str, list[tuple[Entry, list[float], list[float]]]] = {}
    for shape in report.geometry:
        for name, (edges, heights) in shape.histograms.items():
            found.setdefault(name, []).append((shape.entry, edges, heights))
    return _charts((name, plots.histogram_chart(name, series)) for name, series in found.items())


def _geometry_table(report: Report) -> dict[str, Any] | None:
    titles = list(dict.fromkeys(title for shape in report.geometry for title in shape.values))
    if not titles:
        return None
    rows = []
    for shape in report.geometry:
        cells = [_cell(f"{shape.values[title]:.3g}" if title in shape.values else "–") for title in titles]
        rows.append({"entry": shape.entry, "cells": cells})
    return {"name": "Geometry", "titles": ["Model", *titles], "texts": [0], "rows": rows}


def _bad_table(table: ScoreTable) -> dict[str, Any] | None:
    rows = [
        {"entry": entry, "cells": [_cell(reason), _cell(f"{count:,}")]}
        for entry in table.students
        for run in entry.runs
        for reason, count in run.bad_samples.items()
    ]
    titles = ["Run", "Reason", "Distinct samples"]
    return {"name": "Bad samples", "titles": titles, "texts": [0, 1], "rows": rows} if rows else None


def _conditions(protocol: Sequence[tuple[str, Any]]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), str(value)) for name, value in protocol if value not in (None, "")]


def _sections(context: dict[str, Any]) -> list[tuple[str, str]]:
    known = [
        ("scores", "Scores", "main_table"),
        ("comparisons", "Who beats whom", "differences"),
        ("trade", "Speed and size", "speed_tables"),
        ("curves", "Learning curves", "loss_charts"),
        ("gallery", "Gallery", "gallery"),
        ("geometry", "Geometry", "geometry_table"),
        ("claims", "Claims", "claims"),
        ("cost", "Cost", "cost_table"),
        ("reproduce", "Reproduce", "reproduce"),
    ]
    return [(anchor, name) for anchor, name, needed in known if context[needed]]


def _cell(text: str, small: str = "") -> dict[str, str]:
    return {"text": text, "small": small}


def _bytes(value: float | None) -> str:
    if not value:
        return "–"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def estimate_row(estimate: Estimate) -> list[str]:
    """value, low, high as full-precision text for CSV."""
    return ["" if v is None else repr(float(v)) for v in (estimate.value, estimate.low, estimate.high)]
