"""The tables of the report beside the scores, as plain text in cells: drawn by the page's template and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from clipdistill.report.data import ReportedRun
from clipdistill.report.geometry import Geometry
from clipdistill.report.tables import Entry, PairComparison, ScoreColumn, ScoreTable
from clipdistill.report.trade import BenchDevice, Speed, Trade
from clipdistill.report.words import interval_text, metric_text, points_text, value_text
from clipdistill.runtime.console import TextTable, compact, duration, file_size
from clipdistill.runtime.console import rate as show
from clipdistill.statistics.records import NOISY
from clipdistill.statistics.verdicts import better_text, p_text


@dataclass
class ReportGrid:
    """`texts`: columns that hold text. A row is (an entry or a name, cells of (text, small text below it))."""

    name: str
    titles: Sequence[str]
    texts: Sequence[int] = (0,)
    rows: list[tuple[Entry | str, list[tuple[str, str]]]] = field(default_factory=list)

    def add(self, of: Entry | str, *cells: str | tuple[str, str]) -> None:
        """Append a row; an empty cell shows a dash."""
        pairs = [(cell, "") if isinstance(cell, str) else cell for cell in cells]
        self.rows.append((of, [(text or "–", small) for text, small in pairs]))

    def __bool__(self) -> bool:
        return bool(self.rows)

    def plain(self) -> TextTable:
        """As plain text, the small text in brackets."""
        table = TextTable(self.titles, title=self.name, text=self.texts)
        for of, cells in self.rows:
            name = of if isinstance(of, str) else of.label
            table.rows.append([name, *(f"{text} ({small})" if small else text for text, small in cells)])
        return table


@dataclass(frozen=True)
class ScoreCell:
    """A score as text: the value with its unit, its interval, the share of the teacher's that it is."""

    value: str
    interval: str
    kept: str
    seeds: int
    best: bool

    def text(self) -> str:
        """ "45.9 %, 42.8 to 49.0 (84 %)"."""
        return self.value + (f", {self.interval}" if self.interval else "") + (f" ({self.kept})" if self.kept else "")


def score_cell(entry: Entry, column: ScoreColumn, table: ScoreTable) -> ScoreCell | None:
    """The score of an entry in a column; None where it has none."""
    cell, kept = column.cells.get(entry.label), table.retention(entry, column)
    if cell is None:
        return None
    best = len(table.students) > 1 and column.best(table.entries) is entry
    whose = "" if table.is_taught(entry) else " of teacher"  # short: it is not to widen the table beyond a page
    share = f"{100 * kept.value:.0f} %{whose}" if kept else ""
    interval = interval_text(cell, column.is_share)
    return ScoreCell(value_text(cell, column.is_share), interval, share, cell.seeds, best)


def comparison_grid(comparisons: Sequence[PairComparison], table: ScoreTable) -> ReportGrid:
    """Every comparison as a row."""
    titles = ["Student", "Against", "Measure", "Difference", "p", "p (Holm)", "Verdict"]
    grid = ReportGrid("Comparisons", titles, (0, 1, 2))
    for c in comparisons:
        measure = metric_text(c.column, table)
        ps = ["" if p is None else p_text(p) for p in (c.verdict.p, c.verdict.p_holm)]
        grid.add(c.challenger, c.baseline.label, measure, points_text(c), *ps, better_text(c.verdict))
    return grid


def speed_grid(device: BenchDevice) -> ReportGrid:
    """All speeds of one device, with the latency of a call."""
    titles = ["Model", "Setting", "Images/s", "Texts/s", "Pairs/s", "End to end images/s"]
    grid = ReportGrid(f"Speed on {device.label}", [*titles, "Latency of a call", "Peak memory"], (0, 1))

    def latency(speed: Speed, place: int) -> str:
        found = [(tower, speed.latency[tower][place]) for tower in ("image", "text") if tower in speed.latency]
        return ", ".join(f"{tower} {value:.3g} ms" for tower, value in found)

    for s in device.speeds:
        setting = (
            f"{s.backend}, {s.dtype}, batch {s.batch}",
            "; ".join(
                ([f"as {s.borrowed}: same architecture"] if s.borrowed else [])
                + ([f"{NOISY}: nothing is judged by it"] if s.setting in device.noisy else [])
            ),
        )
        rates = [s.rates.get(tower) for tower in ("image", "text", "pair", "end-to-end")]
        cells = ["" if rate is None else (show(rate.value), interval_text(rate, False)) for rate in rates]
        median, p95 = latency(s, 0), latency(s, 1)
        memory = file_size(s.peak_bytes) if s.peak_bytes else ""
        grid.add(s.entry or s.name, setting, *cells, (median, p95 and f"p95 {p95}"), memory)
    return grid


def size_grid(trade: Trade, table: ScoreTable) -> ReportGrid:
    """Parameters, bytes and FLOPs of each entry."""
    titles = ["Model", "Parameters", "Image tower", "Text tower", "On disk", "FLOPs per image", "FLOPs per text"]
    grid = ReportGrid("Size", titles)
    for entry in table.entries:
        size = trade.sizes.get(entry.label)
        if size is not None:
            counts = [size.parameters, size.image_parameters, size.text_parameters, size.image_flops, size.text_flops]
            cells = [compact(v) if v else "" for v in counts]
            grid.add(entry, *cells[:3], file_size(size.bytes) if size.bytes else "", *cells[3:])
    return grid


def cost_grid(table: ScoreTable) -> ReportGrid:
    """What each run took: time, samples, rate, waiting for data, device."""
    titles = ["Run", "Seed", "Time", "Samples seen", "Samples/s", "Waiting for data", "Device", "Status"]
    grid = ReportGrid("Cost of training", titles)
    for entry, run in _runs(table):
        wait = run.vitals.get("data_wait")
        grid.add(
            entry,
            "" if run.seed is None else str(run.seed),
            duration(run.seconds),
            f"{run.samples_seen:,}",
            f"{run.samples_seen / run.seconds:,.0f}" if run.seconds and run.samples_seen else "",
            f"{100 * sum(wait.y) / len(wait.y):.0f} %" if wait and wait.y else "",
            ", ".join(part for part in (run.device, run.dtype) if part),
            run.status,
        )
    return grid


def bad_grid(table: ScoreTable) -> ReportGrid:
    """Samples that could not be used, by reason."""
    grid = ReportGrid("Bad samples", ["Run", "Reason", "Distinct samples"], (0, 1))
    for entry, run in _runs(table):
        for reason, count in run.bad_samples.items():
            grid.add(entry, reason, f"{count:,}")
    return grid


def geometry_grid(found: Sequence[Geometry]) -> ReportGrid:
    """The numbers of the embeddings' geometry, a column for each that somebody has."""
    titles = list(dict.fromkeys(title for one in found for title in one.values))
    grid = ReportGrid("Geometry", ["Model", *titles])
    for one in found if titles else ():
        grid.add(one.entry, *(f"{one.values[title]:.3g}" if title in one.values else "" for title in titles))
    return grid


def _runs(table: ScoreTable) -> list[tuple[Entry, ReportedRun]]:
    return [(entry, run) for entry in table.students for run in entry.runs]
