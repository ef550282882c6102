"""The picture of an ablation: differences from the baseline with intervals, and learning curves of every variant."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

import numpy as np

from clipdistill.ablate.results import MeasuredColumn, Results
from clipdistill.ablate.tables import column_title
from clipdistill.report.svg import Axis, Chart, figure, text
from clipdistill.runtime.console import compact

WIDTH, ROW, PANEL, ACROSS = 1000.0, 24.0, 150.0, 4
_OWN, _BASE, _SEED = 1, 3, 7  # colours of svg.py, of which 1 and 7 are drawn as circles


def draw(results: Results) -> str:
    """The picture as an SVG file; "" when there is nothing to draw.

    Above: variant minus baseline with 95 % intervals, a dot for each seed, filled where decided. Below: the mean curve
    of each variant with the range over seeds, the baseline's and all others' behind it.
    """
    columns = [c for c in results.columns if any(d.column == c for d in results.differences)]
    followed = {m for seeds in results.curves.values() for points in seeds.values() for _, s in points for m in s}
    metric = next((c.metric for c in results.columns if c.metric in followed), None)
    parts: list[str] = []
    height = 8.0
    if columns:
        others = [v.name for v in results.variants if v.name != results.plan.reference]
        tall = 90.0 + ROW * len(others)
        names = 24.0 + 6.8 * max(map(len, others))
        wide = (WIDTH - names - 16) / len(columns)
        for place, column in enumerate(columns):
            left = names if place == 0 else 8.0  # only the first panel has the names
            chart = _differences(results, column, others, wide + left, tall, left)
            parts.append(chart.render((names - left + wide * place, height)))
        height += tall + 12
    if metric is not None:
        means = {v.name: _mean_curve(results, v.name, metric) for v in results.variants if v.name in results.curves}
        for place, name in enumerate(means):
            at = (WIDTH / ACROSS * (place % ACROSS), height + PANEL * (place // ACROSS))
            parts.append(_curve(means, name, results.plan.reference).render(at))
        height += PANEL * -(-len(means) // ACROSS) + 24
        title = column_title(MeasuredColumn(metric, None, None), [])
        words = f"{title} in per cent over pairs seen, on a sample of the validation set"
        words += f" (orange: {results.plan.reference}; band: range over seeds)"
        parts.append(text(WIDTH / 2, height - 8, words, "middle"))
    name = f"differences from {results.plan.reference} and learning curves"
    style = resources.files("clipdistill.ablate").joinpath("picture.css").read_text(encoding="utf-8")
    return figure(WIDTH, height, name, parts, style) if parts else ""


def _differences(
    results: Results, column: MeasuredColumn, others: Sequence[str], width: float, height: float, left: float
) -> Chart:
    """Points against the baseline in one column, a row a variant."""
    variants = {v.name: v for v in results.variants}
    found = {name: results.difference(name, column) for name in others}
    places = {name: float(len(others) - 1 - i) for i, name in enumerate(others)}
    base = dict(zip(variants[results.plan.reference].seeds, variants[results.plan.reference].scores[column]))
    values = [0.0]
    seeds: dict[str, list[float]] = {}
    for name, difference in found.items():
        if difference is not None and difference.verdict.effect is not None:
            own = dict(zip(variants[name].seeds, variants[name].scores[column]))
            seeds[name] = [100 * (own[seed] - base[seed]) for seed in own if seed in base]
            verdict = difference.verdict
            bounds = [verdict.effect, verdict.low, verdict.high]
            values += [*seeds[name], *(100 * v for v in bounds if v is not None and np.isfinite(v))]
    x = Axis(
        min(values), max(values), f"points against {results.plan.reference}", show=lambda v: f"{v:g}".replace("-", "−")
    )
    y = Axis(-0.6, len(others) - 0.4, "", pad=0.0, show=lambda _: "")
    y.ticks = []
    title = column_title(column, results.columns)
    chart = Chart(x, y, f"differences in {title}", width=width, height=height)
    chart.left, chart.right, chart.top = left, width - 8, 26.0
    chart.parts.append(text(left, 13, title, "start", "axis"))
    chart.path([0.0, 0.0], [-0.6, len(others) - 0.4], "zero")
    for name, place in places.items():
        if left > 8:
            chart.parts.append(text(left - 10, chart.py(place) + 4, name, "end"))
        difference = found[name]
        if difference is None or name not in seeds:
            continue
        for value in seeds[name]:
            chart.point(value, place - 0.26, _SEED, "", size=1.6, focus=False)
        verdict, hollow = difference.verdict, difference.outcome == "undecided"
        low, high, value = verdict.low, verdict.high, 100 * (verdict.effect or 0.0)
        reach = None if low is None or high is None else (100 * low, 100 * high)
        chart.point(value, place, _OWN, "", size=4.2, x_range=reach, focus=False, hollow=hollow)
    return chart


def _curve(means: dict[str, tuple[list[float], ...]], name: str, baseline: str) -> Chart:
    """One variant's learning curve before all others."""
    numbers = [v for _, *curves in means.values() for curve in curves for v in curve] or [0.0]
    last = max([x[-1] for x, *_ in means.values() if x], default=1.0)
    y = Axis(min(0.0, *numbers), max(numbers), name, pad=0.03, show=lambda v: f"{v:g}", floor=0.0)
    chart = Chart(Axis(0.0, last, "", pad=0.02, floor=0.0, show=compact), y, name, width=WIDTH / ACROSS, height=PANEL)
    chart.left, chart.bottom = 36.0, PANEL - 24
    for other, (x, mean, _, _) in means.items():
        if other not in (name, baseline):
            chart.path(x, mean, "other")
    if baseline in means:
        chart.line(means[baseline][0], means[baseline][1], _BASE, "")
    if name != baseline:
        x, mean, low, high = means[name]
        chart.band(x, low, high, _OWN)
        chart.line(x, mean, _OWN, "")
    return chart


def _mean_curve(results: Results, name: str, metric: str) -> tuple[list[float], ...]:
    """(pairs seen, mean, lowest, highest over seeds) in per cent, at the points that all seeds have."""
    curves = [
        {x: scores[metric] for x, scores in points if metric in scores} for points in results.curves[name].values()
    ]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[100 * curve[x] for curve in curves] for x in shared]
    return (
        [float(x) for x in shared],
        [float(np.mean(v)) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
    )
