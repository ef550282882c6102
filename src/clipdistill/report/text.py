"""The report as CSV: one tidy row per number."""

from __future__ import annotations

import csv
import io
from typing import Any

from clipdistill.report.context import Report
from clipdistill.report.tables import Estimate
from clipdistill.statistics.verdicts import better_text

CSV_COLUMNS = (
    *("kind", "model", "role", "measure", "condition"),
    *("value", "low", "high", "n", "seeds", "retention", "verdict"),
)


def to_csv(report: Report) -> str:
    """One row per number; columns as in CSV_COLUMNS, numbers in full precision, shares as fractions of one."""
    file, table = io.StringIO(), report.table
    writer = csv.DictWriter(file, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()

    def row(kind: str, model: str, role: str, measure: str, condition: str, estimate: Estimate, **more: Any) -> None:
        texts = {"model": model, "measure": measure, "condition": condition}
        numbers = {"value": estimate.value, "low": estimate.low, "high": estimate.high}
        writer.writerow(
            {"kind": kind, "role": role, **more}
            | {name: _cell(text) for name, text in texts.items()}
            | {name: repr(float(number)) for name, number in numbers.items() if number is not None}
        )

    for column in table.columns:
        condition = f"[{column.number}] {column.label}"
        for entry in table.entries:
            cell, kept = column.cells.get(entry.label), table.retention(entry, column)
            if cell is not None:
                more = {"n": cell.n or "", "seeds": cell.seeds, "retention": repr(kept.value) if kept else ""}
                row("score", entry.label, entry.role, column.metric, condition, cell, **more)
    for c in report.comparisons:
        measure, condition = f"{c.column.metric} minus {c.baseline.label}", f"[{c.column.number}] {c.column.label}"
        estimate = Estimate(c.difference, *(c.bounds or (None, None)))
        row("difference", c.challenger.label, "student", measure, condition, estimate, verdict=better_text(c.verdict))
    for device in report.trade.devices:
        for speed in device.speeds:
            condition = f"{device.label}; {speed.backend}; {speed.dtype}; batch {speed.batch}"
            role = speed.entry.role if speed.entry else ""
            for tower, rate in speed.rates.items():
                row("speed", speed.name, role, f"{tower} per second", condition, rate)
            for tower, (median, p95) in speed.latency.items():
                row("latency", speed.name, role, f"{tower} median ms", condition, Estimate(median))
                row("latency", speed.name, role, f"{tower} p95 ms", condition, Estimate(p95))
    for export in report.exports.rows if report.exports else ():
        row("export", *export)
    for entry in table.entries:
        size = report.trade.sizes.get(entry.label)
        for measure, value in vars(size).items() if size else ():
            if value is not None:
                row("size", entry.label, entry.role, measure, "", Estimate(value))
    for entry in table.students:
        for run in entry.runs:
            row("cost", entry.label, "student", "training seconds", f"{run.name}; {run.device}", Estimate(run.seconds))
            row("cost", entry.label, "student", "samples seen", run.name, Estimate(run.samples_seen))
    return file.getvalue()


def _cell(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
