"""Scores with their protocols: one list that prints as tables, reads and writes JSON, and never mixes protocols."""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from clipdistill.config import as_dict, build
from clipdistill.errors import InputError
from clipdistill.runtime.console import TextTable, html_page, say
from clipdistill.runtime.files import (
    compare_checksum,
    json_text,
    make_folder,
    parse_json,
    read_json,
    require_place,
    sha256,
    with_checksum,
    write_text,
    write_together,
)
from clipdistill.statistics.bootstrap import bootstrap_ratio
from clipdistill.statistics.protocol import Protocol, comparable, difference

FILE = "scores.json"
FORMAT = 2
"""Format 1 had no checksums."""
_AGAIN = "measure again with  clipdistill eval RUN --data ... --json RUN/scores.json"
_LARGEST_ARRAY = 1 << 30  # bytes
_RANKS = ("median_rank",)  # smaller is better, and not a fraction
_COUNTS = ("ties",)
BENCHMARKS = ("mAP", "accuracy", "text_score", "image_score", "group_score")
"""Metrics of sets with several classes a picture (evaluate/zero_shot.py), and of evaluate/matching.py."""
HEADLINES = ("i2t_R@1", "t2i_R@1", "top1", *BENCHMARKS)
"""The metrics of a table over several sets."""


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
        if interval and self.low is not None and self.high is not None and math.isfinite(self.high - self.low):
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
        self.scores: list[Score] = list(scores) if isinstance(scores, Iterable) else [scores]
        if other := next((score for score in self.scores if not isinstance(score, Score)), None):
            raise InputError(f"Scores takes results of the kind Score, got {other!r}")
        self.queries: dict[tuple[str, Any], Queries] = {}
        self.notes: list[str] = []
        self._kept: dict[tuple[str, str, Any], Score] = {}
        """Retention as it was stored: its intervals need per-query results, which may be gone since."""

    def __iter__(self) -> Iterator[Score]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return "\n".join([line for table in self.table() for line in table.lines()] + self.notes) or "no scores"

    def _repr_html_(self) -> str:
        return html_page(self.table(), "\n".join(self.notes))

    def to_frame(self) -> Any:
        """A pandas DataFrame: a row a score; model, dataset, metric, value, low, high (95 %), n, protocol.

        Values are fractions, ranks and counts. Raises InputError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise InputError("to_frame needs pandas, which is not installed: pip install pandas") from error
        rows = [
            {"model": s.model, "dataset": s.protocol.dataset, "metric": s.metric, "value": s.value, "low": s.low,
             "high": s.high, "n": s.n, "protocol": s.protocol.label()}
            for s in self.scores
        ]  # fmt: skip
        return pandas.DataFrame(rows)

    def add(self, scores: Scores) -> None:
        """Append everything another list holds."""
        self.scores += scores.scores
        self.queries |= scores.queries
        self.notes += scores.notes

    def renamed(self, old: str, new: str) -> Scores:
        """The same scores with the model `old` called `new`."""
        result = Scores(replace(s, model=new) if s.model == old else s for s in self.scores)
        result.queries = {(new if model == old else model, asked): q for (model, asked), q in self.queries.items()}
        result.notes = list(self.notes)
        return result

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
            low, high = self._retention_interval(s, reference)
            result.append(Score(s.metric, s.value / other.value, s.n, s.protocol, low, high, s.model))
        return result

    def _retention_interval(self, score: Score, reference: str) -> tuple[float | None, float | None]:
        question = score.protocol.question()
        stored = self._kept.get((score.model, score.metric, question))
        if stored is not None and reference == "teacher":
            return stored.low, stored.high
        ours, theirs = self.queries.get((score.model, question)), self.queries.get((reference, question))
        if ours is None or theirs is None or score.metric not in ours.values or score.metric not in theirs.values:
            return None, None
        if score.value == 0:  # resampling nothing but failures says nothing
            return None, None
        clusters = ours.clusters.get(score.metric)
        found = bootstrap_ratio(ours.values[score.metric], theirs.values[score.metric], clusters, replicates=1000)
        return found.low, found.high

    def table(
        self, metrics: Sequence[str] | None = None, *, split: bool = True, names: Mapping[str, str] | None = None
    ) -> list[TextTable]:
        """One table for each protocol: a row a metric, a column a model, then what each keeps of the teacher.

        metrics: which rows; None for all. names: heads of the models' columns (default: "student", "teacher"). split
        False: raise InputError instead of making a second table, for callers that promise a single one.
        """
        protocols = self.protocols()
        if not split and len(protocols) > 1:
            raise InputError(
                "these scores were measured under different protocols and do not belong in one table"
                f" ({difference(protocols[0], protocols[1])})"
            )
        kept = self.retention()
        return [self._one_table(protocol, kept, metrics, names or {}) for protocol in protocols]

    def _one_table(
        self, protocol: Protocol, retention: Sequence[Score], metrics: Sequence[str] | None, names: Mapping[str, str]
    ) -> TextTable:
        own = [s for s in self.scores if comparable(s.protocol, protocol)]
        kept = [s for s in retention if comparable(s.protocol, protocol)]
        groups = [("", own, model) for model in sorted({s.model: 0 for s in own}, key=lambda name: name != "teacher")]
        groups += [(", % of teacher", kept, model) for model in dict.fromkeys(s.model for s in kept)]
        columns = [{s.metric: s.text() for s in scores if s.model == model} for _, scores, model in groups]
        shown = [m for m in dict.fromkeys(s.metric for s in own) if metrics is None or m in metrics]
        rows: list[Sequence[str]] = [
            [metric, *(column.get(metric, "") for column in columns)] for metric in sorted(shown, key=_order)
        ]
        heads = ["metric", *(names.get(model, model) + suffix for suffix, _, model in groups)]
        caption = "percent, with 95 % intervals" if any("[" in cell for row in rows for cell in row) else "percent"
        if any(metric.startswith("t2i_") for metric in shown):
            caption += "; t2i: pictures found by texts, i2t: texts found by pictures; ranks and ties are counts"
        return TextTable(heads, rows, protocol.label(), caption)

    def overview(self, names: Mapping[str, str] | None = None) -> TextTable:
        """One table over all sets: a row a set and headline metric, a column a model; last the mean over the
        classification sets where there are several (each set counts the same)."""
        heads = [(names or {}).get(model, model) for model in self.models()]
        table = TextTable(["set", "metric", *heads], [], "all sets", "percent", text=(0, 1))
        for protocol in self.protocols():
            own = [s for s in self.scores if comparable(s.protocol, protocol)]
            for metric in dict.fromkeys(s.metric for s in own if s.metric in HEADLINES):
                cells = {s.model: s.text() for s in own if s.metric == metric}
                where = protocol.dataset + (f"/{protocol.split}" if protocol.split else "")
                table.rows.append([where, metric, *(cells.get(model, "") for model in self.models())])
        top = {m: {s.protocol.question(): s.value for s in self.scores if (s.model, s.metric) == (m, "top1")}
               for m in self.models()}  # fmt: skip
        if len(asked := {frozenset(values) for values in top.values()}) == 1 and (count := len(asked.pop())) > 1:
            means = (f"{100 * sum(values.values()) / count:.1f}" for values in top.values())
            table.rows.append([f"mean of {count} classification sets", "top1", *means])
        return table

    def to_markdown(self, metrics: Sequence[str] | None = None, names: Mapping[str, str] | None = None) -> str:
        """The tables in Markdown, each under its protocol; percent, with 95 % intervals in brackets."""
        blocks = [f"**{table.title}**\n\n{table.markdown()}\n" for table in self.table(metrics, names=names)]
        return "\n".join(blocks + [f"{note}\n" for note in self.notes])

    def print(self, file: TextIO | None = None, names: Mapping[str, str] | None = None) -> None:
        """Print the tables and notes. Values in percent; brackets hold 95 % intervals."""
        for table in self.table(names=names):
            table.print(file)
        for note in self.notes:
            say(note, file)

    def to_json(self, *, queries_sha256: str | None = None) -> str:
        """Everything but the per-query results, with a checksum. Protocols are listed once, referred to by position."""
        protocols = self._listed()
        place = {protocol: i for i, protocol in enumerate(protocols)}
        stored = {
            "format": FORMAT,
            "protocols": [as_dict(p) | {"label": p.label()} for p in protocols],
            "scores": [_row(s, place) for s in self.scores],
            "retention": [_row(s, place) for s in self.retention()],
            "notes": self.notes,
            "queries_sha256": queries_sha256,
        }
        return json_text(with_checksum(stored))

    def _listed(self) -> list[Protocol]:
        return list(dict.fromkeys(s.protocol for s in self.scores))

    @classmethod
    def from_json(cls, text: str, where: str = "scores") -> Scores:
        """The inverse of `to_json`; InputError for anything else."""
        stored = parse_json(text.encode("utf-8", "surrogatepass"), where)
        return cls._of_values(
            compare_checksum(stored, where, _AGAIN, FORMAT) if isinstance(stored, dict) else stored, where
        )

    @classmethod
    def _of_values(cls, stored: Any, where: str) -> Scores:
        if not isinstance(stored, dict) or not isinstance(stored.get("scores"), list):
            raise InputError(f"{where}: expected a list of scores under the key 'scores'")
        if stored.get("format") not in (1, FORMAT):
            raise InputError(f"{where}: written in format {stored.get('format')!r}, this version reads 1 and {FORMAT}")
        listed, notes = stored.get("protocols", []), stored.get("notes", [])
        if not isinstance(listed, list) or not all(isinstance(p, dict) for p in listed) or not isinstance(notes, list):
            raise InputError(f"{where}: expected lists under the keys 'protocols' and 'notes'")
        protocols = [
            build(Protocol, {k: v for k, v in values.items() if k != "label"}, f"{where}, protocol {i}")
            for i, values in enumerate(listed)
        ]
        result = cls(_score(row, protocols, f"{where}, score {i}") for i, row in enumerate(stored["scores"]))
        retention = stored.get("retention", [])
        for i, row in enumerate(retention if isinstance(retention, list) else []):
            kept = _score(row, protocols, f"{where}, retention {i}")
            result._kept[kept.model, kept.metric, kept.protocol.question()] = kept
        result.notes = [str(note) for note in notes]
        return result

    def save(self, path: str | Path) -> None:
        """Write `path` (JSON) and, when per-query results were kept, `path` with the ending .npz beside it.

        The JSON names the checksum of the arrays, so that the two of different measurements, which a crash between the
        renames would leave, are never taken for one.
        """
        path = Path(path).expanduser()
        if path.name == FILE:  # of a run: whatever is there is that run's, damaged or not
            make_folder(path.parent, "scores")
        else:
            require_scores_place(path)
        arrays: dict[str, np.ndarray] = {}
        places = {protocol: i for i, protocol in enumerate(self._listed())}
        for (model, protocol), i in {(s.model, s.protocol): places[s.protocol] for s in self.scores}.items():
            queries = self.queries.get((model, protocol.question()))
            for metric, values in (queries.values if queries else {}).items():
                arrays[f"{i}/{model}/{metric}"] = values
                if queries is not None and metric in queries.clusters:
                    arrays[f"{i}/{model}/{metric}/clusters"] = queries.clusters[metric]
        beside = path.with_suffix(".npz")
        if not arrays:
            beside.unlink(missing_ok=True)
            return write_text(path, self.to_json())
        content = io.BytesIO()
        # no allow_pickle=False here: NumPy before 2.1 would store it as one more array; these are numbers only
        np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
        digest = hashlib.sha256(content.getvalue()).hexdigest()
        write_together({beside: content.getvalue(), path: self.to_json(queries_sha256=digest)})

    @classmethod
    def load(cls, path: str | Path) -> Scores:
        """Read what `save` wrote, per-query results included where the .npz file is there.

        Raises InputError that says in one sentence what is wrong with either file.
        """
        path = Path(path).expanduser()
        stored = read_json(path, _AGAIN, FORMAT)
        expected = stored.get("queries_sha256")
        result = cls._of_values(stored, str(path))
        arrays = path.with_suffix(".npz")
        if arrays.exists():
            if stored["format"] == FORMAT and sha256(arrays) != expected:
                raise InputError(f"{arrays}: damaged, or of another measurement than {path.name}: {_AGAIN}")
            result._read_queries(arrays)
        return result

    @classmethod
    def of_run(cls, folder: Path) -> Scores | None:
        """The scores of a run folder; None where it was not measured."""
        return cls.load(folder / FILE) if (folder / FILE).is_file() else None

    def _read_queries(self, path: Path) -> None:
        protocols = self._listed()
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    if info.file_size > _LARGEST_ARRAY:
                        raise ValueError(f"{info.filename} holds {info.file_size:,} bytes")
                    # read to its end first, where zip files have their checksum
                    values = np.lib.format.read_array(io.BytesIO(archive.read(info)), allow_pickle=False)
                    # the name of a model may be a path
                    i, _, rest = info.filename.removesuffix(".npy").partition("/")
                    clusters = rest.endswith("/clusters")
                    model, _, metric = rest.removesuffix("/clusters").rpartition("/")
                    if values.ndim != 1 or values.dtype.kind not in "biuf":
                        raise ValueError(f"{info.filename} is no list of numbers")
                    queries = self.queries.setdefault((model, protocols[int(i)].question()), Queries())
                    (queries.clusters if clusters else queries.values)[metric] = values
        except Exception as error:  # whatever zip and NumPy make of damage
            raise InputError(f"{path}: not readable as per-query results ({error}): {_AGAIN}") from error


def require_scores_place(path: Path) -> None:
    """See that scores can be written as `path`, and beside it as .npz. Raises InputError; a user's file stays."""
    if path.suffix.lower() == ".npz":
        raise InputError(f"{path}: scores are JSON, and results query by query go beside them as .npz: name it .json")
    require_place(path, "scores", (b'"protocols"', b'"scores"'))
    marks = (b"/i2t_", b"/t2i_", b"/top1", b"/mAP.", b"/accuracy", b"/text_score")
    require_place(path.with_suffix(".npz"), "results query by query", marks)


def _row(score: Score, place: Mapping[Protocol, int]) -> dict[str, Any]:
    return {
        "metric": score.metric,
        "value": score.value,
        "n": score.n,
        "low": score.low,
        "high": score.high,
        "model": score.model,
        "protocol": place[score.protocol],
    }


def _score(row: Any, protocols: Sequence[Protocol], where: str) -> Score:
    try:
        low, high = (None if row[key] is None else float(row[key]) for key in ("low", "high"))
        value, n, position = float(row["value"]), int(row["n"]), int(row["protocol"])
        if not math.isfinite(value) or position < 0 or any(v is not None and math.isnan(v) for v in (low, high)):
            raise ValueError("its numbers")
        return Score(str(row["metric"]), value, n, protocols[position], low, high, str(row["model"]))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{where}: not a stored score ({error!r})") from error


def _order(metric: str) -> tuple[int, str]:
    """Image-to-text first, then text-to-image; within each the order in which they were measured."""
    return (0 if metric.startswith("i2t") else 1 if metric.startswith("t2i") else 2), ""


def _is_rank(metric: str) -> bool:
    return metric.endswith(_RANKS)


def _is_fraction(metric: str) -> bool:
    return not _is_rank(metric) and metric not in _COUNTS
