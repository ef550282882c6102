"""What commands print: lines and tables in which nothing is cut and no text is taken for markup.

In a file or a pipe each line and each row of a table is one line, however long. On a terminal a table that is too wide
has its heads and text columns wrapped at blanks; where that is not enough, each row becomes a block of `head: value`.
"""

from __future__ import annotations

import html
import math
import os
import re
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from clipdistill.errors import without_secrets

GAP = "  "
_CODES = {"bold": "1", "red": "31", "green": "32", "yellow": "33"}


class Coloured(str):
    """Text of a cell that a terminal shows in a colour: "red", "green", "yellow" or "bold"."""

    colour = ""

    def __new__(cls, text: str, colour: str) -> Coloured:
        """The text with its colour; "" for none."""
        made = super().__new__(cls, text)
        made.colour = colour
        return made


def html_page(tables: Sequence[TextTable] = (), text: str = "") -> str:
    """Tables and text as notebooks show them."""
    parts = [table.html() for table in tables] + ([f"<pre>{html.escape(text)}</pre>"] if text else [])
    return "\n".join(parts)


@dataclass
class TextTable:
    """Rows of cells under heads. `text`: the columns (from 0) that hold text, to the left; the others are numbers."""

    heads: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    title: str = ""
    caption: str = ""
    text: Collection[int] = (0,)

    def print(self, file: TextIO | None = None) -> None:
        """To the terminal, or to `file`."""
        file = sys.stdout if file is None else file
        width = shutil.get_terminal_size().columns if file.isatty() else None
        print("\n".join(self.lines(width, colour=_coloured(file))), file=file)

    def lines(self, width: int | None = None, colour: bool = False) -> list[str]:
        """The lines at most `width` columns wide (None: as wide as needed; a word that is longer is never broken)."""
        rows = [[_clean(cell) for cell in row] for row in self.rows]
        widths = self._widths(rows, width)
        shown = [_paint(self.title, "bold", colour)] if self.title else []
        if widths is None:
            shown += self._blocks(rows, width or 80, colour)
        else:
            shown += self._line([Coloured(head, "bold") for head in self.heads], widths, colour)
            shown.append(GAP.join("-" * w for w in widths))
            for row in rows:
                shown += self._line(row, widths, colour)
        if self.caption:
            shown += textwrap.wrap(self.caption, width, break_long_words=False) if width else [self.caption]
        return shown

    def markdown(self) -> str:
        """The table in Markdown, coloured cells bold; a cell may hold Markdown of its own, only bars are escaped."""
        marks = ["---" if i in self.text else "---:" for i in range(len(self.heads))]
        cells = [[re.sub(r"(?<!\\)\|", r"\|", _bold(_clean(cell))) for cell in row] for row in (self.heads, *self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in (cells[0], marks, *cells[1:]))

    def html(self) -> str:
        """The table for a notebook."""

        def line(tag: str, cells: Sequence[str]) -> str:
            side = ["left" if i in self.text else "right" for i in range(len(cells))]
            shown = [f'<{tag} style="text-align:{a}">{html.escape(_clean(c))}</{tag}>' for a, c in zip(side, cells)]
            return f"<tr>{''.join(shown)}</tr>"

        title, caption = html.escape(self.title), html.escape(self.caption)
        rows = "".join(line("td", row) for row in self.rows)
        return f"<table><caption>{title}</caption>{line('th', self.heads)}{rows}</table><p>{caption}</p>"

    def _widths(self, rows: Sequence[Sequence[str]], width: int | None) -> list[int] | None:
        """Columns of each column; None when even wrapped cells do not fit into `width`."""
        columns = [[row[i] for row in rows if i < len(row)] for i in range(len(self.heads))]
        natural = [max(map(_wide, (head, *cells))) for head, cells in zip(self.heads, columns)]
        room = None if width is None else width - len(GAP) * (len(natural) - 1)
        if room is None or sum(natural) <= room:
            return natural
        # what is compared stays on one line: names in the first column, and numbers
        least = [
            max(_longest(head), min(16, natural[i]), *map(_longest, cells))
            if i and i in self.text
            else max(map(_wide, (max(head.split(), key=_wide, default=""), *cells)))
            for i, (head, cells) in enumerate(zip(self.heads, columns))
        ]
        spare = room - sum(least)
        if spare < 0:
            return None
        order = sorted(range(len(natural)), key=lambda i: natural[i] - least[i])
        for place, i in enumerate(order):
            given = min(natural[i] - least[i], spare // (len(order) - place))
            least[i] += given
            spare -= given
        return least

    def _line(self, cells: Sequence[str], widths: Sequence[int], colour: bool) -> list[str]:
        parts = [_wrapped(cell, wide) for cell, wide in zip(cells, widths)]
        lines = []
        for number in range(max(map(len, parts))):
            shown = []
            for i, (cell, part, wide) in enumerate(zip(cells, parts, widths)):
                text = part[number] if number < len(part) else ""
                blank = " " * (wide - _wide(text))
                text = _paint(text, getattr(cell, "colour", ""), colour)
                shown.append(text + blank if i in self.text else blank + text)
            lines.append(GAP.join(shown).rstrip())
        return lines

    def _blocks(self, rows: Sequence[Sequence[str]], width: int, colour: bool) -> list[str]:
        lines = []
        for row in rows:
            lines.append(_paint(row[0], "bold", colour))
            for head, cell in zip(self.heads[1:], row[1:]):
                if cell:
                    first, *rest = _wrapped(f"{head}: {cell}", width - 4) or [""]
                    painted = [_paint(text, getattr(cell, "colour", ""), colour) for text in (first, *rest)]
                    lines += [f"  {painted[0]}", *(f"    {text}" for text in painted[1:])]
        return lines


class Shown:
    """A result that shows itself: as its tables, or as the text of its own repr; in notebooks too."""

    def tables(self) -> Sequence[TextTable]:
        """The numbers with their intervals."""
        return ()

    def __repr__(self) -> str:
        return "\n".join(line for table in self.tables() for line in table.lines())

    def _repr_html_(self) -> str:
        tables = self.tables()
        return html_page(tables, "" if tables else repr(self))


def say(text: str, file: TextIO | None = None, *, colour: str = "") -> None:
    """One line, never wrapped here; its characters as they are, except those that would steer the terminal."""
    file = sys.stdout if file is None else file
    print("\n".join(_paint(_clean(line), colour, _coloured(file)) for line in text.split("\n")), file=file, flush=True)


def compact(value: float) -> str:
    """A number in three digits: "0.05", "12", "1.5k", "40M"."""
    if value == 0:
        return "0"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit * 0.9995:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def rate(value: float) -> str:
    """A measured rate with three digits: "2.41", "48.6", "2,910"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(0, digits)}f}"


def file_size(size: float) -> str:
    """1_500_000 -> '1.5 MB' (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def duration(seconds: float) -> str:
    """ "48 s", "3 min 20 s", "5 h 12 min"; "" for no time at all."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds > 0 else ""
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def _coloured(file: TextIO) -> bool:
    return file.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _paint(text: str, colour: str, colours: bool) -> str:
    return f"\033[{_CODES[colour]}m{text}\033[0m" if colours and colour and text else text


def _bold(cell: str) -> str:
    return f"**{cell}**" if cell and getattr(cell, "colour", "") else cell


def _clean(text: str) -> str:
    """Without line breaks, control characters and passwords of URLs."""
    text = Coloured(without_secrets(text), text.colour) if isinstance(text, Coloured) else without_secrets(text)
    clean = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in text)
    return Coloured(clean, text.colour) if isinstance(text, Coloured) else clean


def _wide(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in unicodedata.normalize("NFC", text)
    )


def _longest(text: str) -> int:
    return max(map(_wide, text.split()), default=0)


def _wrapped(text: str, width: int) -> list[str]:
    if _wide(text) <= width:
        return [text]
    return textwrap.wrap(text, max(width, 1), break_long_words=False, break_on_hyphens=False)
