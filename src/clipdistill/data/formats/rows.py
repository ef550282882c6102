"""Rows of a table gathered into images with captions: rows of the same path are one image with several captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from clipdistill.data.captions import MISSING, clean_all, is_missing
from clipdistill.data.files import choose_splits, collect, find_image_root
from clipdistill.data.pairs import DataConfig, PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError, nearest

_NAMED = 5  # rows listed in the error about missing captions


class Rows:
    """Collects (image path, captions, split) row by row, in order, then becomes a source."""

    def __init__(self, where: Path, config: DataConfig) -> None:
        self.where = where
        self.config = config
        self.problems = Problems()
        self.splits: Counter[str] = Counter()
        self._entries: dict[tuple[str, str], list[str]] = {}
        self._missing: list[str] = []
        self._missing_count = 0

    def add(self, path: object, captions: Iterable[object], split: object, place: str) -> None:
        """One row; `place` says where it is ('line 7')."""
        if not isinstance(path, str) or not path.strip() or "\0" in path:
            self.problems.add("row without image", place, dropped=True)
            return
        path = path.strip()
        label = "" if split is None else str(split)
        values = self.present(captions, path, place)
        if (label, path) not in self._entries:
            self._entries[label, path] = []
            self.splits[label] += 1
        self._entries[label, path].extend(clean_all(values, path, self.problems))

    def present(self, captions: Iterable[object], key: str, place: str) -> list[object]:
        """The captions that are not missing; the others are counted, and remembered for the error."""
        values = list(captions)
        present = [value for value in values if not is_missing(value)]
        gone = len(values) - len(present) or (0 if values else 1)
        if gone:
            self._missing_count += gone
            if len(self._missing) < _NAMED:
                self._missing.append(f"{place} ('{key}')")
            self.problems.add(MISSING, key, times=gone)
        return present

    def refuse_missing(self) -> None:
        """Raise InputError if captions are missing and the configuration does not allow it."""
        if self._missing_count and self.config.missing_captions == "error":
            more = ", ..." if self._missing_count > len(self._missing) else ""
            raise InputError(
                f"{self.where}: {self._missing_count} rows have no caption: {', '.join(self._missing)}{more}; fill "
                "them in, or leave them out with missing_captions=skip"
            )

    def source(self, default_split: str | None, has_splits: bool) -> PairSource:
        """The pairs of the chosen split. Raises InputError when there are none."""
        self.refuse_missing()
        counts = self.splits if has_splits else Counter[str]()
        chosen, label = choose_splits(self.config.split, default_split, counts, str(self.where))
        merged: dict[str, list[str]] = {}
        for (split, path), captions in self._entries.items():
            if chosen is None or split in chosen:
                merged.setdefault(path, []).extend(captions)
        if not merged:
            found = self.problems.summary()
            raise InputError(f"{self.where}: no rows with an image" + (f" ({found})" if found else ""))
        root = find_image_root(merged, self.config.image_root, self.where)
        name = f"{self.where.stem}{label}"
        return collect(name, merged.items(), root, self.problems, self.config.max_pixels, self.where)


def required_column(name: str, columns: Sequence[str], setting: str, where: Path | str) -> str:
    """`name` if the table has it. Raises InputError with the nearest column and the setting to change."""
    if name in columns:
        return name
    known = ", ".join(columns[:20])
    hint = nearest(name, columns) if columns else ""
    hint = hint if "did you mean" in hint else ""
    raise InputError(f"{where}: no column '{name}'{hint}; it has: {known}; set {setting}")


def guessed_column(
    name: str, default: str, usual: Sequence[str], columns: Sequence[str], setting: str, where: str
) -> str:
    """`name`; where that is only the default and the table lacks it, the one column among the `usual` names it has."""
    if name == default and name not in columns:
        fitting = [option for option in usual if option in columns]
        if len(fitting) == 1:
            return fitting[0]
    return required_column(name, columns, setting, where)


IMAGE_NAMES = ("image", "jpg", "image_bytes", "img", "png", "image_path", "path", "file_name", "filename")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "sentences", "title")
