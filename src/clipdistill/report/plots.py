"""The charts of the report, each an inline SVG from entries and columns. Drawing itself is in svg.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from clipdistill.report.data import ReportCurve
from clipdistill.report.svg import HEIGHT, SMALL_HEIGHT, SMALL_WIDTH, WIDTH, Axis, Chart
from clipdistill.report.tables import Entry, Estimate, PairComparison, ScoreColumn, ScoreTable, is_share, metric_name
from clipdistill.report.trade import BenchDevice, Trade, pareto
from clipdistill.report.words import interval_text, points_text, value_text
from clipdistill.runtime.console import compact, rate


def percent(value: float) -> str:
    """A share as a tick: "40 %"."""
    return f"{100 * value:.3g} %"


def speed_chart(device: BenchDevice, table: ScoreTable, column: ScoreColumn) -> str:
    """Accuracy against pairs per second on one device in its common setting; "" with fewer than two points.

    Students of one architecture run equally fast: they stand at the median of their rates, so that noise between them
    makes none look faster. What was measured of each is in its tip and in the table.
    """
    setting = device.best_setting()
    found = {
        s.entry.label: s for s in reversed(device.speeds) if s.entry and s.setting == setting and "pair" in s.rates
    }
    points: list[tuple[Entry, Estimate, str]] = []
    for entry in table.entries:
        if entry.label not in found or entry.label not in column.cells:
            continue
        speed, shape = found[entry.label], entry.first.architecture
        alike = [
            s.rates["pair"]
            for s in found.values()
            if shape and s.entry and s.entry.role == entry.role == "student" and s.entry.first.architecture == shape
        ] or [speed.rates["pair"]]
        pairs = speed.rates["pair"]
        note = f"; measured on {speed.borrowed}, the same architecture" if speed.borrowed else ""
        pooled = Estimate(
            statistics.median(r.value for r in alike),
            min(r.low if r.low is not None else r.value for r in alike),
            max(r.high if r.high is not None else r.value for r in alike),
        )
        points.append((entry, pooled, f"{rate(pairs.value)} pairs/s ({interval_text(pairs, False)}){note}"))
    return _trade_chart(points, column, "image-text pairs per second", larger_x=True)


def size_chart(trade: Trade, table: ScoreTable, column: ScoreColumn) -> str:
    """Accuracy against the number of parameters; "" with fewer than two points."""
    points = []
    for entry in table.entries:
        size = trade.sizes.get(entry.label)
        if size is not None and size.parameters and entry.label in column.cells:
            points.append((entry, Estimate(size.parameters), f"{compact(size.parameters)} parameters"))
    return _trade_chart(points, column, "parameters (both towers)", larger_x=False)


def _trade_chart(
    points: Sequence[tuple[Entry, Estimate, str]], column: ScoreColumn, x_label: str, *, larger_x: bool
) -> str:
    if len(points) < 2:
        return ""
    cells = [column.cells[entry.label] for entry, _, _ in points]
    xs = [v for _, e, _ in points for v in (e.value, e.low or e.value, e.high or e.value)]
    ys = [v for c in cells for v in (c.value, *_range(c))]
    x = Axis(min(xs), max(xs), x_label, log=True, pad=0.16)
    y = Axis(min(ys), max(ys), "", show=percent if column.is_share else compact, pad=0.1, floor=0.0)
    chart = Chart(x, y, f"{column.title} against {x_label}")
    places = [(e.value, c.value) for (_, e, _), c in zip(points, cells)]
    front = pareto(places, larger_x=larger_x)
    if len(front) > 1:
        chart.path([places[i][0] for i in front], [places[i][1] for i in front], "front")
    for (entry, estimate, tip), cell in zip(points, cells):
        reach = (estimate.low, estimate.high) if estimate.low is not None and estimate.high is not None else None
        score = f"{value_text(cell, column.is_share)} ({interval_text(cell, column.is_share)})"
        words = f"{entry.label}: {column.title} {score}, {tip}"
        chart.point(
            estimate.value, cell.value, entry.colour, words, size=6.5, x_range=reach, y_range=_range(cell) or None
        )
    for (entry, estimate, _), cell in zip(points, cells):
        chart.label(estimate.value, cell.value, entry.label, entry.colour)
    return chart.render()


def evaluation_charts(table: ScoreTable) -> list[tuple[str, str]]:
    """(title, chart) of each metric of the periodic evaluation over samples seen, one line per run.

    Titles name the gallery: among fewer images a caption is easier to find, so these are no scores of the table.
    """
    names: dict[str, None] = {}
    for entry in table.students:
        for run in entry.runs:
            names.update(dict.fromkeys(run.evaluations))
    order = ["t2i_R@1", "i2t_R@1", "top1"]
    ranked = sorted(names, key=lambda n: (order.index(n) if n in order else len(order), list(names).index(n)))
    wanted = [name for name in ranked if name in order] or ranked[:2]
    images = sorted({count for entry in table.students for run in entry.runs for count in run.curve_images})
    where = f"among {' or '.join(f'{n:,}' for n in images)} images" if images else "on a sample of the validation set"
    titles = {name: f"{metric_name(name)} {where}" for name in wanted}
    return [(title, chart) for n, title in titles.items() if (chart := _curves(table, n, "evaluations", title))]


def loss_charts(table: ScoreTable) -> list[tuple[str, str]]:
    """(title, chart) of the total loss and of each term over samples seen."""
    names: dict[str, None] = {}
    for entry in table.students:
        for run in entry.runs:
            names.update(dict.fromkeys(run.losses))
    charts = []
    for name in names:
        title = "total loss" if name == "total" else f"{name} loss"
        chart = _curves(table, name, "losses", title)
        if chart:
            charts.append((title, chart))
    return charts


def _curves(table: ScoreTable, name: str, source: str, title: str) -> str:
    lines: list[tuple[Entry, str, ReportCurve]] = []
    for entry in table.students:
        for run in entry.runs:
            curve = getattr(run, source).get(name)
            if curve is not None and len(curve.x) > 1:
                label = entry.label if len(entry.runs) == 1 else f"{entry.label}, seed {run.seed}"
                lines.append((entry, label, curve))
    if not lines:
        return ""
    share = source == "evaluations" and is_share(name)
    show = percent if share else compact
    ys = [value for _, _, curve in lines for value in curve.y]
    if (
        source == "losses"
    ):  # the first steps of a term can be many times its later values, which are the interesting ones
        ys = [min(ys), *(value for _, _, curve in lines for value in curve.y[max(1, len(curve.y) // 40) :])]
    x = Axis(0.0, max(curve.x[-1] for _, _, curve in lines), "samples seen", pad=0.03, floor=0.0)
    y = Axis(min(ys), max(ys), "", show=show, floor=0.0 if min(ys) >= 0 else None)
    width, height = (WIDTH, HEIGHT) if source == "evaluations" else (SMALL_WIDTH, SMALL_HEIGHT)
    chart = Chart(x, y, f"{title} over samples seen", width=width, height=height)
    for entry, label, curve in lines:
        tip = f"{label}: {show(curve.y[0])} at the start, {show(curve.y[-1])} after {compact(curve.x[-1])} samples"
        chart.line(curve.x, curve.y, entry.colour, tip, style="line" if len(entry.runs) == 1 else "line faint")
    for entry, label, curve in lines:
        if source == "evaluations" and len(curve.x) <= 30:
            for x_value, y_value in zip(curve.x[:-1], curve.y[:-1]):
                chart.point(
                    x_value,
                    y_value,
                    entry.colour,
                    f"{label}: {show(y_value)} after {compact(x_value)} samples",
                    size=2.6,
                    focus=False,
                )
        tip = f"{label}: {show(curve.y[-1])} after {compact(curve.x[-1])} samples"
        chart.point(curve.x[-1], curve.y[-1], entry.colour, tip, size=4.5, focus=source == "evaluations")
    return chart.render()


def forest_chart(column: ScoreColumn, entries: Sequence[Entry], width: float = WIDTH) -> str:
    """Each entry's value with its interval on one horizontal axis."""
    shown = [e for e in entries if e.label in column.cells]
    if not shown:
        return ""
    cells = [column.cells[e.label] for e in shown]
    values = [v for c in cells for v in (c.value, *_range(c), *c.per_seed)]
    x = Axis(min(values), max(values), "", show=percent if column.is_share else compact, pad=0.08)
    y = Axis(-0.5, len(shown) - 0.5, "", show=lambda _: "", pad=0.0)
    y.ticks = []
    chart = Chart(x, y, f"{column.title} with intervals", width=width, height=58.0 + 38.0 * len(shown))
    chart.left, chart.top, chart.bottom = 14.0, 10.0, chart.height - 26.0
    for row, (entry, cell) in enumerate(zip(shown, cells)):
        at = len(shown) - 1 - row - 0.18
        words = f"{entry.label}: {value_text(cell, column.is_share)} ({interval_text(cell, column.is_share)})"
        for value in cell.per_seed:
            chart.point(value, at, entry.colour, f"{entry.label}, one seed: {percent(value)}", size=2.2, focus=False)
        chart.point(cell.value, at, entry.colour, words, size=5.5, x_range=_range(cell) or None)
        middle = chart.x(cell.value)
        anchor = "start" if middle < 0.25 else "end" if middle > 0.75 else "middle"
        chart.note(cell.value, at, f"{entry.label}  {value_text(cell, column.is_share)}", entry.colour, anchor)
    return chart.render()


def histogram_chart(title: str, series: Sequence[tuple[Entry, Sequence[float], Sequence[float]]]) -> str:
    """Distributions (edges, densities) of several entries over one axis."""
    usable = [
        (e, edges, heights) for e, edges, heights in series if len(edges) == len(heights) + 1 and len(heights) > 1
    ]
    if not usable:
        return ""
    x = Axis(min(e[0] for _, e, _ in usable), max(e[-1] for _, e, _ in usable), "cosine similarity", pad=0.02)
    y = Axis(0.0, max(max(h) for _, _, h in usable), "", floor=0.0)
    chart = Chart(x, y, title)
    for entry, edges, heights in usable:
        chart.bars(edges, heights, entry.colour, f"{entry.label}: {title}")
    return chart.render()


def _range(cell: Estimate) -> tuple[float, float] | tuple[()]:
    return (cell.low, cell.high) if cell.low is not None and cell.high is not None else ()


def difference_chart(column: ScoreColumn, comparisons: Sequence[PairComparison], width: float = WIDTH) -> str:
    """Challenger minus baseline with intervals around a zero line; hollow where undecided."""
    shown = [c for c in comparisons if c.column is column]
    if not shown:
        return ""
    values = [v for c in shown for v in (c.difference, *(c.bounds or ()))]
    x = Axis(
        min(0.0, *values),
        max(0.0, *values),
        "difference in points",
        show=lambda v: f"{100 * v:+.3g}".replace("-", "−").replace("+0", "0"),
        pad=0.08,
    )
    y = Axis(-0.5, len(shown) - 0.5, "", pad=0.0)
    y.ticks = []
    chart = Chart(x, y, f"Differences in {column.title}", width=width, height=58.0 + 40.0 * len(shown))
    chart.left, chart.top = 14.0, 10.0
    for row, comparison in enumerate(shown):
        at = len(shown) - 1 - row - 0.18
        chart.path(
            [0.0, 0.0], [at - 0.24, at + 0.2], "zero"
        )  # beside the markers only: a whole line would cross the names
        words = f"{comparison.challenger.label} minus {comparison.baseline.label}"
        tip = f"{words}: {points_text(comparison)}, {'decided' if comparison.decided else 'not decided'}"
        chart.point(
            comparison.difference,
            at,
            comparison.challenger.colour,
            tip,
            size=5.5,
            x_range=comparison.bounds,
            hollow=not comparison.decided,
        )
        middle = chart.x(comparison.difference)
        anchor = "start" if middle < 0.35 else "end" if middle > 0.65 else "middle"
        chart.note(comparison.difference, at, words, comparison.challenger.colour, anchor)
    return chart.render()
