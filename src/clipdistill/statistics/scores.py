"""Scores with their protocols: one list that prints as tables, reads and writes JSON, and never mixes protocols."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from clipdistill.config import as_dict, build
from clipdistill.errors import InputError
from clipdistill.statistics.bootstrap import Interval, bootstrap_ratio
from clipdistill.statistics.protocol import Protocol, comparable, difference

FORMAT = 1
_RANKS = ("median_rank",)  # smaller is better, and not a fraction
_COUNTS = ("ties",)


@dataclass(frozen=True)
class Score:
    """One number: metric, value, how many queries, interval (None: not computed), which model, how it was measured.

    model: "student", "teacher", or any name. Values are fractions, except ranks and counts.
    """

    metric: str
    value: float
    n: int
    protocol: Protocol
    low: float | None = None
    high: float | None = None
    model: str = "student"

    def text(self, interval: bool = True) -> str:
        """The value as printed: '41.2' percent points with '[39.8, 42.6]', ranks and counts as they are."""
        scale, digits = (1.0, 1) if _is_rank(self.metric) else (1.0, 0) if self.metric in _COUNTS else (100.0, 1)
        result = f"{self.value * scale:.{digits}f}"
        if interval and self.low is not None and self.high is not None:
            result += f" [{self.low * scale:.{digits}f}, {self.high * scale:.{digits}f}]"
        return result


@dataclass
class Queries:
    """Per-query results of one model under one protocol, for paired tests.

    values: metric -> (Q,) array; clusters: metric -> (Q,) image of each query, absent where queries stand alone.
    """

    values: dict[str, np.ndarray] = field(default_factory=dict)
    clusters: dict[str, np.ndarray] = field(default_factory=dict)


class Scores:
    """A list of scores. `queries` holds per-query results by (model, protocol question) when they were kept."""

    def __init__(self, scores: Iterable[Score] = ()) -> None:
        self.scores: list[Score] = list(scores)
        self.queries: dict[tuple[str, Any], Queries] = {}
        self.notes: list[str] = []

    def __iter__(self) -> Iterator[Score]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return (
            f"Scores({len(self.scores)} scores, {len(self.protocols())} protocols, models {', '.join(self.models())})"
        )

    def add(self, scores: Scores) -> None:
        """Append everything another list holds."""
        self.scores += scores.scores
        self.queries |= scores.queries
        self.notes += scores.notes

    def models(self) -> list[str]:
        """Names of the models, in order of appearance."""
        return list(dict.fromkeys(s.model for s in self.scores))

    def protocols(self) -> list[Protocol]:
        """One protocol of each comparable group, in order of appearance."""
        return list({s.protocol.question(): s.protocol for s in reversed(self.scores)}.values())[::-1]

    def value(self, metric: str, model: str | None = None, dataset: str | None = None) -> float:
        """The one score of this description. InputError when there is none, or several under different protocols."""
        found = [
            s
            for s in self.scores
            if s.metric == metric and model in (None, s.model) and dataset in (None, s.protocol.dataset)
        ]
        what = " ".join(str(part) for part in (model, metric, dataset and f"on {dataset}") if part)
        if not found:
            known = ", ".join(dict.fromkeys(s.metric for s in self.scores)) or "none"
            raise InputError(f"there is no score '{what}'; known metrics: {known}")
        if len(found) > 1:
            raise InputError(f"{len(found)} scores are called '{what}': name the model and the data set")
        return found[0].value

    def retention(self, reference: str = "teacher") -> list[Score]:
        """Each score divided by the reference's under the same protocol; interval over the same queries where kept.

        Ranks and counts are left out, and scores whose reference is 0.
        """
        base = {(s.metric, s.protocol.question()): s for s in self.scores if s.model == reference}
        result = []
        for s in self.scores:
            other = base.get((s.metric, s.protocol.question()))
            if s.model == reference or other is None or other.value == 0 or not _is_fraction(s.metric):
                continue
            interval = self._retention_interval(s, reference)
            low, high = (interval.low, interval.high) if interval else (None, None)
            result.append(Score(s.metric, s.value / other.value, s.n, s.protocol, low, high, s.model))
        return result

    def _retention_interval(self, score: Score, reference: str) -> Interval | None:
        question = score.protocol.question()
        ours, theirs = self.queries.get((score.model, question)), self.queries.get((reference, question))
        if ours is None or theirs is None or score.metric not in ours.values or score.metric not in theirs.values:
            return None
        if score.value == 0:  # resampling nothing but failures says nothing
            return None
        return bootstrap_ratio(
            ours.values[score.metric], theirs.values[score.metric], ours.clusters.get(score.metric), replicates=1000
        )

    def table(self, metrics: Sequence[str] | None = None, *, split: bool = True) -> list[Table]:
        """One rich table for each protocol: a row a metric, a column a model, then what each keeps of the teacher.

        metrics: which rows; None for all. split False: raise InputError instead of making a second table, for callers
        that promise a single one.
        """
        protocols = self.protocols()
        if not split and len(protocols) > 1:
            raise InputError(
                "these scores were measured under different protocols and do not belong in one table"
                f" ({difference(protocols[0], protocols[1])})"
            )
        return [self._one_table(protocol, metrics) for protocol in protocols]

    def _one_table(self, protocol: Protocol, metrics: Sequence[str] | None) -> Table:
        heads, rows = self._cells(protocol, metrics)
        caption = "percent, with 95 % intervals" if any("[" in cell for row in rows for cell in row) else "percent"
        table = Table(title=protocol.label(), title_justify="left", caption=caption, caption_justify="left")
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left")
        for row in rows:
            table.add_row(*row)
        return table

    def _cells(self, protocol: Protocol, metrics: Sequence[str] | None) -> tuple[list[str], list[list[str]]]:
        """Column heads and rows of text for one protocol."""
        own = [s for s in self.scores if comparable(s.protocol, protocol)]
        kept = [s for s in self.retention() if comparable(s.protocol, protocol)]
        groups = [("", own, model) for model in sorted({s.model: 0 for s in own}, key=lambda name: name != "teacher")]
        groups += [(", % of teacher", kept, model) for model in dict.fromkeys(s.model for s in kept)]
        columns = [{s.metric: s.text() for s in scores if s.model == model} for _, scores, model in groups]
        shown = [m for m in dict.fromkeys(s.metric for s in own) if metrics is None or m in metrics]
        rows = [[metric, *(column.get(metric, "") for column in columns)] for metric in sorted(shown, key=_order)]
        return ["metric", *(model + suffix for suffix, _, model in groups)], rows

    def to_markdown(self, metrics: Sequence[str] | None = None) -> str:
        """The tables in Markdown, each under its protocol; percent, with 95 % intervals in brackets."""
        blocks = []
        for protocol in self.protocols():
            heads, rows = self._cells(protocol, metrics)
            lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
            blocks.append(f"**{protocol.label()}**\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
        return "\n".join(blocks + [f"{note}\n" for note in self.notes])

    def print(self, console: Console | None = None, metrics: Sequence[str] | None = None) -> None:
        """Print the tables and notes to the terminal. Values in percent; brackets hold 95 % intervals."""
        console = console or Console()
        for table in self.table(metrics):
            # as a line of its own, since a title is broken to the width of its table
            label, table.title = str(table.title), None
            console.print(Group(Text(label, style="bold"), table))
        console.print(Group(*(Text(note) for note in self.notes)))

    def to_json(self) -> str:
        """Everything but the per-query results. Protocols are listed once and referred to by position."""
        protocols = list(dict.fromkeys(s.protocol for s in self.scores))
        place = {protocol: i for i, protocol in enumerate(protocols)}
        stored = {
            "format": FORMAT,
            "protocols": [as_dict(p) | {"label": p.label()} for p in protocols],
            "scores": [self._row(s, place) for s in self.scores],
            "retention": [self._row(s, place) for s in self.retention()],
            "notes": self.notes,
        }
        return json.dumps(stored, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def _row(score: Score, place: dict[Protocol, int]) -> dict[str, Any]:
        return {
            "metric": score.metric,
            "value": score.value,
            "n": score.n,
            "low": score.low,
            "high": score.high,
            "model": score.model,
            "protocol": place[score.protocol],
        }

    @classmethod
    def from_json(cls, text: str, where: str = "scores") -> Scores:
        """The inverse of `to_json`; InputError for anything else."""
        try:
            stored = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not readable as JSON ({error})") from error
        if not isinstance(stored, dict) or not isinstance(stored.get("scores"), list):
            raise InputError(f"{where}: expected a list of scores under the key 'scores'")
        if stored.get("format") != FORMAT:
            raise InputError(f"{where}: written in format {stored.get('format')!r}, this version reads format {FORMAT}")
        protocols = [
            build(Protocol, {k: v for k, v in values.items() if k != "label"}, f"{where}, protocol {i}")
            for i, values in enumerate(stored.get("protocols", []))
        ]
        scores = []
        for i, row in enumerate(stored["scores"]):
            try:
                protocol = protocols[row["protocol"]]
                low, high = (None if row[key] is None else float(row[key]) for key in ("low", "high"))
                value, n, model = float(row["value"]), int(row["n"]), str(row["model"])
                scores.append(Score(str(row["metric"]), value, n, protocol, low, high, model))
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise InputError(f"{where}, score {i}: not a stored score ({error!r})") from error
        result = cls(scores)
        result.notes = [str(note) for note in stored.get("notes", [])]
        return result

    def save(self, path: Path) -> None:
        """Write `path` (JSON) and, when per-query results were kept, `path` with the ending .npz beside it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")
        arrays: dict[str, np.ndarray] = {}
        protocols = list(dict.fromkeys(s.protocol for s in self.scores))
        for i, protocol in enumerate(protocols):
            model = next(s.model for s in self.scores if s.protocol == protocol)
            queries = self.queries.get((model, protocol.question()))
            for metric, values in (queries.values if queries else {}).items():
                arrays[f"{i}/{model}/{metric}"] = values
                if queries is not None and metric in queries.clusters:
                    arrays[f"{i}/{model}/{metric}/clusters"] = queries.clusters[metric]
        if arrays:
            # no allow_pickle=False here: NumPy before 2.1 would store it as one more array; these hold numbers only
            np.savez_compressed(path.with_suffix(".npz"), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read what `save` wrote, per-query results included where the .npz file is there."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise InputError(f"{path}: no such file") from error
        result = cls.from_json(text, str(path))
        arrays = path.with_suffix(".npz")
        if arrays.exists():
            protocols = list(dict.fromkeys(s.protocol for s in result.scores))
            with np.load(arrays, allow_pickle=False) as stored:
                for name in stored.files:
                    i, model, metric, *clusters = name.split("/")
                    key = (model, protocols[int(i)].question())
                    queries = result.queries.setdefault(key, Queries())
                    (queries.clusters if clusters else queries.values)[metric] = stored[name]
        return result


def _order(metric: str) -> tuple[int, str]:
    """Image-to-text first, then text-to-image; within each the order in which they were measured."""
    return (0 if metric.startswith("i2t") else 1 if metric.startswith("t2i") else 2), ""


def _is_rank(metric: str) -> bool:
    return metric.endswith(_RANKS)


def _is_fraction(metric: str) -> bool:
    return not _is_rank(metric) and metric not in _COUNTS
