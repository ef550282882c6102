"""Reading run folders: everything the report shows, as plain values.

Nothing here computes a statistic or writes a page. A run may be unfinished: a missing file is an empty answer. run.json
and scores.json must be whole, one sentence says what is wrong with them otherwise; what else is damaged is left out and
told in `notes` (lines of a log) or in the notices of the report (files that other commands add).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipdistill.errors import InputError
from clipdistill.models.known import EXPORT_MANIFEST, architecture_fingerprint
from clipdistill.runs.folder import BAD_SAMPLES, CURVE, LOG, RECIPE, STUDENT, RunFolder, read_lines
from clipdistill.runtime.files import read_json
from clipdistill.statistics.records import Record, records_of
from clipdistill.statistics.scores import Scores

METHOD_NAMES = {
    "clip-rd": "CLIP-RD",
    "clip-kd": "CLIP-KD",
    "contrastive": "contrastive only",
    "clip": "contrastive only",
    "tinyclip": "TinyCLIP",
    "dclip": "DCLIP",
    "mobileclip": "MobileCLIP",
    "siglip": "SigLIP",
}
"""How a method is written in words; any other name is shown as it is."""

CURVE_POINTS = 240
"""A curve is thinned to at most this many points: more are not visible, and the file stays small."""

VITALS = ("learning_rate", "grad_norm", "logit_scale", "samples_per_second", "data_wait")
Question = tuple[tuple[str, Any], ...]
"""Every condition of a measurement except the model: what two numbers in one column have in common."""


@dataclass(frozen=True)
class ReportCurve:
    """A line over samples seen: x increasing, y without gaps (values that are not finite are left out and counted)."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    not_finite: int = 0


@dataclass(eq=False)
class ReportedRun:
    """One run folder. `facts` is run.json as written; the fields are those the report needs.

    scores: what was measured of this run's weights and of its teacher; stale: what is of other weights.
    curve_images: how many images `evaluations` were measured on; empty in runs of older versions.
    """

    folder: Path
    name: str
    method: str
    student: str
    teacher: str | None
    data: str
    seed: int | None
    device: str
    dtype: str
    status: str
    samples_seen: int
    seconds: float
    command: str
    facts: dict[str, Any]
    scores: list[Record] = field(default_factory=list)
    retention: dict[tuple[str, Question], tuple[float, float | None, float | None]] = field(default_factory=dict)
    stale: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    losses: dict[str, ReportCurve] = field(default_factory=dict)
    vitals: dict[str, ReportCurve] = field(default_factory=dict)
    evaluations: dict[str, ReportCurve] = field(default_factory=dict)
    curve_images: tuple[int, ...] = ()
    bad_samples: dict[str, int] = field(default_factory=dict)
    bad_examples: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""
    architecture: str = ""

    @property
    def method_name(self) -> str:
        """The method in words, "CLIP-RD" for "clip-rd"."""
        return METHOD_NAMES.get(self.method, self.method)


def is_export(folder: Path) -> bool:
    """Whether a folder that a report was given is an export and no run."""
    return (folder / EXPORT_MANIFEST).is_file() and not RunFolder(folder).is_run


def read_run(folder: Path) -> ReportedRun:
    """Everything the report needs from one run folder. Raises InputError when it is not one or a file is broken."""
    place = RunFolder(Path(folder))
    if not place.path.is_dir():
        raise InputError(f"{folder}: no such run folder")
    facts = place.facts("a run folder has a run.json; is this the folder `clipdistill train` wrote?")
    seconds, command, teacher = facts.get("seconds"), facts.get("command", ""), facts.get("teacher")
    run = ReportedRun(
        folder=place.path,
        name=str(facts.get("name") or place.path.name),
        method=str(facts.get("method") or facts.get("recipe") or facts.get("name") or place.path.name),
        student=str(facts.get("student") or ""),
        teacher=str(teacher) if teacher else None,
        data=str(facts.get("data") or ""),
        seed=facts.get("seed"),
        device=str(facts.get("device") or ""),
        dtype=str(facts.get("dtype") or ""),
        status=str(facts.get("status") or ""),
        samples_seen=int(facts.get("samples_seen") or 0),
        seconds=number(seconds) or 0.0,
        command=" ".join(map(str, command)) if isinstance(command, list) else str(command or ""),
        facts=facts,
    )
    with optional(place / RECIPE, run.notes) as path:
        if path.is_file():
            place.settings()
            run.recipe = path.read_text(encoding="utf-8")
    _read_log(run)
    _read_curve(run)
    _read_bad_samples(run)
    with optional(place / STUDENT / "model.json", run.notes) as path:
        run.architecture = architecture_fingerprint(read_json(path).get("architecture")) if path.is_file() else ""
    scores = Scores.of_run(place.path)
    if scores is not None:
        found = records_of(scores, run.method, run.seed, facts)
        run.scores = [record for record in found if not record.unusable]
        run.stale = [record for record in found if record.unusable]
        run.notes += scores.notes
        for kept in scores.retention():
            run.retention[kept.metric, kept.protocol.question()] = (kept.value, kept.low, kept.high)
    return run


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """The runs in the given folders, with names made unique by the parent folder where two are the same."""
    if not folders:
        raise InputError("no run folder was given: write  clipdistill report runs/a runs/b --out report.html")
    once: dict[Path, Path] = {}
    for folder in folders:
        once.setdefault(Path(folder).resolve(), Path(folder))
    runs = [read_run(folder) for folder in once.values()]
    counts = Counter(run.name for run in runs)
    for run in runs:
        if counts[run.name] > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}"
    return runs


@contextmanager
def optional(path: Path, notices: list[str]) -> Iterator[Path]:
    """Reading a file that the report can do without: what is wrong with it becomes a notice."""
    try:
        yield path
    except InputError as error:
        notices.append(f"{error}; it is left out here.")
    except (AttributeError, IndexError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
        notices.append(f"{path}: not as clipdistill writes it ({type(error).__name__}: {error}); it is left out here.")


def read_optional(
    runs: Sequence[ReportedRun], name: str, notices: list[str]
) -> Iterator[tuple[Path, ReportedRun | None, dict[str, Any]]]:
    """The JSON files called `name` in the run folders and in the folders that hold them; damaged ones are notices.

    A file in a run folder belongs to that run; one beside the runs (demo, ablate) belongs to all of them (None).
    """
    places: list[tuple[Path, ReportedRun | None]] = [(run.folder / name, run) for run in runs]
    places += [(parent / name, None) for parent in dict.fromkeys(run.folder.resolve().parent for run in runs)]
    for path, run in places:
        if path.is_file():
            values = None
            with optional(path, notices):
                values = read_json(path)
            if values is not None:
                yield path, run, values


def _lines(run: ReportedRun, name: str, *keys: tuple[str, type]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that have the keys, each of its type; a note on lines that are none."""
    found = read_lines(run.folder / name)
    whole = [row for _, row in found.rows if all(isinstance(row.get(key), kind) for key, kind in keys)]
    broken = [
        *found.damaged,
        *(n for n, row in found.rows if not all(isinstance(row.get(k), kind) for k, kind in keys)),
    ]
    if broken:
        lines = f"{len(broken)} lines are" if len(broken) > 1 else "1 line is"
        run.notes.append(f"{name}: {lines} not as clipdistill writes them (line {min(broken)} first) and left out.")
    return whole


def _read_log(run: ReportedRun) -> None:
    """Loss terms ("total" first) and other vital signs over samples seen.

    After a resume the same step can be written twice: the last one counts.
    """
    rows = {row["step"]: row for row in _lines(run, LOG, ("step", int))}
    losses: dict[str, list[tuple[float, float]]] = {}
    vitals: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(rows):
        row = rows[step]
        x = number(row.get("samples", step))
        if x is not None:
            terms = row.get("terms")
            for name, value in {"total": row.get("total"), **(terms if isinstance(terms, dict) else {})}.items():
                _append(losses, str(name), x, value)
            for name in VITALS:
                _append(vitals, name, x, row.get(name))
    run.losses = {name: thin(points) for name, points in losses.items()}
    run.vitals = {name: thin(points) for name, points in vitals.items()}


def _read_curve(run: ReportedRun) -> None:
    """The periodic evaluation (metric -> curve over samples seen)."""
    points = _lines(run, CURVE, ("step", int), ("scores", dict))
    curves: dict[str, list[tuple[float, float]]] = {}
    for step, row in sorted({row["step"]: row for row in points}.items()):
        x = number(row.get("samples", step))
        for name, value in row["scores"].items():
            if x is not None:
                _append(curves, str(name), x, value)
    run.curve_images = tuple(sorted({row["images"] for row in points if isinstance(row.get("images"), int)}))
    run.evaluations = {name: thin(points) for name, points in curves.items()}


def _read_bad_samples(run: ReportedRun) -> None:
    """Reason -> distinct samples, and the first few as (key, reason)."""
    keys: dict[str, set[str]] = {}
    for row in _lines(run, BAD_SAMPLES):
        key, reason = str(row.get("key", "")), str(row.get("reason", "unknown"))
        group = keys.setdefault(reason.split(":", 1)[0].strip() or "unknown", set())
        if key not in group and len(run.bad_examples) < 20:
            run.bad_examples.append((key, reason))
        group.add(key)
    run.bad_samples = {kind: len(group) for kind, group in sorted(keys.items())}


def thin(points: Sequence[tuple[float, float]]) -> ReportCurve:
    """A curve of at most CURVE_POINTS points: means of equal stretches, both ends kept as they are."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    lost = len(points) - len(finite)
    if len(finite) > CURVE_POINTS:
        inner, size = finite[1:-1], (len(finite) - 2) / (CURVE_POINTS - 2)
        chunks = [inner[int(i * size) : int((i + 1) * size)] for i in range(CURVE_POINTS - 2)]
        means = [tuple(sum(column) / len(chunk) for column in zip(*chunk)) for chunk in chunks if chunk]
        finite = [finite[0], *((x, y) for x, y in means), finite[-1]]
    return ReportCurve(tuple(x for x, _ in finite), tuple(y for _, y in finite), lost)


def _append(curves: dict[str, list[tuple[float, float]]], name: str, x: float, value: Any) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # an integer beyond any float
            curves.setdefault(name, []).append((x, float(value)))


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):
            return float(value) if math.isfinite(value) else None
    return None
