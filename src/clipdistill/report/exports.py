"""The students after export: accuracy against milliseconds and bytes, a point and a row for each target.

Read are the manifests of exports that are named beside the runs, or lie in a run's folder. An export belongs to the
student (or teacher) whose weights it was made from. One chart holds one device and one protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clipdistill.models.known import EXPORT_MANIFEST
from clipdistill.report.data import ReportedRun, is_export, number, optional
from clipdistill.report.grids import ReportGrid
from clipdistill.report.plots import percent
from clipdistill.report.svg import Axis, Chart
from clipdistill.report.tables import Entry, Estimate, ScoreTable
from clipdistill.report.trade import match_entry, pareto
from clipdistill.runtime.console import compact, file_size
from clipdistill.runtime.files import read_json

Row = tuple[str, str, str, str, Estimate]
_SHORT = {"float32": "", "float16": " fp16", "int8": " int8", "ternary": " ternary"}


@dataclass
class OneExport:
    """One export as its manifest tells it: R@1 (image to text, text to image) as shares, milliseconds of one call."""

    shown: str
    entry: Entry | None
    target: str
    protocol: str
    device: str
    before: tuple[float, float] | None
    after: tuple[float, float] | None
    bytes: float
    parameters: float
    ms: dict[str, float]
    torch_ms: dict[str, float]
    times_torch: dict[str, float]
    ran: bool

    @property
    def drawn(self) -> bool:
        """Whether it has both coordinates of a point."""
        return self.after is not None and "image" in self.ms

    @property
    def colour(self) -> int:
        """Of its entry; exports of unknown models share one that no entry of a usual report has."""
        return self.entry.colour if self.entry is not None else 9


@dataclass
class ExportsPart:
    """What the report shows of exports. given: the folders that were named; rows: of the CSV, without their kind."""

    exports: list[OneExport]
    given: list[str] = field(default_factory=list)

    @property
    def charts(self) -> list[dict[str, Any]]:
        """Two charts for each protocol and device: against milliseconds, and against bytes."""
        found = []
        for protocol, device in dict.fromkeys((e.protocol, e.device) for e in self.exports if e.drawn):
            mine = [e for e in self.exports if e.drawn and (e.protocol, e.device) == (protocol, device)]
            for title, svg in (
                ("R@1 after export against milliseconds", speed_chart(mine)),
                ("R@1 after export against size", size_chart(mine)),
            ):
                found.append({"title": title, "note": f"{device}; {protocol}", "svg": Markup(svg)})
        return found

    @property
    def grid(self) -> ReportGrid:
        """A row for each export."""
        titles = ["Model", "Target", "R@1 i2t / t2i", "Picture", "Caption", "Size", "Times torch"]
        grid = ReportGrid("After export", titles, (1,))
        for e in self.exports:
            scores = "" if e.after is None else _both(e.after)
            before = "" if e.before is None else f"{_both(e.before)} before"
            ms = [(_ms(e.ms.get(t)), _ms(e.torch_ms.get(t), "torch ")) for t in ("image", "text")]
            times = f"{e.times_torch['image']:.2f}" if "image" in e.times_torch else "not run here" if not e.ran else ""
            grid.add(e.entry or e.shown, e.target, (scores, before), *ms, file_size(e.bytes), times)
        return grid

    @property
    def rows(self) -> Iterator[Row]:
        """(model, role, measure, condition, value) for the CSV."""
        for e in self.exports:
            model, role = (e.entry.label, e.entry.role) if e.entry else (e.shown, "")
            condition = "; ".join(part for part in (e.target, e.device, e.protocol) if part)
            for when, pair in (("before", e.before), ("after", e.after)):
                for name, value in zip(("i2t_R@1", "t2i_R@1"), pair or ()):
                    yield model, role, f"{name} {when} export", condition, Estimate(value)
            for tower, value in e.ms.items():
                yield model, role, f"{tower} ms after export", condition, Estimate(value)
            yield model, role, "bytes after export", condition, Estimate(e.bytes)


def read_exports(
    folders: Sequence[Path], runs: Sequence[ReportedRun], table: ScoreTable, notices: list[str]
) -> ExportsPart | None:
    """The exports in `folders` and inside the run folders; None where there are none, damaged ones are notices."""
    inside = [(path.parent, run) for run in runs for path in sorted(run.folder.glob(f"*/{EXPORT_MANIFEST}"))]
    places: dict[Path, tuple[Path, ReportedRun | None]] = {}
    for folder, owner in (*((folder, None) for folder in folders), *inside):
        if is_export(folder):
            places.setdefault(folder.resolve(), (folder, owner))
    part = ExportsPart([], [str(folder) for folder in folders])
    for folder, owner in places.values():
        path = folder / EXPORT_MANIFEST
        with optional(path, notices):
            values = read_json(path)
            if values.get("kind") is not None:  # other folders have a manifest too
                part.exports.append(_export_of(folder, values, owner, table))
    order = {entry.label: i for i, entry in enumerate(table.entries)}
    part.exports.sort(key=lambda e: (order.get(e.entry.label, len(order)) if e.entry else len(order), e.shown))
    return part if part.exports else None


def _export_of(folder: Path, values: dict[str, Any], owner: ReportedRun | None, table: ScoreTable) -> OneExport:
    towers = dict(values["towers"])
    kept = dict.fromkeys(str(facts.get("precision") or "float32") for facts in towers.values())
    scores, times = dict(values.get("scores") or {}), dict(values.get("latency") or {})
    kind = "web" if values.get("web") else str(values["kind"])
    precision = next((name for name in kept if name != "float32"), "float32")  # a tower may stay behind
    after = scores.get("after_int8") or scores.get("after")
    measured = {tower: dict(times[tower]) for tower in ("image", "text") if tower in times}

    def of(key: str) -> dict[str, float]:
        found = {tower: number(facts.get(key)) for tower, facts in measured.items()}
        return {tower: value for tower, value in found.items() if value is not None and value > 0}

    return OneExport(
        shown=folder.name,
        entry=match_entry(str(values.get("name")), {"fingerprint": values.get("model_fingerprint")}, owner, table),
        target=f"{kind}{_SHORT.get(precision, '')}",
        protocol=str((after or {}).get("protocol", "")),
        device=str(dict(times.get("device") or {}).get("label", "")),
        before=_pair(scores.get("before")),
        after=_pair(after),
        bytes=sum(_whole(facts["bytes"]) for facts in towers.values()),
        parameters=number(dict(values.get("parameters") or {}).get("total")) or 0.0,
        ms=of("ms"),
        torch_ms=of("torch_ms"),
        times_torch=of("times_torch"),
        ran=bool(values.get("ran", True)),
    )


def _pair(found: Any) -> tuple[float, float] | None:
    if not isinstance(found, dict):
        return None
    values = number(found.get("i2t_R@1")), number(found.get("t2i_R@1"))
    return None if values[0] is None or values[1] is None else (values[0], values[1])


def _whole(value: Any) -> float:
    found = number(value)
    if found is None or found <= 0:
        raise ValueError(f"{value!r:.40} is no number of bytes")
    return found


def _ms(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.1f} ms"


def _both(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f} / {100 * pair[1]:.1f}"


def speed_chart(exports: Sequence[OneExport]) -> str:
    """R@1 against the milliseconds of one picture."""
    return _chart(exports, "milliseconds a picture", [e.ms["image"] for e in exports], _torch_milliseconds(exports))


def size_chart(exports: Sequence[OneExport]) -> str:
    """R@1 against the bytes of both towers."""
    torch = [(e, 4e-6 * e.parameters) for e in _first_of_each(exports) if e.parameters]
    return _chart(exports, "megabytes, both towers", [1e-6 * e.bytes for e in exports], torch)


def _torch_milliseconds(exports: Sequence[OneExport]) -> list[tuple[OneExport, float]]:
    """The student in torch, timed beside each of its exports: the fastest, the least disturbed."""
    alike: dict[str, list[OneExport]] = {}
    for e in exports:
        alike.setdefault(e.entry.label if e.entry else e.shown, []).append(e)
    times = ((mine[0], [e.torch_ms["image"] for e in mine if "image" in e.torch_ms]) for mine in alike.values())
    return [(e, min(found)) for e, found in times if found]


def _first_of_each(exports: Sequence[OneExport]) -> list[OneExport]:
    return list({e.entry.label if e.entry else e.shown: e for e in reversed(exports)}.values())


def _chart(
    exports: Sequence[OneExport], x_label: str, xs: Sequence[float], torch: Sequence[tuple[OneExport, float]]
) -> str:
    def mean(pair: tuple[float, float] | None) -> float:
        return sum(pair or (0.0, 0.0)) / 2

    solid = [(e, x, mean(e.after), e.target, False) for e, x in zip(exports, xs)]
    hollow = [(e, x, mean(e.before), "torch", True) for e, x in torch if e.before]
    points = [*solid, *hollow]
    y_values = [y for _, _, y, _, _ in points]
    x = Axis(min(p[1] for p in points), max(p[1] for p in points), x_label, log=True, pad=0.16)
    y = Axis(min(y_values), max(y_values), "", show=percent, pad=0.12, floor=0.0)
    chart = Chart(x, y, f"R@1 against {x_label}")
    front = pareto([(a, b) for _, a, b, _, _ in points], larger_x=False)
    if len(front) > 1:
        chart.path([points[i][1] for i in front], [points[i][2] for i in front], "front")
    for e, a, b, target, open_mark in points:
        who = e.entry.label if e.entry else e.shown
        chart.point(a, b, e.colour, f"{who}, {target}: R@1 {100 * b:.1f} %, {compact(a)} {x_label}", hollow=open_mark)
    for e, a, b, target, _ in points:
        chart.label(a, b, target, e.colour)
    return chart.render()
