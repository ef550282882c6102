"""The picture of an ablation: differences from the baseline with intervals, and learning curves of every variant."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.ablate.results import Column, Results
from clipdistill.ablate.tables import column_title

_BLUE, _ORANGE, _GREY, _INK = "#1f6fd6", "#d2551b", "#9a9fa8", "#1b1d22"


def draw(results: Results, path: Path, curve_metric: str | None = None) -> bool:
    """Write the picture (format by the ending: .png or .svg); False when there is nothing to draw.

    Above: variant minus baseline with 95 % intervals, a dot for each seed, filled where decided. Below: the mean curve
    of each variant with the range over seeds, the baseline's and all others' behind it.
    """
    columns = [c for c in results.columns if any(d.column == c for d in results.differences)]
    metric = curve_metric or _curve_metric(results)
    if not columns and metric is None:
        return False
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
    }
    others = [v.name for v in results.variants if v.name != results.plan.reference]
    panels = [v.name for v in results.variants if v.name in results.curves] if metric else []
    across = 4
    down = math.ceil(len(panels) / across)
    with plt.rc_context(style):
        heights = [0.6 + 0.26 * max(len(others), 1) if columns else 0.0, 1.55 * down]
        figure: Any = plt.figure(figsize=(10, sum(heights) + 0.5), layout="constrained")
        drawn = [height for height in heights if height]
        parts = list(figure.subfigures(len(drawn), 1, squeeze=False, height_ratios=drawn)[:, 0])
        if columns:
            _differences(results, columns, others, parts.pop(0))
        if panels and metric:
            _curves(results, metric, panels, down, across, parts.pop(0))
        path.parent.mkdir(parents=True, exist_ok=True)
        # the writer's own date would make every drawing differ
        figure.savefig(path, dpi=140, metadata={"Date": None} if path.suffix == ".svg" else {})
        plt.close(figure)
    return True


def _differences(results: Results, columns: list[Column], others: list[str], part: Any) -> None:
    axes = part.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    places = {name: len(others) - 1 - i for i, name in enumerate(others)}
    base = next(v for v in results.variants if v.name == results.plan.reference) if columns else None
    for axis, column in zip(axes, columns):
        axis.axvline(0, color=_INK, linewidth=0.8)
        for name, place in places.items():
            found = results.difference(name, column)
            if found is None or found.verdict.effect is None:
                continue
            verdict, decided = found.verdict, found.outcome != "undecided"
            value = 100 * found.verdict.effect
            variant = next(v for v in results.variants if v.name == name)
            if base is not None:
                ours, theirs = (dict(zip(v.seeds, v.scores[column])) for v in (variant, base))
                each = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
                axis.plot(each, [place - 0.22] * len(each), ".", color=_GREY, markersize=3)
            if verdict.low is not None and verdict.high is not None:
                axis.plot([100 * verdict.low, 100 * verdict.high], [place, place], color=_BLUE, linewidth=1.4)
            face = _BLUE if decided else "white"
            axis.plot(value, place, "o", color=_BLUE, markerfacecolor=face, markersize=5)
        axis.set_yticks(list(places.values()), list(places))
        axis.set_ylim(-0.7, len(others) - 0.4)
        axis.set_title(column_title(column, results.columns), fontsize=9)
        axis.set_xlabel(f"points against {results.plan.reference}")
        axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)


def _curves(results: Results, metric: str, panels: list[str], down: int, across: int, part: Any) -> None:
    axes = part.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    means = {name: _mean_curve(results, name, metric) for name in panels}
    for place, axis in enumerate(axes.flat):
        if place >= len(panels):
            axis.set_visible(False)
            continue
        name = panels[place]
        for other, (x, mean, _, _) in means.items():
            if other not in (name, results.plan.reference):
                axis.plot(x, mean, color="#dcdcdc", linewidth=0.8, zorder=1)
        if results.plan.reference in means:
            x, mean, _, _ = means[results.plan.reference]
            axis.plot(x, mean, color=_ORANGE, linewidth=1.2, zorder=2)
        x, mean, low, high = means[name]
        if name != results.plan.reference:
            axis.fill_between(x, low, high, color=_BLUE, alpha=0.2, linewidth=0)
            axis.plot(x, mean, color=_BLUE, linewidth=1.6, zorder=3)
        axis.set_title(name, fontsize=8.5, loc="left", pad=2)
        axis.tick_params(labelsize=7.5)
        axis.grid(color="#eeeeee", linewidth=0.5)
        axis.xaxis.set_major_formatter(lambda v, _: f"{v / 1000:g}k" if v else "0")
    title = column_title(Column(metric, None, None), [])
    part.supylabel(f"{title}, %", fontsize=8.5)
    part.supxlabel(
        f"pairs seen (on a sample of the validation set; orange: {results.plan.reference}; band: range over seeds)",
        fontsize=8.5,
    )


def _mean_curve(results: Results, name: str, metric: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """(pairs seen, mean, lowest, highest over seeds) in per cent, at the points that all seeds have."""
    curves = [
        {x: scores[metric] for x, scores in points if metric in scores} for points in results.curves[name].values()
    ]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[100 * curve[x] for curve in curves] for x in shared]
    return shared, [float(np.mean(v)) for v in values], [min(v) for v in values], [max(v) for v in values]


def _curve_metric(results: Results) -> str | None:
    """The first compared metric that was followed during training."""
    followed = {m for seeds in results.curves.values() for points in seeds.values() for _, s in points for m in s}
    return next((c.metric for c in results.columns if c.metric in followed), None)
