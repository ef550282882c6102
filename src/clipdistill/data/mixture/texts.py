"""Texts without pictures: a file of one a line, or parallel sentences in columns (TSV, no header)."""

from __future__ import annotations

import os
from collections import Counter

from clipdistill.data.captions import clean_all
from clipdistill.data.files import IMAGE_SUFFIXES, nothing_usable, refuse_split
from clipdistill.data.formats import Place
from clipdistill.data.pairs import DataConfig, IndexedPairs
from clipdistill.data.problems import BadSample, Problems
from clipdistill.runtime.files import text_lines

SUFFIXES = (".txt", ".tsv")


class Texts(IndexedPairs):
    """One text a sample, in several languages where `parallel`: the first is the one that a teacher reads."""

    pictured = False

    def image_bytes(self, i: int) -> bytes:
        raise BadSample("a text without a picture", self.key(i))


def open_texts(config: DataConfig) -> Texts | None:
    """The texts of a .txt or .tsv file, keyed by their line; None for another file, or one that names pictures.

    A line of a .tsv holds a sentence and its translations, one a column; a line with more cells than
    most is left out, a missing translation counted. Raises InputError for a file that is not
    UTF-8 or holds no text.
    """
    place = Place(config.path)
    path, tabs = place.path, place.path.suffix.lower() == ".tsv"
    if path.suffix.lower() not in SUFFIXES or not place.head.strip():
        return None
    rows = [line.split("\t") if tabs else [line] for line in text_lines(path)]
    columns = Counter(len(cells) for cells in rows if any(cell.strip() for cell in cells)).most_common(1)[0][0]
    if any(os.path.splitext(cell.strip())[1].lower() in IMAGE_SUFFIXES for row in rows[:2] for cell in row):  # noqa: PTH122
        return None
    refuse_split(config.split, path)
    problems, keys, captions = Problems(), list[str](), list[list[str]]()
    for number, cells in enumerate(rows, 1):
        if not any(cell.strip() for cell in cells):
            continue
        key = f"line {number}"
        if len(cells) > columns:  # a tab in a sentence: which cell is which language?
            problems.add(f"more cells than other lines: {len(cells)} for {columns}", key, dropped=True)
            continue
        if not cells[0].strip():
            problems.add("translation without its sentence", key, dropped=True)
            continue
        if len(cells) < columns or not all(cell.strip() for cell in cells):
            problems.add("missing translation", key)
        found = clean_all([cell for cell in cells if cell.strip()], key, problems)
        if found:
            keys.append(key)
            captions.append(found)
    if not keys:
        raise nothing_usable(path, problems, "no text")
    source = Texts(path.stem, keys, captions, problems, config.max_pixels)
    source.parallel = any(len(group) > 1 for group in captions)
    return source
