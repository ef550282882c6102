"""The report as Markdown (for a README or an issue) and as CSV (one tidy row per number)."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

from clipdistill.report.context import (
    Report,
    bench_commands,
    comparison_table,
    cost_table,
    report_command,
    size_table,
    speed_table,
)
from clipdistill.report.reproduce import eval_commands, train_command
from clipdistill.report.tables import Estimate
from clipdistill.report.words import interval_text, value_text
from clipdistill.statistics.verdicts import better_text

CSV_COLUMNS = (
    "kind",
    "model",
    "role",
    "measure",
    "condition",
    "value",
    "low",
    "high",
    "n",
    "seeds",
    "retention",
    "verdict",
)


def to_markdown(report: Report) -> str:
    """Headline, scores, comparisons, speed, size, cost and how to reproduce them."""
    table = report.table
    parts = [f"# {escape(report.title)}", ""]
    parts += [f"- {escape(sentence.text)}" for sentence in report.headline] + [""]
    parts += [f"> {escape(notice)}\n" for notice in report.notices]
    for number, label, _ in table.protocols:
        columns = [c for c in table.columns if c.number == number]
        parts += [
            f"## Scores [{number}] {escape(label)}",
            "",
            "95 % intervals; in brackets the share of the teacher's score.",
            "",
        ]
        rows = []
        for entry in table.entries:
            cells = []
            for column in columns:
                cell, kept = column.cells.get(entry.label), table.retention(entry, column)
                if cell is None:
                    cells.append("–")
                    continue
                interval = interval_text(cell, column.is_share)
                text = value_text(cell, column.is_share) + (f", {interval}" if interval else "")
                cells.append(text + (f" ({100 * kept.value:.0f} %)" if kept else ""))
            rows.append([entry.label, *cells])
        parts += [_table(["Model", *(c.title for c in columns)], rows), ""]
    for heading, found in (
        ("Who beats whom", comparison_table(report)),
        *((f"Speed on {device.label}", speed_table(device)) for device in report.trade.devices),
        ("Size", size_table(report)),
        ("Cost of training", cost_table(table)),
    ):
        if found and found["rows"]:
            parts += [f"## {escape(heading)}", "", _grid(found), ""]
    if report.claims:
        parts += (
            ["## Claims", ""]
            + [f"- **{c['verdict']}**: {escape(c['text'])} {escape(c['evidence'])}" for c in report.claims]
            + [""]
        )
    parts += ["## How to reproduce", ""]
    parts += [f"- {escape(run.name)}: {_code(command)}" for run in report.runs if (command := train_command(run))]
    parts += [f"- speed: {_code(command)}" for command in bench_commands(report)]
    for run in report.runs:
        parts += [f"- scores of {escape(run.name)}: {_code(command)}" for command in eval_commands(run)]
    parts += [f"- this report: {_code(report_command(report))}", ""]
    return "\n".join(parts)


def to_csv(report: Report) -> str:
    """One row per number; columns as in CSV_COLUMNS, numbers in full precision, shares as fractions of one."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    table = report.table

    def row(kind: str, model: str, role: str, measure: str, condition: str, estimate: Estimate, **more: Any) -> None:
        values = {
            "kind": kind,
            "model": _cell(model),
            "role": role,
            "measure": _cell(measure),
            "condition": _cell(condition),
        }
        numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        filled = {**values, **{k: "" if v is None else repr(float(v)) for k, v in numbers.items()}, **more}
        writer.writerow([filled.get(column, "") for column in CSV_COLUMNS])

    for column in table.columns:
        for entry in table.entries:
            cell, kept = column.cells.get(entry.label), table.retention(entry, column)
            if cell is not None:
                retention = repr(kept.value) if kept else ""
                more = {"n": cell.n or "", "seeds": cell.seeds, "retention": retention}
                row("score", entry.label, entry.role, column.metric, f"[{column.number}] {column.label}", cell, **more)
    for c in report.comparisons:
        low, high = c.bounds or (None, None)
        estimate = Estimate(c.difference, low, high)
        measure = f"{c.column.metric} minus {c.baseline.label}"
        row(
            "difference",
            c.challenger.label,
            "student",
            measure,
            f"[{c.column.number}] {c.column.label}",
            estimate,
            verdict=better_text(c.verdict),
        )
    for device in report.trade.devices:
        for speed in device.speeds:
            condition = f"{device.label}; {speed.backend}; {speed.dtype}; batch {speed.batch}"
            role = speed.entry.role if speed.entry else ""
            for tower, rate in speed.rates.items():
                row("speed", speed.name, role, f"{tower} per second", condition, rate)
            for tower, (median, p95) in speed.latency.items():
                row("latency", speed.name, role, f"{tower} median ms", condition, Estimate(median))
                row("latency", speed.name, role, f"{tower} p95 ms", condition, Estimate(p95))
    for entry in table.entries:
        size = report.trade.sizes.get(entry.label)
        for measure, value in vars(size).items() if size else ():
            if value is not None:
                row("size", entry.label, entry.role, measure, "", Estimate(value))
    for entry in table.students:
        for run in entry.runs:
            row("cost", entry.label, "student", "training seconds", f"{run.name}; {run.device}", Estimate(run.seconds))
            row("cost", entry.label, "student", "samples seen", run.name, Estimate(float(run.samples_seen)))
    return file.getvalue()


def escape(text: str) -> str:
    """Text that Markdown shows as it is: markup, tables and HTML are taken literally, line breaks become spaces."""
    flat = re.sub(r"\s+", " ", text).strip()
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(escape(t) for t in titles) + " |", "|" + " --- |" * len(titles)]
    return "\n".join(lines + ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows])


def _grid(table: dict[str, Any]) -> str:
    rows = []
    for row in table["rows"]:
        name = row["entry"].label if row.get("entry") else row["name"]
        rows.append([name, *(f"{c['text']} ({c['small']})" if c["small"] else c["text"] for c in row["cells"])])
    return _table(table["titles"], rows)


def _code(text: str) -> str:
    """Inline code whose fence is longer than any run of backticks inside."""
    flat = re.sub(r"\s+", " ", text)
    fence = "`" * (1 + max([len(run) for run in re.findall(r"`+", flat)] or [0]))
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
