"""CSV and TSV tables: a row a caption, with the image's path (open_clip's columns `filepath`, `title`, or usual names).

A row that does not say clearly what its cells are is left out and listed with its line, never read as something else.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Iterator
from pathlib import Path

from clipdistill.data.files import IMAGE_SUFFIXES
from clipdistill.data.formats import Place
from clipdistill.data.formats.rows import Rows, find_columns
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError

_SEPARATORS = ("\t", ",", ";", "|")
_LONGEST_CELL = 131_072  # characters
_MOST_CHARACTERS = 1 << 24  # in a cell that is read at all, to say how long it is


def open_table(place: Place, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a table in the order in which images first appear. A column `split`, if there is one, names splits.

    Relative paths start from image_root, the table's folder or one below it, or the current folder. A blank caption
    (also 'nan', as pandas writes it) is an error unless missing_captions is 'skip'.
    """
    path = place.path
    encoding = "utf-16" if place.head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            first = file.readline(1 << 20)
        separator = _separator(first, path, config)
        header = [cell.strip() for cell in _cells(first, separator, path)]
        pictures, title = find_columns(config, header, path)
        image, caption = header.index(pictures), None if title is None else header.index(title)
        split = header.index("split") if "split" in header else None
        rows = Rows(path, config)
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file, _long_cells():
            for line, cells in _records(file, separator, path, image, rows):
                fault = _fault(cells, len(header), separator)
                if fault:
                    rows.problems.add(fault, f"line {line}", dropped=True)
                elif cells:  # else a blank line
                    rows.add(
                        cells[image] if image < len(cells) else None,
                        [cells[caption] if caption is not None and caption < len(cells) else None],
                        cells[split] if split is not None and split < len(cells) else None,
                        f"line {line}",
                    )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not readable as {encoding} text ({error})") from error
    return rows.source(default_split, has_splits=split is not None)


def _separator(first: str, path: Path, config: DataConfig) -> str:
    """The declared separator, else the one that gives the header both columns, else the one that gives it most."""
    if config.separator is not None:
        separator = {"\\t": "\t", "tab": "\t"}.get(config.separator, config.separator)
        if len(separator) != 1 or separator in '"\r\n':
            raise InputError(f"separator {config.separator!r} is not one character (write \\t for a tab)")
        return separator
    wanted = {config.image_column, config.caption_column or config.image_column}
    found = {option: [cell.strip() for cell in _cells(first, option, path)] for option in _SEPARATORS}
    for option, header in found.items():
        if wanted <= set(header):
            return option
    return max(_SEPARATORS, key=lambda option: len(found[option]))


def _cells(line: str, separator: str, path: Path) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error as error:
        raise InputError(f"{path}: line 1 is not the header of a table ({error})") from error


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Within, the library reads longer cells than it otherwise does, so that one of them costs its own row only."""
    before = csv.field_size_limit(_MOST_CHARACTERS)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _fault(cells: list[str], columns: int, separator: str) -> str | None:
    """Why a row cannot be taken as it is; None for a good one."""
    if any(cell.strip() for cell in cells[columns:]):
        return f"more cells than columns: {len(cells)} for {columns}, quote a cell that holds {separator!r}"
    for cell in cells:
        if len(cell) > _LONGEST_CELL:
            return f"over-long cell: {len(cell)} characters, at most {_LONGEST_CELL} are read"
        start = cell.lstrip()
        if start.startswith('"') and start != cell:
            return "blank before a quotation mark: the cell would be read with its quotation marks"
        if '\\"' in cell:
            return "backslash before a quotation mark: double a quotation mark inside a cell"
    return None


def _records(
    file: Iterator[str], separator: str, path: Path, image: int, rows: Rows
) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row after the header; rows with quotation marks in the wrong place are counted.

    Raises InputError where a quotation mark swallows rows.
    """
    reader = csv.reader(file, delimiter=separator, strict=True)
    line, number = 0, 0
    while True:
        begin = line + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            line = max(reader.line_num, begin)
            if "unexpected end of data" in str(error) and line > begin:
                raise InputError(
                    f"{path}: a quotation mark on line {begin} is never closed and swallows the rows up to "
                    f"line {line}: double it or remove it"
                ) from error
            if "field larger" in str(error):
                raise InputError(
                    f"{path}: a cell that begins on line {begin} has more than {_MOST_CHARACTERS} characters: look for "
                    "a stray quotation mark, or shorten it"
                ) from error
            for lost in range(begin, line + 1):
                rows.problems.add(f"stray quotation mark: {error}", f"line {lost}", dropped=True)
            number += 1
            continue
        line = reader.line_num
        number += 1
        if number == 1:
            continue
        for cell in cells:
            if "\n" in cell and _holds_rows(cell, separator, image):
                raise InputError(
                    f"{path}: a quotation mark on line {begin} is closed only on line {line} and swallows the rows "
                    "between: double it or remove it"
                )
        yield begin, cells


def _holds_rows(cell: str, separator: str, image: int) -> bool:
    """Whether a cell of several lines contains lines that look like rows: an image file where its column would be."""
    for text in cell.splitlines()[1:]:
        cells = text.split(separator)
        if 1 < len(cells) > image and os.path.splitext(cells[image].strip())[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
            return True
    return False
