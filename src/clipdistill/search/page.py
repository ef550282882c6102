"""The search page as HTML: every value is escaped by the template engine, nothing on it comes from elsewhere."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2

from clipdistill.runtime.console import compact, rate
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
    step = max(1, len(collection) // _OFFERED)
    return _template().render(
        collection=collection,
        question=question,
        answers=answers,
        slowest=max((answer.total_ms for answer in answers), default=0.0),
        ratio=times_as_fast(*answers) if len(answers) == 2 else None,
        offered=range(0, len(collection), step)[:_OFFERED],
    )


def _milliseconds(value: float) -> str:
    """ "0.04 ms", "3.2 ms", "128 ms"."""
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 1 else f"{value:.2f} ms"


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"shown": printable, "ms": _milliseconds, "compact": compact, "rate": rate}
    source = resources.files("clipdistill.search").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
