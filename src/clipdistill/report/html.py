"""The page itself: the template filled and made self-contained.

Every value is escaped by the template engine, and a content security policy allows exactly the one style sheet and
the one script written here (by hash) and pictures in data URIs: nothing that a run folder contains can load or run.
"""

from __future__ import annotations

import base64
import datetime
import hashlib
from importlib import metadata, resources
from typing import Any

import jinja2
from markupsafe import Markup

from clipdistill.report.context import Report, page
from clipdistill.report.svg import legend_mark


def render(report: Report) -> str:
    """The report as one HTML document."""
    style, script = _asset("style.css"), _asset("script.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["mark"] = lambda colour: Markup(legend_mark(colour))
    return environment.from_string(_asset("page.html.j2")).render(
        **page(report),
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=version(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def version() -> str:
    """The installed version of clipdistill, "" when it runs from a bare source tree."""
    try:
        return metadata.version("clipdistill")
    except metadata.PackageNotFoundError:
        return ""


def _asset(name: str) -> str:
    return resources.files("clipdistill.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> Any:
    """The source expression of an inline element in a content security policy."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return Markup(f"sha256-{digest}")
