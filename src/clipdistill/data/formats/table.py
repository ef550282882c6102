"""CSV and TSV tables: one row a caption, with the image's path (by default open_clip's columns `filepath`, `title`)."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path

from clipdistill.data.files import IMAGE_SUFFIXES
from clipdistill.data.formats.rows import Rows, required_column
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.errors import InputError

_SEPARATORS = ("\t", ",", ";", "|")


def open_table(path: Path, config: DataConfig, default_split: str | None) -> PairSource:
    """The pairs of a table in the order in which images first appear. A column `split`, if there is one, names splits.

    Relative paths start from image_root, the table's folder or one below it, or the current folder. A blank caption
    (also 'nan', as pandas writes it) is an error unless missing_captions is 'skip'.
    """
    encoding = _encoding(path)
    try:
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            first = file.readline(1 << 20)
        separator = _separator(first, path, config)
        header = [cell.strip() for cell in _cells(first, separator, path)]
        image = header.index(required_column(config.image_column, header, "image_column", path))
        caption = header.index(required_column(config.caption_column, header, "caption_column", path))
        split = header.index("split") if "split" in header else None
        rows = Rows(path, config)
        with path.open(encoding=encoding, errors="surrogateescape", newline="") as file:
            for line, cells in _records(csv.reader(file, delimiter=separator), path, image):
                if not cells:
                    continue  # a blank line
                rows.add(
                    cells[image] if image < len(cells) else None,
                    [cells[caption] if caption < len(cells) else None],
                    cells[split] if split is not None and split < len(cells) else None,
                    f"line {line}",
                )
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeError as error:
        raise InputError(f"{path}: not readable as {encoding} text ({error})") from error
    return rows.source(default_split, has_splits=split is not None)


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    return "utf-16" if start in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _separator(first: str, path: Path, config: DataConfig) -> str:
    """The declared separator, else the one that gives the header both columns, else the one that gives it most."""
    if config.separator is not None:
        separator = {"\\t": "\t", "tab": "\t"}.get(config.separator, config.separator)
        if len(separator) != 1 or separator in '"\r\n':
            raise InputError(f"separator {config.separator!r} is not one character (write \\t for a tab)")
        return separator
    wanted = {config.image_column, config.caption_column}
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


def _records(reader: Iterator[list[str]], path: Path, image: int) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row after the header. Raises InputError where a quotation mark swallows rows."""
    line = 0
    try:
        for number, cells in enumerate(reader):
            begin, line = line + 1, reader.line_num  # type: ignore[attr-defined]
            if number == 0:
                continue
            for cell in cells:
                if "\n" in cell and _holds_rows(cell, reader.dialect.delimiter, image):  # type: ignore[attr-defined]
                    raise InputError(
                        f"{path}: a quotation mark on line {begin} is closed only on line {line} and swallows the rows "
                        "between: double it or remove it"
                    )
            yield begin, cells
    except csv.Error as error:
        raise InputError(
            f"{path}: not readable as a table after line {line} ({error}): look for a stray quotation mark"
        ) from error


def _holds_rows(cell: str, separator: str, image: int) -> bool:
    """Whether a cell of several lines contains lines that look like rows: an image file where its column would be."""
    for text in cell.splitlines()[1:]:
        cells = text.split(separator)
        if 1 < len(cells) > image and os.path.splitext(cells[image].strip())[1].lower() in IMAGE_SUFFIXES:  # noqa: PTH122
            return True
    return False
