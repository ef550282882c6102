"""Rows of a table gathered into images with captions: rows of the same path are one image with several captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipdistill.data.captions import MISSING, clean_all, is_missing
from clipdistill.data.files import choose_splits, collect, find_image_root, nothing_usable
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError, nearest

WITHOUT_IMAGE = "row without image"
_NAMED = 5  # rows listed in the error about missing captions


class Rows:
    """Collects rows in their order: with the image's path by `add`, with an image in a cell by `add_cell`."""

    def __init__(self, where: Path, config: DataConfig) -> None:
        self.where = where
        self.config = config
        self.problems = Problems()
        self.splits: Counter[str] = Counter()
        self._entries: dict[tuple[str, str], list[str]] = {}
        self._cells: list[tuple[str, str, list[str], tuple[int, ...]]] = []
        self._missing: list[str] = []
        self._missing_count = 0

    def add(self, path: object, captions: object, split: object, place: str) -> None:
        """One row with the path of its image; `place` says where it is ('line 7')."""
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            self.problems.add(WITHOUT_IMAGE, place, dropped=True)
            return
        path, label = path.strip(), _label(split)
        texts = self._usable(captions, path, place)
        if (label, path) not in self._entries:
            self._entries[label, path] = []
            self.splits[label] += 1
        self._entries[label, path].extend(texts)

    def add_cell(self, key: str, captions: object, split: object, place: str, at: tuple[int, ...]) -> None:
        """One row with its image inside the table; `at` is where the cell is, for the source that reads it."""
        label = _label(split)
        self._cells.append((key, label, self._usable(captions, key, place), at))
        self.splits[label] += 1

    def _usable(self, captions: object, key: str, place: str) -> list[str]:
        """The captions (one or a list) that are not missing, cleaned; the others are counted, for the error too."""
        if self.config.caption_column is None:
            return []
        values = captions if isinstance(captions, list | tuple) else [captions]
        present = [value for value in values if not is_missing(value)]
        gone = len(values) - len(present) or (0 if values else 1)
        if gone:
            self._missing_count += gone
            if len(self._missing) < _NAMED:
                self._missing.append(f"{place} ('{key}')")
            self.problems.add(MISSING, key, times=gone)
        return clean_all(present, key, self.problems)

    def _chosen(self, default_split: str | None, has_splits: bool) -> tuple[set[str] | None, str]:
        if self._missing_count and self.config.missing_captions == "error":
            more = ", ..." if self._missing_count > len(self._missing) else ""
            raise InputError(
                f"{self.where}: {self._missing_count} rows have no caption: {', '.join(self._missing)}{more}; fill "
                "them in, or leave them out with missing_captions=skip"
            )
        counts = self.splits if has_splits else Counter[str]()
        return choose_splits(self.config.split, default_split, counts, str(self.where), self.problems)

    def source(self, default_split: str | None, has_splits: bool) -> PairSource:
        """The pairs of the chosen split, with image files. Raises InputError when there are none."""
        chosen, label = self._chosen(default_split, has_splits)
        merged: dict[str, list[str]] = {}
        for (split, path), captions in self._entries.items():
            if chosen is None or split in chosen:
                merged.setdefault(path, []).extend(captions)
        if not merged:
            raise nothing_usable(self.where, self.problems, "no rows with an image")
        root = find_image_root(merged, self.config.image_root, self.where)
        name = f"{self.where.stem}{label}"
        bare = self.config.caption_column is None
        return collect(name, merged.items(), root, self.problems, self.config.max_pixels, self.where, bare=bare)

    def cells(
        self, default_split: str | None, has_splits: bool
    ) -> tuple[str, list[str], list[list[str]], list[tuple[int, ...]]]:
        """(label, keys, captions, places) of the usable rows of the chosen split. InputError when there are none."""
        chosen, label = self._chosen(default_split, has_splits)
        kept = []
        for cell in self._cells:
            if chosen is None or cell[1] in chosen:
                if cell[2] or self.config.caption_column is None:
                    kept.append(cell)
                else:
                    self.problems.add("image without caption", cell[0], dropped=True)
        if not kept:
            raise nothing_usable(self.where, self.problems)
        return label, [cell[0] for cell in kept], [cell[2] for cell in kept], [cell[3] for cell in kept]


def required_column(name: str, columns: Sequence[str], setting: str, where: Path | str) -> str:
    """`name` if the table has it. Raises InputError with the nearest column and the setting to change."""
    if columns.count(name) > 1:
        raise InputError(f"{where}: {columns.count(name)} columns are called '{name}': rename one, or set {setting}")
    if name in columns:
        return name
    known = ", ".join(columns[:20])
    hint = nearest(name, columns) if columns else ""
    hint = hint if "did you mean" in hint else ""
    raise InputError(f"{where}: no column '{name}'{hint}; it has: {known}; set {setting}")


def _label(split: object) -> str:
    """The name of a row's split, '' for none."""
    return "" if is_missing(split) else str(split).strip()


_USUAL = {
    "image_column": ("image", "jpg", "image_bytes", "img", "png", "image_path", "path", "file_name", "filename"),
    "caption_column": ("caption", "captions", "text", "txt", "sentences", "title"),
}


def find_columns(config: DataConfig, columns: Sequence[str], where: Path | str) -> tuple[str, str | None]:
    """The columns of images and captions: as configured, or where that is left open, the one with a usual name."""
    found: list[Any] = []
    for setting, usual in _USUAL.items():
        name: Any = getattr(config, setting)
        if name == DataConfig.model_fields[setting].default and name not in columns:
            fitting = [option for option in usual if option in columns]
            name = fitting[0] if len(fitting) == 1 else name
        found.append(None if name is None else required_column(name, columns, setting, where))
    return found[0], found[1]
