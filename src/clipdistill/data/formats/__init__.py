"""The forms that data sets come in, one file each: an entry of `registry.FORMATS` or `registry.LABELLED_FORMATS`.

This file holds what all of them share: the name that was given with a look at what lies there, and what an entry is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from clipdistill.data.files import data_path, is_there, is_url, list_images, read_json, walk
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError

_COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip"})


class Place(str):
    """The name of a data set as it was given, with what a look at the disk shows; each look is taken once."""

    @cached_property
    def path(self) -> Path:
        """The path that the name would mean."""
        return data_path(self)

    @cached_property
    def there(self) -> bool:
        return is_there(self.path)

    @cached_property
    def is_folder(self) -> bool:
        return self.there and self.path.is_dir()

    @cached_property
    def files(self) -> list[Path]:
        """The files of a folder (not of those below), sorted, without hidden ones."""
        if not self.is_folder:
            return []
        try:
            entries = sorted(self.path.iterdir())
        except OSError as error:
            raise InputError(f"data '{self}' cannot be read ({error.strerror})") from error
        return [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]

    def with_ending(self, *endings: str) -> list[Path]:
        """The files of a folder that end in one of these."""
        return [file for file in self.files if file.suffix.lower() in endings]

    @cached_property
    def _listed(self) -> tuple[list[str], list[tuple[str, str]]]:
        return list_images(self.path) if self.is_folder else ([], [])

    @property
    def images(self) -> list[str]:
        """The photographs below a folder (see files.list_images)."""
        return self._listed[0]

    @property
    def unlisted(self) -> str | None:
        """A folder that cannot be listed, and why."""
        return next((f"'{path}' is a {reason}" for path, reason in self._listed[1] if "be listed" in reason), None)

    @cached_property
    def texts(self) -> dict[str, str]:
        """The text files below a folder: path without its ending -> path, '.txt' in any case; hidden ones left out."""
        found = {}
        for here, folders, files in walk(self.path):
            folders[:] = [name for name in folders if name != "__MACOSX" and not name.startswith(".")]
            for name in files:  # '.TXT' comes before '.txt', which is taken where there are both
                stem, ending = os.path.splitext(name)  # noqa: PTH122
                if ending.lower() == ".txt" and not name.startswith("."):
                    found[(here / stem).as_posix()] = (here / name).as_posix()
        return found

    def count_passed_over(self, problems: Problems) -> None:
        """Count what `images` leaves out: hidden ones, folders that are links or cannot be listed.

        They are no bad samples: a budget of those is not for what nobody meant to give.
        """
        for path, reason in self._listed[1]:
            problems.add(reason, path)

    def count_unread(self, problems: Problems, *endings: str) -> None:
        """Count what a folder of files with these endings holds of their kind and is not read: what is compressed, and
        what lies in the folders below (one level)."""
        for file in self.files:
            if file.suffix.lower() in _COMPRESSED and file.with_suffix("").suffix.lower() in endings:
                problems.add("compressed file beside the others", file.name)
        for folder in [] if is_url(self.path) or not self.is_folder else sorted(self.path.iterdir()):
            if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK) and Place(str(folder)).with_ending(*endings):
                problems.add("folder of such files beside them", folder.name)

    @cached_property
    def head(self) -> bytes:
        """The first 4096 bytes of a file; nothing for a folder, a pipe, or what is not there."""
        if not self.there or not self.path.is_file():
            return b""
        try:
            with self.path.open("rb") as file:
                return file.read(4096)
        except OSError as error:
            raise InputError(f"data '{self}' cannot be read ({error.strerror})") from error

    @cached_property
    def document(self) -> Any:
        """The content of a JSON file; None for another one. Raises InputError for JSON that is damaged."""
        if not self.head.strip():
            return None
        is_json = self.head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
        is_json &= self.path.suffix.lower() != ".jsonl"
        return read_json(self.path) if is_json or self.path.suffix.lower() == ".json" else None


@dataclass(frozen=True)
class Format:
    """One form that data sets come in.

    matches(place): whether the name, or what lies there, is of this form. open(place, config, default_split): its
    PairSource; for labelled sets open(place, config): its LabelledSource. settings: the fields of DataConfig that it
    uses beside those that all do (None: all of them); others are refused. surely(place), for labelled sets: whether a
    quick look tells it from image-caption pairs (default: as `matches`). parts(place, split): the splits that an
    evaluation measures one by one (languages). check(place): raises InputError for a known name that is not there.
    """

    matches: Callable[[Place], bool]
    open: Callable[..., Any]
    settings: frozenset[str] | None = frozenset()
    surely: Callable[[Place], bool] | None = None
    parts: Callable[[Place, str | None], list[str]] | None = None
    check: Callable[[Place], None] | None = None
