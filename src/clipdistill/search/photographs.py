"""The image files below a folder, as the index sees them: path, size and time of the last change."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from clipdistill.data.files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, read_image_file
from clipdistill.data.problems import BadSample
from clipdistill.errors import InputError
from clipdistill.runtime.files import is_inside


@dataclass(frozen=True)
class Photograph:
    """One file: path relative to the folder (with "/"), bytes, and st_mtime in nanoseconds."""

    path: str
    size: int
    modified: int


def scan(folder: Path) -> tuple[list[Photograph], list[tuple[str, str]]]:
    """(image files below `folder` sorted by path, (sub-folder, reason) of what could not be listed).

    Told apart by suffix; those in formats that are not decoded are among them. Hidden files and folders (a leading dot)
    are left out, links to folders are not followed, links to files only where they lead to a file in `folder`.
    Raises InputError when `folder` is not a folder.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    found: list[Photograph] = []
    problems: list[tuple[str, str]] = []
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(folder / below) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    path = f"{below}/{entry.name}" if below else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        if entry.name != "__MACOSX":
                            waiting.append(path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112 - a circle of links is none
                        if is_inside(folder, Path(entry.path, "x")):
                            continue  # what lies in it is listed where it is
                        problems.append((path, "is a link to a folder, which is not followed"))
                    elif _suffix(entry.name) in IMAGE_SUFFIXES | UNREAD_SUFFIXES:
                        if entry.is_symlink() and not is_inside(folder, Path(entry.path)):
                            problems.append((path, "is a link that leads out of the folder"))
                        elif not _add(entry, path, found):
                            problems.append((path, "is a link that leads nowhere, or no file"))
        except OSError as error:
            problems.append((below or ".", f"cannot be listed: {error.strerror or error}"))
    return sorted(found, key=lambda photograph: photograph.path), sorted(problems)


def _add(entry: os.DirEntry[str], path: str, found: list[Photograph]) -> bool:
    """False for what is there and no file."""
    try:
        if not entry.is_file():
            return not os.path.lexists(entry.path)
        status = entry.stat()
        found.append(Photograph(path, status.st_size, status.st_mtime_ns))
    except FileNotFoundError:
        pass  # gone between listing and looking
    except OSError:  # a circle of links
        return False
    return True


def read_photograph(path: Path) -> bytes:
    """The bytes of a photograph. Raises BadSample for a file that cannot be read, and for formats not decoded here."""
    suffix = _suffix(path.name)
    if suffix in UNREAD_SUFFIXES:
        raise BadSample(f"format not decoded: {suffix[1:].upper()}, make a JPEG, PNG or WebP of it")
    return read_image_file(path)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 - a Path costs more than the rest of a scan


def printable(path: str) -> str:
    """A file name that is safe to show: bytes that are no UTF-8 and control characters become a replacement mark."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
