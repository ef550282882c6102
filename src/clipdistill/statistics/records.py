"""Results as flat records, one for each (method, seed, data set, protocol, metric): what the judge weighs.

A record can be made of a plain dictionary {method, seed, metric, value, ...}, so results measured elsewhere can be
added by hand; `read_records` makes them from finished run folders, `records_of` from the scores of one run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError, nearest
from clipdistill.runs.folder import RunFolder, stale_scores
from clipdistill.runtime.files import read_json
from clipdistill.statistics.protocol import Protocol, digest
from clipdistill.statistics.scores import Score, Scores

SPEED = "pairs_per_second"
NOISY = "measured while other work slowed the machine several times over"


@dataclass(frozen=True, eq=False)
class Record:
    """One result.

    method: what was trained ("clip-rd"), or "teacher"; seed: of the training run, None for what was not trained here
    (a teacher, a speed). dataset, protocol: where known; records compare only within the same. low, high: its own 95 %
    interval, over `n` queries. per_query, clusters: (Q,) results whose mean is the value, and the image of each
    query. measured: the whole protocol. unusable: why nothing may be judged by it ("its scores are stale"), or ''.
    """

    method: str
    metric: str
    value: float
    seed: int | None = None
    dataset: str | None = None
    protocol: str | None = None
    low: float | None = None
    high: float | None = None
    per_query: np.ndarray | None = None
    clusters: np.ndarray | None = None
    n: int = 0
    measured: Protocol | None = None
    unusable: str = ""

    @property
    def role(self) -> str:
        """ "teacher" or "student"."""
        return "teacher" if self.method == "teacher" else "student"

    @property
    def question(self) -> tuple[tuple[str, Any], ...]:
        """Every condition of the measurement except the model; () where it is not known."""
        return self.measured.question() if self.measured else ()

    @property
    def fingerprint(self) -> str:
        """Of the weights that were measured; '' where it is not known."""
        return self.measured.model_fingerprint if self.measured else ""

    @property
    def pictures(self) -> str:
        """Of the pictures that it was measured on; '' where it is not known."""
        return (self.measured.pictures_sha256 or "") if self.measured else ""

    @property
    def lower_is_better(self) -> bool:
        return self.metric.endswith("median_rank")

    @classmethod
    def of(cls, values: Mapping[str, Any] | Record) -> Record:
        """A record from a mapping; InputError for unknown or missing keys and values that are no numbers."""
        if isinstance(values, Record):
            return values
        known = {f.name for f in fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"a result has no key '{key}'{nearest(str(key), sorted(known))}")
        for key in ("method", "metric", "value"):
            if key not in values:
                raise InputError(f"the result {dict(values)!r:.120} lacks the key '{key}'")
        try:
            given = {k: v for k, v in values.items() if v is not None}
            given |= {k: float(given[k]) for k in ("value", "low", "high") if k in given}
            given |= {k: int(given[k]) for k in ("seed", "n") if k in given}
            record = cls(**(given | {"method": str(values["method"]), "metric": str(values["metric"])}))
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(f"the result {dict(values)!r:.120} holds something else than numbers: {error}") from error
        if not np.isfinite(record.value):
            raise InputError(f"the result of {values['method']} in {values['metric']} is not a finite number")
        return record


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Records of finished run folders: run.json says method and seed, scores.json (.npz) what was measured, bench.json
    how fast it is. The teacher's results are taken once for each teacher fingerprint.
    """
    records: list[Record] = []
    teachers: set[tuple[Any, ...]] = set()
    for folder in folders:
        place = RunFolder(Path(folder))
        if not place.is_run:
            raise InputError(f"{folder}: not a run folder (it has no run.json)")
        run = place.facts()
        method, seed = run.get("method"), run.get("seed")
        if not isinstance(method, str) or not isinstance(seed, int):
            raise InputError(f"{folder / 'run.json'}: the keys 'method' (text) and 'seed' (number) are needed")
        scores = Scores.of_run(folder)
        for record in records_of(scores, method, seed, run) if scores else []:
            if record.role == "teacher":
                key = (record.fingerprint, record.metric, record.dataset, record.protocol)
                if key in teachers:
                    continue
                teachers.add(key)
            records.append(record)
        records += _speeds(folder / "bench.json", {folder.name: method, run.get("name"): method})
    return _once(records)


def records_of(scores: Scores, method: str, seed: int | None, facts: Mapping[str, Any] | None = None) -> list[Record]:
    """The records of one run's scores, the teacher's among them. facts: the run.json that says which weights it has."""
    found = []
    for score in scores:
        queries = scores.queries.get((score.model, score.protocol.question()))
        per_query = queries.values.get(score.metric) if queries else None
        ranked = score.metric.endswith("median_rank")  # no mean, even where that is the same number
        if per_query is not None and (ranked or abs(float(per_query.mean()) - score.value) > 1e-6):
            per_query = None
        teacher = score.model == "teacher"
        found.append(
            Record(
                method="teacher" if teacher else method,
                metric=score.metric,
                value=score.value,
                seed=None if teacher else seed,
                dataset=score.protocol.dataset,
                protocol=f"{score.protocol.label()} #{digest(score.protocol.question())[:8]}",
                low=score.low,
                high=score.high,
                per_query=per_query,
                clusters=queries.clusters.get(score.metric) if queries else None,
                n=score.n,
                measured=score.protocol,
                unusable="" if teacher else _stale(facts or {}, score),
            )
        )
    return found


def _stale(facts: Mapping[str, Any], score: Score) -> str:
    reason = stale_scores(facts, score.protocol.model_fingerprint)
    return f"its scores are stale: {reason}" if reason else ""


def is_noisy(bench: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether a benchmark's row was measured on a machine too busy for ratios to mean anything.

    Benchmarks mark such rows; those of older versions said it in a warning only.
    """
    said = re.compile(rf"batch {row.get('batch')}: noise: .* took up to (\d+) % longer")
    warnings = bench.get("warnings")
    found = [said.match(str(text)) for text in (warnings if isinstance(warnings, list) else [])]
    return row.get("noisy") is True or any(match and int(match[1]) > 300 for match in found)


def _speeds(path: Path, methods: Mapping[Any, str]) -> list[Record]:
    """Pairs per second in the first back end and number format, at the largest batch of all its models.

    Batch sizes measured on a busy machine only where there is no other.
    """
    bench = read_json(path) if path.is_file() else {}
    rows = bench.get("measurements")
    found: list[Record] = []
    try:
        rows = [row for row in rows or [] if row.get("tower") == "pair"]
        rows = [row for row in rows if not is_noisy(bench, row)] or rows
        rows = [row for row in rows if (row["backend"], row["dtype"]) == (rows[0]["backend"], rows[0]["dtype"])]
        batches = [{row["batch"] for row in rows if row["model"] == name} for name in {row["model"] for row in rows}]
        batch = max(set.intersection(*batches) or set.union(*batches)) if rows else None
        device = bench.get("device") or {}
        for row in rows:
            name = "teacher" if row["model"] == "teacher" else methods.get(row["model"])
            if name is not None and row["batch"] == batch:
                where = f"{row['backend']}, {row['dtype']}, batch {batch}"
                where += f", {device['label']} #{device.get('fingerprint', '')}" if "label" in device else ""
                unusable = f"its speed was {NOISY}" if is_noisy(bench, row) else ""
                given = {"method": name, "metric": SPEED, "protocol": where, "unusable": unusable}
                found.append(Record.of(given | {key: row.get(key) for key in ("value", "low", "high")}))
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the measurements of `clipdistill bench` ({error!r})") from error
    return found


def _once(records: Sequence[Record]) -> list[Record]:
    """Without repeated speeds: several seeds of a method, and every run's bench.json, measure the same architecture."""
    kept: dict[Any, Record] = {}
    for i, record in enumerate(sorted(records, key=lambda one: bool(one.unusable))):
        key = (record.method, record.protocol) if record.metric == SPEED else i
        kept.setdefault(key, record)
    return list(kept.values())
