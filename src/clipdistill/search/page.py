"""The search page as HTML: every value is escaped by the template engine, nothing on it comes from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from clipdistill.search.collection import Answer, Collection, times_as_fast
from clipdistill.search.photographs import printable

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
_OFFERED = 24
"""Photographs shown before anything was asked."""


@dataclass
class Question:
    """What was asked: words, a photograph of the collection (its number) or an uploaded picture (its name)."""

    text: str = ""
    number: int | None = None
    picture: str = ""
    error: str = ""


def render(collection: Collection, question: Question, answers: Sequence[Answer]) -> str:
    """The page after a question (or before the first one)."""
    slowest = max((answer.total_ms for answer in answers), default=0.0)
    return _template().render(
        folder=printable(collection.folder.resolve().name),
        count=len(collection),
        question=question,
        asked=printable(collection.paths[question.number]) if question.number is not None else "",
        sides=[
            _side(collection, number, answers[number] if answers else None, slowest)
            for number in range(len(collection.sides))
        ],
        answered=bool(answers),
        comparison=_comparison(answers),
        offered=[] if answers else _offered(collection),
    )


def _side(collection: Collection, number: int, answer: Answer | None, slowest: float) -> dict[str, Any]:
    side = collection.sides[number]
    cost = side.index.cost
    facts: dict[str, Any] = {
        "role": side.model.role,
        "name": printable(side.model.name),
        "parameters": _compact(side.model.model.parameter_counts()["total"]),
        "indexed": f"{len(side.index.entries):,}",
        "rate": f"{cost.rate:,.0f}" if cost.rate >= 10 else f"{cost.rate:.2g}" if cost.rate else "",
        "device": cost.device,
    }
    if answer is not None:
        facts |= {
            "total": milliseconds(answer.total_ms),
            "encode": milliseconds(answer.encode_ms),
            "search": milliseconds(answer.search_ms),
            "share": round(100 * answer.total_ms / slowest) if slowest else 100,
            "note": answer.note,
            "hits": [
                {
                    "rank": rank + 1,
                    "number": hit.number,
                    "name": printable(hit.path),
                    "score": f"{hit.score:.3f}",
                    "shared": hit.shared,
                    "version": collection.sha256(hit.number)[:12],
                }
                for rank, hit in enumerate(answer.hits)
            ],
        }
    return facts


def _comparison(answers: Sequence[Answer]) -> dict[str, Any] | None:
    """Student against teacher in one sentence."""
    if len(answers) < 2:
        return None
    student, teacher = answers
    ratio = times_as_fast(student, teacher)
    faster, slower = ("student", "teacher") if ratio is None or ratio >= 1 else ("teacher", "student")
    return {
        "ratio": "" if ratio is None else f"{max(ratio, 1 / ratio):.1f}",
        "faster": faster,
        "slower": slower,
        "shared": sum(hit.shared for hit in student.hits),
        "shown": len(student.hits),
    }


def _offered(collection: Collection) -> list[dict[str, Any]]:
    """Photographs spread evenly over the collection, to begin with."""
    step = max(1, len(collection) // _OFFERED)
    numbers = range(0, len(collection), step)[:_OFFERED]
    return [
        {"number": n, "name": printable(collection.paths[n]), "version": collection.sha256(n)[:12]} for n in numbers
    ]


def milliseconds(value: float) -> str:
    """ "0.04 ms", "3.2 ms", "128 ms"."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


def _compact(count: int) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("clipdistill.search").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
