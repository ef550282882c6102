"""Image files on disk: finding the folder they lie in, reading them without being caught by what is no file."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from clipdistill.data.pairs import IndexedPairs, Strings
from clipdistill.data.problems import BadSample, Problems
from clipdistill.errors import InputError, nearest
from clipdistill.runtime.files import decoded, is_inside, once

LARGEST_FILE = 1 << 29
"""Bytes; a larger image file is refused rather than read."""

MISSING_FILE = "missing image file"
PICTURES = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("jfif", "jpe", "ppm", "pgm", "pbm", "pnm", "apng", "dib"),
)
"""Endings of images, in the order of preference where a sample of an archive has several."""
IMAGE_SUFFIXES = frozenset(f".{kind}" for kind in PICTURES)
_UNREAD = (
    "heic heif hif jxl jxr wdp jp2 j2k jpx jpf j2c svg psd eps tga ico exr hdr pcx mpo avifs dng raw cr2 cr3 crw nef "
    "nrw arw srf sr2 orf raf rw2 pef srw 3fr erf iiq kdc mrw x3f"
)
UNREAD_SUFFIXES = frozenset(f".{kind}" for kind in _UNREAD.split())
"""Photographs and drawings of formats that are not read: counted where a data set is opened, never passed over."""
UNREAD = "image format that is not read"
_PROBES = 50  # names tried in each candidate folder


def data_path(name: str, pattern: Path | None = None) -> Path:
    """The path that a user's name of a file or folder means; for a URL what clipdistill.remote has instead, with the
    same methods. pattern: what the name was made from. Raises InputError for what can be none."""
    if "\0" in name:
        raise InputError(f"{name!r} is not the name of a file: it holds a null character")
    if is_remote(name):
        return importlib.import_module("clipdistill.remote").remote_path(name, pattern)
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # the home folder of a user that does not exist
        raise InputError(f"'{name}' is not the name of a file ({error})") from error


def is_remote(name: str) -> bool:
    """Whether a name means something on another machine."""
    return re.match(r"(?:[a-z][a-z0-9+.-]*://|pipe:)", name, re.IGNORECASE) is not None


def is_url(path: object) -> bool:
    """Whether `path` is one of clipdistill.remote, on another machine."""
    return not isinstance(path, str | Path)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder; False for names that no file system takes."""
    try:
        return path.exists()
    except InputError:  # what is wrong with a URL
        raise
    except (OSError, ValueError):
        return False


def to_read(path: Path) -> Any:
    """What libraries read a file by: its path, or an open file that reads by ranges."""
    return path.open("rb") if is_url(path) else path


def walk(folder: Path, onerror: Any = None) -> Iterator[tuple[PurePath, list[str], list[str]]]:
    """As os.walk, sorted, with each folder relative to the first."""
    if is_url(folder):
        yield from folder.walk()  # type: ignore[attr-defined]
        return
    for current, folders, files in os.walk(folder, onerror=onerror):
        folders.sort()
        yield Path(current).relative_to(folder), folders, sorted(files)


def read_ahead(source: Any, indices: Sequence[int]) -> None:
    """Say which pictures of a source are read next, in this order: those on other machines are fetched meanwhile."""
    if (remote := sys.modules.get("clipdistill.remote.path")) is not None:  # loaded where a URL was named
        remote.read_ahead(source, indices)


def read_image_file(path: str | Path) -> bytes:
    """The bytes of a regular file. Raises BadSample for all that cannot be read whole; pipes never block."""
    if is_url(path):
        return path.read_bytes()  # type: ignore[union-attr]
    try:
        # O_NONBLOCK: opening a named pipe would wait for a writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise BadSample(MISSING_FILE) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise BadSample(f"unreadable image file: {getattr(error, 'strerror', None) or error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("unreadable image file: not a regular file")
        if status.st_size > LARGEST_FILE:
            raise BadSample(f"unreadable image file: {status.st_size} bytes, at most {LARGEST_FILE} are read")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise BadSample(f"unreadable image file: {error.strerror or error}") from error
    finally:
        os.close(descriptor)


def list_images(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """(paths of the photographs below `folder`, relative to it, sorted, those of formats that are not read as well;
    (path, reason) of what was passed over: hidden images, linked folders, folders that cannot be listed).

    What macOS puts into archives beside the files (__MACOSX, ._name) is nothing.
    """
    found: list[str] = []
    passed: list[tuple[str, str]] = []

    def unlisted(error: OSError) -> None:
        passed.append((os.path.relpath(error.filename, folder), f"folder that cannot be listed: {error.strerror}"))

    for here, folders, files in walk(folder, unlisted):
        folders[:] = [name for name in folders if name != "__MACOSX"]
        for name in folders:
            link = folder / here / name
            if link.is_symlink() and not is_inside(folder, link / "x"):  # else what lies in it is listed where it is
                passed.append(((here / name).as_posix(), "link to a folder"))
        hidden = any(part.startswith(".") for part in here.parts)
        for name in files:
            if _is_image(name) and not name.startswith("._"):
                path = (here / name).as_posix()
                if hidden or name.startswith("."):
                    passed.append((path, "hidden image"))
                else:
                    found.append(path)
    return sorted(found), sorted(passed)


def _is_image(name: str) -> bool:
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122
    return ending in IMAGE_SUFFIXES or ending in UNREAD_SUFFIXES


def unread_ending(name: str) -> str | None:
    """'.heic' for the name of an image of a format that is not read; None for any other name."""
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122
    return ending if ending in UNREAD_SUFFIXES else None


class FilePairs(IndexedPairs):
    """Pairs whose images are files below `root`; `paths` are relative to it (or absolute, in tables)."""

    def __init__(
        self,
        name: str,
        root: Path,
        paths: Sequence[str],
        captions: Sequence[Sequence[str]],
        problems: Problems,
        max_pixels: int,
        keys: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, paths if keys is None else keys, captions, problems, max_pixels)
        self._root = str(root)
        self._elsewhere: Any = root if is_url(root) else None
        raw = Strings.pack(paths)
        # the same memory where the keys are the paths, as they are unless a name is not UTF-8
        self._paths = self._keys if np.array_equal(raw.buffer, self._keys.buffer) else raw

    def path(self, i: int) -> str:
        """Where the image of sample i lies."""
        return os.path.join(self._root, self._paths[i])  # noqa: PTH118 - a Path costs more than the rest of this call

    def image_bytes(self, i: int) -> bytes:
        return read_image_file(self.path(i) if self._elsewhere is None else self._elsewhere / self._paths[i])


def find_image_root(names: Iterable[str], declared: str | None, beside: Path) -> Path:
    """The folder that relative image `names` start from.

    A declared folder is taken; otherwise the folder of the description file, its sub-folders (two levels) and the
    current folder are tried with the first names, and the one that holds most of them is taken.
    """
    probes = [name for name, _ in zip(names, range(_PROBES))]
    if declared is not None:
        root = data_path(declared)
        if not root.is_dir():
            raise InputError(f"image_root '{declared}' is not a folder")
        if not any(_exists(root, name) for name in probes):
            raise InputError(
                f"image_root '{declared}' holds none of the first {len(probes)} images ('{probes[0]}', ...)"
            )
        return root
    best, most = None, 0
    for root in _candidates(beside):
        hits = sum(_exists(root, name) for name in probes)
        if hits > most:
            best, most = root, hits
        if most == len(probes):
            break
    if best is None:
        raise InputError(
            f"the images of '{beside.name}' are not found ('{probes[0]}' is neither in '{beside.parent}' nor in a "
            "folder below it): say where they are with image_root"
        )
    return best


def _candidates(beside: Path) -> Iterable[Path]:
    folder = beside.parent
    yield folder
    above = [folder, folder.parent]  # COCO keeps annotations/ beside train2017/
    for parent in above:
        first = _folders(parent)
        yield from first
        if parent == folder:
            for child in first:
                yield from _folders(child)
    yield folder.parent
    yield Path()


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(entry for entry in parent.iterdir() if entry.is_dir())[:200]
    except OSError:
        return []


def _exists(root: Path, name: str) -> bool:
    try:
        return (root / name).is_file()
    except (OSError, ValueError):
        return False


def safe_relative(name: object) -> str | None:
    """`name` as a relative path that stays below its folder, or None: a description file may come from anywhere."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return str(path)


def _present(root: Path, names: Sequence[str]) -> set[str]:
    """Those of `names` that are there: one listing a folder rather than one question a file."""
    if is_url(root):
        return root.presence(names)  # type: ignore[attr-defined, no-any-return]
    places = {name: os.path.split(os.path.join(root, name)) for name in names}  # noqa: PTH118
    listed: dict[str, set[str]] = {folder: set() for folder, _ in places.values()}
    for folder in listed:
        with contextlib.suppress(OSError, ValueError):
            listed[folder] = set(os.listdir(folder or "."))  # noqa: PTH208
    return {name for name, (folder, file) in places.items() if file in listed[folder]}


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError that says where it stops being JSON."""
    try:
        return json.loads(decoded(path.read_bytes()), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise InputError(f"{path}: nested too deeply to be read") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error


def collect(
    name: str,
    entries: Iterable[tuple[str, list[str]]],
    root: Path,
    problems: Problems,
    max_pixels: int,
    where: Path | str,
    bare: bool = False,
) -> FilePairs:
    """FilePairs of the (image path, captions) whose file exists and that have a caption; the rest is counted.

    bare: pictures without captions are meant.

    Raises InputError when nothing is left.
    """
    entries = list(entries)
    present = _present(root, [path for path, _ in entries])
    paths: list[str] = []
    captions: list[list[str]] = []
    for path, texts in entries:
        if not texts and not bare:
            problems.add("image without caption", path, dropped=True)
        elif unread_ending(path):
            problems.add(f"{UNREAD}: {unread_ending(path)}", path, dropped=True)
        elif path not in present:
            problems.add(MISSING_FILE, path, dropped=True)
        else:
            paths.append(path)
            captions.append(texts)
    if not paths:
        raise nothing_usable(where, problems)
    return FilePairs(name, root, paths, captions, problems, max_pixels)


def choose_splits(
    asked: str | None, default: str | None, counts: Mapping[str, int], where: str, problems: Problems | None = None
) -> tuple[set[str] | None, str]:
    """The chosen splits (None: everything) and a label for the source's name ('/train', '').

    counts: images by split, those of none under ''; where splits are chosen, `problems` counts those.

    asked: 'train', 'train+restval' or 'all'. Nothing asked: the only split, else `default` if the data has it, else an
    InputError that lists what there is. Asking for a split of data without splits is an error too.
    """
    none = counts.get("", 0)
    known = ", ".join(f"{name or 'without a split'} ({n})" for name, n in counts.items())
    counts = {name: n for name, n in counts.items() if name}
    if asked is None:
        if len(counts) + bool(none) <= 1:
            return None, "".join(f"/{name}" for name in counts)
        if default is None or default not in counts:
            raise InputError(
                f"{where} holds several splits: {known}; name one, for example split='{next(iter(counts))}'"
            )
        asked = default
    if asked == "all":
        return None, ""
    if not counts:
        raise InputError(f"{where} has no splits, so split='{asked}' cannot be chosen: leave the split out")
    chosen = {part.strip() for part in asked.split("+")}
    for name in sorted(chosen):
        if name not in counts:
            hint = nearest(name, counts)
            hint = hint if "did you mean" in hint else ""
            raise InputError(f"{where} has no split '{name}'{hint}; it holds {known}")
    if none and problems is not None:
        problems.add("image without a split", where, times=none)
    return chosen, f"/{asked}"


def settings_of_name(query: str, known: Sequence[str], name: str) -> dict[str, str]:
    """The settings behind the question mark of a set's name, each once. Raises InputError, naming the set."""
    found: dict[str, str] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in known:
            raise InputError(f"'{name}': unknown setting '{key}'{nearest(key, known)}")
        if key in found or not value:
            raise InputError(f"'{name}': the setting '{key}' {'stands twice' if key in found else 'has no value'}")
        found[key] = value
    return found


def one_split(asked: str | None, named: str | None, where: str) -> str | None:
    """The split that was asked for, or that the set's name ends in. Raises InputError where these are two."""
    if asked and named and asked != named:
        raise InputError(f"'{where}' names the split '{named}', and split='{asked}' is given too: leave one out")
    return asked or named or None


def refuse_split(split: str | None, where: Path | str) -> None:
    """Raise InputError for a split asked of data that have none."""
    if split not in (None, "all"):
        raise InputError(f"{where} has no splits: leave split='{split}' out")


def nothing_usable(where: Path | str, problems: Problems, what: str = "no usable image-caption pair") -> InputError:
    """The error for a set in which nothing is left, with what was found."""
    found = problems.summary()
    return InputError(f"{where}: {what}" + (f" ({found})" if found else ""))


_MOST_SHARDS = 1_000_000
_RANGE = re.compile(r"(\d+)\.\.(\d+)$")


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with '{000..331}' and '{a,b}' stands for, in order. InputError for a senseless range."""
    names = list(itertools.islice(_expanded(pattern, pattern), _MOST_SHARDS + 1))
    if len(names) > _MOST_SHARDS:
        raise InputError(f"'{pattern}' names more than {_MOST_SHARDS} shards")
    return names


def _expanded(part: str, pattern: str) -> Iterator[str]:
    before, brace, rest = part.partition("{")
    if not brace:
        yield part
        return
    depth, cuts = 1, [-1]
    for position, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0 or (depth == 1 and character == ","):
            cuts.append(position)
        if depth == 0:
            break
    else:
        raise InputError(f"'{pattern}': a brace is opened and never closed")
    options = [rest[a + 1 : b] for a, b in itertools.pairwise(cuts)]
    after = rest[cuts[-1] + 1 :]
    interval = _RANGE.match(options[0])
    names: Iterator[str]
    if len(options) == 1 and interval:
        names = _numbers(interval[1], interval[2], pattern)
    elif len(options) > 1:
        names = (name for option in options for name in _expanded(option, pattern))
    else:
        body = options[0]
        raise InputError(
            f"'{pattern}': {{{body}}} is neither a range like {{00000..00331}} nor a list like {{a,b}} of shards"
        )
    for name in names:
        yield from (f"{before}{name}{end}" for end in _expanded(after, pattern))


def _numbers(first: str, last: str, pattern: str) -> Iterator[str]:
    low, high = int(first), int(last)
    if high < low or high - low >= _MOST_SHARDS:
        raise InputError(f"'{pattern}': the range {{{first}..{last}}} names no shards or far too many")
    width = len(first) if first.startswith("0") or len(first) == len(last) else 0
    return (str(number).zfill(width) for number in range(low, high + 1))
