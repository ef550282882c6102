"""What a student buys and what it cost: measured speed from bench.json, size, and the cost of training.

A point of the trade-off belongs to one device: measurements are grouped by the device's fingerprint and no chart
ever mixes two. A model in bench.json is matched to an entry of the report by its weights, its name, or (students of
one architecture run equally fast) its architecture; what matches nothing is listed under its own name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipdistill.report.data import ReportedRun, number, optional, read_optional
from clipdistill.report.tables import Entry, Estimate, ScoreTable
from clipdistill.statistics.records import is_noisy

_LARGEST = 1e30
"""Of what is counted or measured here; more is damage, and no axis of a chart."""


@dataclass
class Speed:
    """How fast one model runs in one setting (back end, dtype, batch) of one device.

    rates: tower ("image", "text", "pair", "end-to-end") -> items per second. latency: tower -> (median, p95) in ms.
    borrowed: measured on another student of the same architecture.
    """

    name: str
    entry: Entry | None
    backend: str
    dtype: str
    batch: int
    rates: dict[str, Estimate] = field(default_factory=dict)
    latency: dict[str, tuple[float, float]] = field(default_factory=dict)
    peak_bytes: float | None = None
    borrowed: str = ""

    @property
    def setting(self) -> tuple[str, str, int]:
        """(back end, dtype, batch): what must be equal to compare two models fairly."""
        return self.backend, self.dtype, self.batch


@dataclass
class BenchDevice:
    """All speeds measured on one device."""

    key: str
    label: str
    speeds: list[Speed] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    libraries: dict[str, str] = field(default_factory=dict)
    ratios: dict[tuple[str, str, str, tuple[str, str, int]], Estimate] = field(default_factory=dict)
    noisy: set[tuple[str, str, int]] = field(default_factory=set)
    """Settings measured while the machine was so busy that the benchmark withheld their ratios."""

    def ratio(self, entry: Entry, reference: Entry, tower: str, setting: tuple[str, str, int]) -> Estimate | None:
        """How many times as fast `entry` is as `reference`: from common rounds where measured, else from the rates.

        Without common rounds the interval is the widest that the two rates' intervals allow.
        """
        if setting in self.noisy:
            return None
        stored = self.ratios.get((entry.label, reference.label, tower, setting))
        if stored is not None:
            return stored
        rates = [self.rate(which, tower, setting) for which in (entry, reference)]
        if rates[0] is None or rates[1] is None:
            return None
        a, b = rates[0], rates[1]
        low, high = (a.low or a.value) / (b.high or b.value), (a.high or a.value) / (b.low or b.value)
        return Estimate(a.value / b.value, low, high)

    def rate(self, entry: Entry, tower: str, setting: tuple[str, str, int]) -> Estimate | None:
        """Items per second of an entry in one setting."""
        found = (s for s in self.speeds if s.entry is entry and s.setting == setting and tower in s.rates)
        return next((s.rates[tower] for s in found), None)

    def best_setting(self) -> tuple[str, str, int] | None:
        """The setting in which most entries have pairs per second; among equals float32, eager, the largest batch.

        One measured on a busy machine only where there is no other.
        """
        settings: dict[tuple[str, str, int], set[str]] = {}
        for speed in self.speeds:
            if speed.entry is not None and "pair" in speed.rates:
                settings.setdefault(speed.setting, set()).add(speed.entry.label)
        if not settings:
            return None
        calm = [setting for setting in settings if setting not in self.noisy] or list(settings)
        return max(calm, key=lambda s: (len(settings[s]), s[1] == "float32", s[0] == "eager", s[2]))


@dataclass
class Size:
    """Parameters (total and by tower), bytes on disk and FLOPs of one item; None where nothing is known."""

    parameters: float | None = None
    image_parameters: float | None = None
    text_parameters: float | None = None
    bytes: float | None = None
    image_flops: float | None = None
    text_flops: float | None = None


@dataclass
class Trade:
    """Everything about speed and size: by device, and by entry label."""

    devices: list[BenchDevice]
    sizes: dict[str, Size]
    failures: list[str]
    notices: list[str] = field(default_factory=list)


def read_trade(runs: Sequence[ReportedRun], table: ScoreTable) -> Trade:
    """Collect every bench.json in or beside the run folders, and the sizes known from the runs themselves."""
    trade = Trade([], {}, [])
    for entry in table.students:
        counts = entry.first.facts.get("parameters")
        if isinstance(counts, dict):
            trade.sizes[entry.label] = _size_from_counts(counts)
        teacher, counts = table.teacher_of(entry), entry.first.facts.get("teacher_parameters")
        if teacher is not None and isinstance(counts, dict):
            trade.sizes[teacher.label] = _size_from_counts(counts)
    devices: dict[str, BenchDevice] = {}
    for path, owner, bench in read_optional(runs, "bench.json", trade.notices):
        with optional(path, trade.notices):
            _read_bench(path, owner, bench, table, devices, trade)
    trade.devices = list(devices.values())
    for device in trade.devices:
        _lend(device, table, trade.sizes)
        device.speeds.sort(key=lambda s: (s.backend, s.dtype, -s.batch, _position(table, s.entry), s.name))
    return trade


def _read_bench(
    path: Path,
    owner: ReportedRun | None,
    bench: dict[str, Any],
    table: ScoreTable,
    devices: dict[str, BenchDevice],
    trade: Trade,
) -> None:
    """Add what one file holds; everything is taken apart before anything is added, so that half of it never counts."""
    where, models = bench["device"], dict(bench["models"])
    label = str(where.get("label") or where.get("name") or "unknown device")
    measured = [
        (str(row["model"]), str(row["tower"]), _setting(row), _estimate(row), _extras(row))
        for row in bench["measurements"]
    ]
    ratios = [
        (str(row["model"]), str(row["reference"]), str(row["tower"]), _setting(row), _estimate(row))
        for row in bench.get("ratios") or []
    ]
    failures = [
        f"{f.get('model')} with {f.get('backend')} ({f.get('dtype')}): {f.get('reason')}"
        for f in bench.get("failures") or []
    ]
    libraries = {str(k): str(v) for k, v in (bench.get("libraries") or {}).items()}
    matched = {name: match_entry(name, facts, owner, table) for name, facts in models.items()}
    sizes = {
        e.label: _size_from_bench(models[n], trade.sizes.get(e.label)) for n, e in matched.items() if e is not None
    }

    trade.failures += failures
    trade.sizes |= sizes
    key = str(where.get("fingerprint") or label)
    device = devices.setdefault(key, BenchDevice(key, label))
    device.sources.append(path.name if owner is None else f"{owner.name}/{path.name}")
    device.warnings += [str(w) for w in bench.get("warnings") or []]
    device.libraries |= libraries
    device.noisy |= {_setting(row) for row in bench["measurements"] if is_noisy(bench, row)}
    device.commands += [str(bench["command"])] if bench.get("command") else []
    speeds = {(s.name, *s.setting): s for s in device.speeds}
    for name, tower, setting, rate, (latency, peak) in measured:
        entry = matched.get(name)
        unmeasured = f" of {owner.name}" if owner is not None and name == "teacher" else ""
        shown = entry.label if entry is not None else name + unmeasured
        speed = speeds.get((shown, *setting))
        if speed is None:
            speed = speeds[(shown, *setting)] = Speed(shown, entry, *setting)
            device.speeds.append(speed)
        speed.rates[tower] = rate
        if latency is not None:
            speed.latency[tower] = latency
        speed.peak_bytes = max(filter(None, (speed.peak_bytes, peak)), default=None)
    for model, reference, tower, setting, ratio in ratios:
        pair = matched.get(model), matched.get(reference)
        if pair[0] is not None and pair[1] is not None:
            device.ratios[pair[0].label, pair[1].label, tower, setting] = ratio


def _setting(row: dict[str, Any]) -> tuple[str, str, int]:
    return str(row["backend"]), str(row["dtype"]), int(row["batch"])


def _estimate(row: dict[str, Any]) -> Estimate:
    return Estimate(_positive(row["value"]), _positive(row["low"]), _positive(row["high"]))


def _positive(value: Any) -> float:
    """A number that a chart can show; raises ValueError."""
    found = number(value)
    if found is None or not 0 < found < _LARGEST:
        raise ValueError(f"{value!r:.40} is no positive number")
    return found


def _extras(row: dict[str, Any]) -> tuple[tuple[float, float] | None, float | None]:
    """(median and 95th percentile of the latency, peak memory), where they were measured."""
    median, p95, peak = (
        None if row.get(key) is None else _positive(row[key]) for key in ("median_ms", "p95_ms", "peak_bytes")
    )
    return None if median is None or p95 is None else (median, p95), peak


def match_entry(name: str, facts: dict[str, Any], owner: ReportedRun | None, table: ScoreTable) -> Entry | None:
    """The entry that a model of bench.json is: by weights, then by name, then by architecture (students only)."""
    prints = {str(facts.get("fingerprint") or "")} - {""}
    for entry in table.entries:
        for run in entry.runs:
            if any(row.role == entry.role and row.fingerprint in prints for row in run.scores):
                return entry
    path = name.rstrip("/")
    for entry in table.entries:
        for run in entry.runs:
            if entry.role == "teacher":
                if path == run.teacher or (path == "teacher" and owner in (None, run)):
                    return entry
            else:
                known = {entry.label, run.name, str(run.folder), run.folder.name, str(run.folder.resolve())}
                known |= {"student", run.student} if owner is run else set()
                if path in known:
                    return entry
    shape = str(facts.get("architecture") or "")
    return next((e for e in table.students if shape and e.first.architecture == shape), None)


def _lend(device: BenchDevice, table: ScoreTable, sizes: dict[str, Size]) -> None:
    """Students that were not measured take the speed of a measured one with the same architecture, marked so."""
    measured = {s.entry.label for s in device.speeds if s.entry is not None}
    for entry in table.students:
        if entry.label in measured or not entry.first.architecture:
            continue
        donors = [s for s in device.speeds if s.entry is not None and s.entry.role == "student"]
        donor = next(
            (s.entry for s in donors if s.entry and s.entry.first.architecture == entry.first.architecture), None
        )
        if donor is None:
            continue
        sizes.setdefault(entry.label, sizes.get(donor.label, Size()))
        for speed in donors:
            if speed.entry is donor:
                device.speeds.append(
                    Speed(entry.label, entry, *speed.setting, speed.rates, speed.latency, speed.peak_bytes, donor.label)
                )


def _size_from_counts(counts: dict[str, Any]) -> Size:
    def pick(*names: str) -> float | None:
        return next((found for n in names if 0 < (found := number(counts.get(n)) or 0) < _LARGEST), None)

    return Size(pick("total"), pick("image"), pick("text_total", "text", "text_transformer"))


def _size_from_bench(facts: dict[str, Any], known: Size | None) -> Size:
    counts = facts.get("parameters")
    size = _size_from_counts(counts) if isinstance(counts, dict) else (known or Size())
    flops = facts.get("flops")
    flops = flops if isinstance(flops, dict) else {}
    size.bytes = _positive(facts["size_bytes"]) if facts.get("size_bytes") else None
    size.image_flops = _positive(flops["image"]) if flops.get("image") else None
    size.text_flops = _positive(flops["text"]) if flops.get("text") else None
    return size


def _position(table: ScoreTable, entry: Entry | None) -> int:
    return table.entries.index(entry) if entry is not None else len(table.entries)


def pareto(points: Sequence[tuple[float, float]], *, larger_x: bool) -> list[int]:
    """Indices of the points that no other beats on both axes (y larger is better), ordered by x."""
    sign = 1.0 if larger_x else -1.0
    front = [
        i
        for i, (x, y) in enumerate(points)
        if not any(sign * a >= sign * x and b >= y and (sign * a > sign * x or b > y) for a, b in points)
    ]
    return sorted(front, key=lambda i: points[i])
