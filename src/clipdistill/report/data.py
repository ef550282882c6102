"""Reading run folders: everything the report shows, as plain values; one clear sentence for a file that cannot be used.

Nothing here computes a statistic or writes a page. A run may be unfinished: a missing optional file is an empty
answer, a broken one is an InputError that names file and line. Only the last line of a .jsonl file may be cut short
(the run was killed while writing it).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipdistill.bench.device import architecture_fingerprint
from clipdistill.errors import InputError
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


Question = tuple[tuple[str, Any], ...]
"""Every condition of a measurement except the model: what two numbers in one column have in common."""


@dataclass(frozen=True)
class Curve:
    """A line over samples seen: x increasing, y without gaps (values that are not finite are left out and counted)."""

    x: tuple[float, ...]
    y: tuple[float, ...]
    not_finite: int = 0


@dataclass(eq=False)
class Run:
    """One run folder. `facts` is run.json as written; the fields are those the report needs.

    scores: what was measured of this run's weights and of its teacher; stale: what is of other weights.
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
    losses: dict[str, Curve] = field(default_factory=dict)
    vitals: dict[str, Curve] = field(default_factory=dict)
    evaluations: dict[str, Curve] = field(default_factory=dict)
    bad_samples: dict[str, int] = field(default_factory=dict)
    bad_examples: list[tuple[str, str]] = field(default_factory=list)
    recipe: str = ""
    architecture: str = ""

    @property
    def method_name(self) -> str:
        """The method in words, "CLIP-RD" for "clip-rd"."""
        return METHOD_NAMES.get(self.method, self.method)


def read_run(folder: Path) -> Run:
    """Everything the report needs from one run folder. Raises InputError when it is not one or a file is broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run folder")
    facts = read_json(folder / "run.json", "a run folder has a run.json; is this the folder `clipdistill train` wrote?")
    version = facts.get("format", 1)
    if version != 1:
        raise InputError(
            f"{folder / 'run.json'}: format {version!r} is newer than this version of clipdistill reads (1)"
        )
    losses, vitals = read_log(folder / "log.jsonl")
    problems, examples = read_bad_samples(folder / "bad_samples.jsonl")
    method = str(facts.get("method") or facts.get("recipe") or facts.get("name") or folder.name)
    teacher = facts.get("teacher")
    run = Run(
        folder=folder,
        name=str(facts.get("name") or folder.name),
        method=method,
        student=str(facts.get("student", "")),
        teacher=str(teacher) if teacher else None,
        data=str(facts.get("data", "")),
        seed=facts["seed"] if isinstance(facts.get("seed"), int) else None,
        device=str(facts.get("device", "")),
        dtype=str(facts.get("dtype", "")),
        status=str(facts.get("status", "")),
        samples_seen=int(_number(facts.get("samples_seen")) or 0),
        seconds=_number(facts.get("seconds")) or 0.0,
        command=_command(facts.get("command", "")),
        facts=facts,
        losses=losses,
        vitals=vitals,
        evaluations=read_evaluations(folder / "eval.jsonl"),
        bad_samples=problems,
        bad_examples=examples,
        recipe=_text(folder / "recipe.yaml"),
        architecture=_architecture(folder / "student" / "model.json"),
    )
    scores = Scores.of_run(folder)
    if scores is not None:
        found = records_of(scores, method, run.seed, facts)
        run.scores = [record for record in found if not record.stale]
        run.stale = [record for record in found if record.stale]
        run.notes = list(scores.notes)
        for kept in scores.retention():
            run.retention[kept.metric, kept.protocol.question()] = (kept.value, kept.low, kept.high)
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in the given folders, with names made unique by the parent folder where two are the same."""
    if not folders:
        raise InputError("no run folder was given: write  clipdistill report runs/a runs/b --out report.html")
    runs = []
    seen: set[Path] = set()
    for folder in folders:
        resolved = Path(folder).resolve()
        if resolved not in seen:
            seen.add(resolved)
            runs.append(read_run(Path(folder)))
    counts = Counter(run.name for run in runs)
    for run in runs:
        if counts[run.name] > 1:
            run.name = f"{run.folder.resolve().parent.name}/{run.folder.resolve().name}"
    return runs


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The JSON object in a file. InputError with the line when it is not one; `hint` is added when it is missing."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file{': ' + hint if hint else ''}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not readable as UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path} (line {error.lineno}): not readable as JSON: {error.msg}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not readable as JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_optional(runs: Sequence[Run], name: str) -> list[tuple[Path, Run | None, dict[str, Any]]]:
    """The JSON files called `name` in the run folders and in the folders that hold them.

    A file in a run folder belongs to that run; one beside the runs (demo, ablate) belongs to all of them (None).
    """
    found: list[tuple[Path, Run | None, dict[str, Any]]] = []
    for run in runs:
        if (run.folder / name).is_file():
            found.append((run.folder / name, run, read_json(run.folder / name)))
    for parent in dict.fromkeys(run.folder.resolve().parent for run in runs):
        if (parent / name).is_file():
            found.append((parent / name, None, read_json(parent / name)))
    return found


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl file, nothing when it is absent; a cut last line is left out."""
    if not path.is_file():
        return
    pending: tuple[int, str] | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if pending is not None:
                raise InputError(f"{path} (line {pending[0]}): not readable as JSON: {pending[1]}")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                pending = (number, error.msg)  # forgiven only if nothing follows
                continue
            if not isinstance(value, dict):
                raise InputError(f"{path} (line {number}): expected a JSON object, got {type(value).__name__}")
            yield number, value


def read_log(path: Path) -> tuple[dict[str, Curve], dict[str, Curve]]:
    """(loss terms with "total" first, other vital signs) of log.jsonl over samples seen.

    After a resume the same step can be written twice: the last one counts.
    """
    rows: dict[int, dict[str, Any]] = {}
    for number, row in read_lines(path):
        step = row.get("step")
        if not isinstance(step, int):
            raise InputError(f"{path} (line {number}): the key 'step' is missing or not a whole number")
        rows[step] = row
    ordered = [rows[step] for step in sorted(rows)]
    losses: dict[str, list[tuple[float, float]]] = {}
    vitals: dict[str, list[tuple[float, float]]] = {}
    for row in ordered:
        x = _number(row.get("samples", row["step"]))
        if x is None:
            continue
        terms = row.get("terms")
        values = {"total": row.get("total"), **(terms if isinstance(terms, dict) else {})}
        for name, value in values.items():
            _append(losses, str(name), x, value)
        for name in ("learning_rate", "grad_norm", "logit_scale", "samples_per_second", "data_wait"):
            _append(vitals, name, x, row.get(name))
    return {k: thin(v) for k, v in losses.items()}, {k: thin(v) for k, v in vitals.items()}


def read_evaluations(path: Path) -> dict[str, Curve]:
    """The periodic evaluation (metric -> curve over samples seen)."""
    rows: dict[int, dict[str, Any]] = {}
    for number, row in read_lines(path):
        scores = row.get("scores")
        if not isinstance(row.get("step"), int) or not isinstance(scores, dict):
            raise InputError(f"{path} (line {number}): expected the keys 'step' and 'scores'")
        rows[row["step"]] = row
    curves: dict[str, list[tuple[float, float]]] = {}
    for step in sorted(rows):
        x = _number(rows[step].get("samples", step))
        for name, value in rows[step]["scores"].items():
            if x is not None:
                _append(curves, str(name), x, value)
    return {name: thin(points) for name, points in curves.items()}


def read_bad_samples(path: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(reason -> distinct samples, the first few (key, reason)) of bad_samples.jsonl."""
    keys: dict[str, set[str]] = {}
    examples: list[tuple[str, str]] = []
    for _, row in read_lines(path):
        key, reason = str(row.get("key", "")), str(row.get("reason", "unknown"))
        kind = reason.split(":", 1)[0].strip() or "unknown"
        group = keys.setdefault(kind, set())
        if key not in group and len(examples) < 20:
            examples.append((key, reason))
        group.add(key)
    return {kind: len(group) for kind, group in sorted(keys.items())}, examples


def thin(points: Sequence[tuple[float, float]]) -> Curve:
    """A curve of at most CURVE_POINTS points: means of equal stretches, both ends kept as they are."""
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    lost = len(points) - len(finite)
    if len(finite) > CURVE_POINTS:
        inner, size = finite[1:-1], (len(finite) - 2) / (CURVE_POINTS - 2)
        chunks = [inner[int(i * size) : int((i + 1) * size)] for i in range(CURVE_POINTS - 2)]
        means = [tuple(sum(column) / len(chunk) for column in zip(*chunk)) for chunk in chunks if chunk]
        finite = [finite[0], *((x, y) for x, y in means), finite[-1]]
    return Curve(tuple(x for x, _ in finite), tuple(y for _, y in finite), lost)


def _append(curves: dict[str, list[tuple[float, float]]], name: str, x: float, value: Any) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        curves.setdefault(name, []).append((x, float(value)))


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _command(value: Any) -> str:
    return " ".join(str(part) for part in value) if isinstance(value, list) else str(value or "")


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _architecture(path: Path) -> str:
    """A fingerprint of the student's architecture: runs that share it share their measured throughput."""
    if not path.is_file():
        return ""
    return architecture_fingerprint(read_json(path).get("architecture"))
