"""The page and its Markdown form: the templates filled, the page made self-contained.

Every value is escaped by the template engine, and a content security policy allows exactly the one style sheet and
the one script written here (by hash) and pictures in data URIs: nothing that a run folder contains can load or run.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from markupsafe import escape as escape_html

from clipdistill.report.context import Report, page_variables, variables
from clipdistill.report.grids import ReportGrid, score_cell
from clipdistill.report.svg import legend_mark
from clipdistill.runtime.console import TextTable
from clipdistill.version import __version__

_HYPHENATED = re.compile(r"(?<![\w&;-])[\w.+@/]{1,20}(?:-[\w.+@/]{1,20}){1,3}(?![\w-])")


def render(report: Report) -> str:
    """The report as one HTML document."""
    style, script = _asset("style.css"), _asset("script.js")
    return _template("page.html.j2").render(
        **variables(report),
        **page_variables(report),
        mark=lambda colour: Markup(legend_mark(colour)),
        prose=prose,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=__version__,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def to_markdown(report: Report) -> str:
    """Headline, scores, comparisons, speed, size, cost and how to reproduce them, for a README or an issue."""

    def markdown(table: TextTable) -> Markup:
        rows: list[Sequence[str]] = [[escape_markdown(cell) for cell in row] for row in table.rows]
        return Markup(TextTable([escape_markdown(head) for head in table.heads], rows, text=table.text).markdown())

    def scores(number: int) -> Markup:
        columns = [column for column in report.table.columns if column.number == number]
        grid = ReportGrid("Scores", ["Model", *(column.title for column in columns)])
        for entry in report.table.entries:
            cells = [score_cell(entry, column, report.table) for column in columns]
            grid.add(entry, *(cell.text() if cell else "" for cell in cells))
        return markdown(grid.plain())

    found = _template("page.md.j2").render(
        **variables(report), code=code, grid=lambda grid: markdown(grid.plain()), scores=scores
    )
    return re.sub(r"\n{3,}", "\n\n", found)


def prose(text: str) -> Markup:
    """A sentence in which names such as CLIP-KD are not broken at their hyphens."""
    return Markup(_HYPHENATED.sub(lambda name: f'<span class="nb">{name[0]}</span>', str(escape_html(text))))


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is: markup, tables and HTML are taken literally, line breaks become spaces."""
    flat = re.sub(r"\s+", " ", text).strip()
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", flat)


def code(text: str) -> Markup:
    """Inline code whose fence is longer than any run of backticks inside."""
    flat = re.sub(r"\s+", " ", text)
    fence = "`" * (1 + max([len(run) for run in re.findall(r"`+", flat)] or [0]))
    return Markup(f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`")


def _finalize(value: Any) -> Any:
    return value if isinstance(value, Markup) else escape_markdown(str(value))


@cache
def _template(name: str) -> jinja2.Template:
    page = name == "page.html.j2"
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=page,
        finalize=None if page else _finalize,
    )
    return environment.from_string(_asset(name))


def _asset(name: str) -> str:
    return resources.files("clipdistill.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> Markup:
    """The source expression of an inline element in a content security policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"sha256-{digest}")
