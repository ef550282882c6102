"""One self-contained HTML page about some runs, with Markdown and CSV beside it.

The package can be called: `clipdistill.report(...)` is the function in report.py.
"""

from __future__ import annotations

from pathlib import Path

from clipdistill.errors import InputError
from clipdistill.registry import callable_package
from clipdistill.runtime.files import holds_mark, require_place

IMAGES = 1000
"""Pictures that a report looks at, at most."""


def report_place(out: Path | str) -> Path:
    """The page's path; InputError when the page, or the two files beside it, cannot be written there."""
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"{out}: the report is an HTML file; give it a name that ends in .html")
    mark = b'content="clipdistill'
    own = out.is_file() and holds_mark(out, (mark,))  # then the files beside it are a report's, too
    require_place(out, "report", (mark,))
    for path in (out.with_suffix(".md"), out.with_suffix(".csv")):
        require_place(path, "report", () if own else (b"kind,model,role,measure,", b"this report: "))
    return out


callable_package(__name__, "clipdistill.report.report:report")
