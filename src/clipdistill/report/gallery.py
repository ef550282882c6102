"""The retrieval gallery of the report: for some queries, what the teacher and each student retrieve, hits marked.

gallery.json is made by look.py; pictures travel in it as thumbnails in data URIs. On reading, every one is decoded and
encoded again by us, so that nothing but pixels reaches the page whoever wrote the file.
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from clipdistill.report.data import ReportedRun, optional, read_optional
from clipdistill.report.tables import Entry, ScoreTable

THUMBNAIL = 144
"""Longest side of a thumbnail in pixels."""

_MAX_PIXELS = 4_000_000  # a thumbnail is far smaller; more is not one of ours


@dataclass
class Retrieved:
    """One retrieved item: a picture (`key`) or a caption (`text`)."""

    key: str
    text: str
    score: float
    hit: bool


@dataclass
class Query:
    """One query and the answers by entry; rank: where the first right answer stands for each entry (1 is best)."""

    kind: str
    text: str
    key: str
    why: str
    answers: list[tuple[Entry, list[Retrieved], int | None]] = field(default_factory=list)


@dataclass
class Gallery:
    """Queries with re-encoded thumbnails (key -> (data URI, width, height)) and how the queries were chosen."""

    queries: list[Query]
    thumbnails: dict[str, tuple[str, int, int]]
    selection: str


def thumbnail(picture: Image.Image) -> str:
    """A JPEG data URI of at most THUMBNAIL pixels a side."""
    return _encode(picture)[0]


def reencode(uri: str) -> tuple[str, int, int] | None:
    """(our own JPEG data URI, width, height) of a picture given as a data URI, None when it is not a small picture."""
    head, _, body = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        return None
    try:
        data = base64.b64decode(body, validate=True)
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            if image.width * image.height > _MAX_PIXELS:
                return None
            return _encode(image.convert("RGB"))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def read_galleries(runs: Sequence[ReportedRun], table: ScoreTable, notices: list[str]) -> Gallery | None:
    """The galleries in and beside the run folders, merged query by query; None when there is none."""
    merged: dict[tuple[str, str, str], Query] = {}
    thumbnails: dict[str, tuple[str, int, int]] = {}
    selections: dict[str, None] = {}
    extras: dict[str, Entry] = {}
    for path, owner, gallery in read_optional(runs, "gallery.json", notices):
        with optional(path, notices):
            queries = [_query(query, owner, table, extras) for query in gallery["queries"]]
            for key, uri in gallery["thumbnails"].items():
                if key not in thumbnails:
                    safe = reencode(uri) if isinstance(uri, str) else None
                    if safe is None:
                        notices.append(f"{path.name}: the thumbnail of '{key}' is not a picture and was left out.")
                    else:
                        thumbnails[key] = safe
            if gallery.get("selection"):
                selections[str(gallery["selection"])] = None
            for query in queries:
                known = merged.setdefault((query.kind, query.text, query.key), query)
                if known is not query:  # the teacher stands in every run's gallery
                    shown = {id(entry) for entry, _, _ in known.answers}
                    known.answers += [answer for answer in query.answers if id(answer[0]) not in shown]
    order = {id(entry): position for position, entry in enumerate(table.entries)}
    for query in merged.values():
        query.answers.sort(key=lambda answer: order.get(id(answer[0]), len(order)))
    return Gallery(list(merged.values()), thumbnails, " ".join(selections)) if merged else None


def _query(stored: dict[str, Any], owner: ReportedRun | None, table: ScoreTable, extras: dict[str, Entry]) -> Query:
    kind = "i2t" if stored.get("kind") == "i2t" else "t2i"
    text, key = str(stored.get("text", "")), str(stored.get("truth") or stored.get("image") or "")
    ranks = stored.get("ranks")
    query = Query(kind, text, key, str(stored.get("why", "")))
    for name, rows in stored["models"].items():
        answers = [
            Retrieved(str(r.get("key", "")), str(r.get("text", "")), float(r.get("score", 0.0)), bool(r.get("hit")))
            for r in rows
        ]
        rank = ranks.get(name) if isinstance(ranks, dict) else None
        query.answers.append(
            (_entry(str(name), owner, table, extras), answers, rank if isinstance(rank, int) else None)
        )
    return query


def _entry(name: str, owner: ReportedRun | None, table: ScoreTable, extras: dict[str, Entry]) -> Entry:
    """The entry that a model of a gallery is; one of its own (kept in `extras`) when the report does not know it."""
    for entry in table.entries:
        for run in entry.runs:
            if entry.role == "teacher" and name in {"teacher", run.teacher, entry.label}:
                return entry
            known = {run.name, entry.label, run.method}
            if entry.role == "student" and (name in known or (owner is run and name == "student")):
                return entry
    if name not in extras:
        role = "teacher" if name == "teacher" else "student"
        highest = max([entry.colour for entry in [*table.students, *extras.values()]], default=0)
        colour = 0 if role == "teacher" else highest + 1
        extras[name] = Entry(name, role, name, [], colour)
    return extras[name]


def _encode(image: Image.Image) -> tuple[str, int, int]:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    # a fresh image: nothing of the original file (comments, profiles, positions) travels along
    clean, buffer = Image.new("RGB", small.size), io.BytesIO()
    clean.paste(small)
    clean.save(buffer, format="JPEG", quality=80, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(), small.width, small.height
