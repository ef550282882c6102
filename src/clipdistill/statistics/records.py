"""Results as flat records, one for each (method, seed, data set, protocol, metric): what claims are judged from.

A record is a plain dictionary {method, seed, metric, value, ...}, so results measured elsewhere can be added by hand;
`read_records` makes them from finished run folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError, nearest
from clipdistill.statistics.protocol import digest
from clipdistill.statistics.scores import Scores

SPEED = "pairs_per_second"


@dataclass(frozen=True)
class Record:
    """One result.

    method: what was trained ("clip-rd"), or "teacher"; seed: of the training run, None for what was not trained here
    (a teacher, a speed). dataset, protocol: where known; records compare only within the same. low, high: interval of
    a measurement without queries (a speed). per_query, clusters: (Q,) results and the image of each query.
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

    @classmethod
    def of(cls, values: Mapping[str, Any] | Record) -> Record:
        """A record from a mapping; InputError for unknown or missing keys and values that are no numbers."""
        if isinstance(values, Record):
            return values
        fields = cls.__dataclass_fields__
        for key in values:
            if key not in fields:
                raise InputError(f"a result has no key '{key}'{nearest(str(key), fields)}")
        for key in ("method", "metric", "value"):
            if key not in values:
                raise InputError(f"the result {dict(values)!r:.120} lacks the key '{key}'")
        try:
            numbers = {k: None if values.get(k) is None else float(values[k]) for k in ("value", "low", "high")}
            seed = None if values.get("seed") is None else int(values["seed"])
        except (TypeError, ValueError) as error:
            raise InputError(f"the result {dict(values)!r:.120} holds something else than numbers: {error}") from error
        if numbers["value"] is None or not np.isfinite(numbers["value"]):
            raise InputError(f"the result of {values['method']} in {values['metric']} is not a finite number")
        arrays = {k: None if values.get(k) is None else np.asarray(values[k]) for k in ("per_query", "clusters")}
        return cls(
            method=str(values["method"]),
            metric=str(values["metric"]),
            value=numbers["value"],
            seed=seed,
            dataset=values.get("dataset"),
            protocol=values.get("protocol"),
            low=numbers["low"],
            high=numbers["high"],
            per_query=arrays["per_query"],
            clusters=arrays["clusters"],
        )


def read_records(folders: Sequence[Path]) -> list[Record]:
    """Records of finished run folders: run.json says method and seed, scores.json (.npz) what was measured, bench.json
    how fast it is. The teacher's results are taken once for each teacher fingerprint.
    """
    records: list[Record] = []
    teachers: set[tuple[Any, ...]] = set()
    for folder in folders:
        run = _read(folder / "run.json")
        if run is None:
            raise InputError(f"{folder}: not a run folder (it has no run.json)")
        method, seed = run.get("method"), run.get("seed")
        if not isinstance(method, str) or not isinstance(seed, int):
            raise InputError(f"{folder / 'run.json'}: the keys 'method' (text) and 'seed' (number) are needed")
        if (folder / "scores.json").exists():
            scores = Scores.load(folder / "scores.json")
            for record, fingerprint in _of_scores(scores, method, seed):
                key = (fingerprint, record.metric, record.dataset, record.protocol)
                if record.method == "teacher":
                    if key in teachers:
                        continue
                    teachers.add(key)
                records.append(record)
        records += _of_speeds(_read(folder / "bench.json"), {folder.name: method, run.get("name"): method})
    return _once(records)


def _of_scores(scores: Scores, method: str, seed: int) -> Iterable[tuple[Record, str]]:
    for score in scores:
        queries = scores.queries.get((score.model, score.protocol.question()))
        teacher = score.model == "teacher"
        record = Record(
            method="teacher" if teacher else method,
            metric=score.metric,
            value=score.value,
            seed=None if teacher else seed,
            dataset=score.protocol.dataset,
            protocol=f"{score.protocol.label()} #{digest(score.protocol.question())[:8]}",
            low=score.low,
            high=score.high,
            per_query=queries.values.get(score.metric) if queries else None,
            clusters=queries.clusters.get(score.metric) if queries else None,
        )
        yield record, score.protocol.model_fingerprint


def _of_speeds(bench: Mapping[str, Any] | None, methods: Mapping[Any, str]) -> list[Record]:
    """Pairs per second at the largest batch of the first back end and number format; one value for each method."""
    rows = [row for row in (bench or {}).get("measurements", []) if row.get("tower") == "pair"]
    if not rows:
        return []
    setting = (rows[0]["backend"], rows[0]["dtype"], max(row["batch"] for row in rows))
    found = []
    for row in rows:
        name = "teacher" if row["model"] == "teacher" else methods.get(row["model"])
        if name is not None and (row["backend"], row["dtype"], row["batch"]) == setting:
            where = f"{setting[0]}, {setting[1]}, batch {setting[2]}"
            bounds = {"low": row.get("low"), "high": row.get("high")}
            found.append(Record(name, SPEED, float(row["value"]), protocol=where, **bounds))
    return found


def _once(records: Sequence[Record]) -> list[Record]:
    """Without repeated speeds: several seeds of a method, and every run's bench.json, measure the same architecture."""
    kept: dict[Any, Record] = {}
    for i, record in enumerate(records):
        key = (record.method, record.protocol) if record.metric == SPEED else i
        kept.setdefault(key, record)
    return list(kept.values())


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(stored, dict):
        raise InputError(f"{path}: expected an object, got {type(stored).__name__}")
    return stored
