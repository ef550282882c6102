"""The index on disk: vectors in .npy files, everything else in JSON, one folder for each model.

    INDEX/<first 16 digits of the model's fingerprint>/
        index.json           model, list of parts, rows that are no longer valid, unreadable files, cost of encoding
        part-00000001.npy    (n, D) float32 vectors of length 1
        part-00000001.json   path, size, time of change and SHA-256 of the n files

A part is written first and index.json, which names it, is then replaced in one step: whatever kills the process, the
index is as it was at the last save, and files it does not name are left-overs that the next update removes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError

FORMAT = 1
HIDDEN = ".clipdistill-search"
"""Name of the index inside the folder of photographs."""
_MOST_PARTS = 16
_COLUMNS = ("paths", "sizes", "modified", "hashes")


@dataclass(frozen=True)
class Entry:
    """One indexed file: path, bytes, st_mtime in nanoseconds, SHA-256 of its content (hex), row of its vector."""

    path: str
    size: int
    modified: int
    sha256: str
    row: int


@dataclass
class Cost:
    """What encoding took so far: files encoded, and seconds of the whole (reading and decoding included)."""

    files: int = 0
    seconds: float = 0.0
    device: str = ""

    @property
    def rate(self) -> float:
        """Files a second; 0 when nothing was encoded."""
        return self.files / self.seconds if self.seconds > 0 else 0.0


@dataclass
class _Part:
    name: str
    vectors: np.ndarray
    columns: dict[str, list[Any]]
    first: int


@dataclass
class Store:
    """The index of one model. Rows are numbered over all parts; a row that was dropped keeps its number until `save`
    puts parts together.

    folder: where its files lie; model: {"name", "fingerprint", "embed_dim"}; entries: by path;
    bad: path -> (size, modified, reason) of files that are no readable image.
    """

    folder: Path
    model: dict[str, Any]
    entries: dict[str, Entry] = field(default_factory=dict)
    bad: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    notices: list[str] = field(default_factory=list)
    _parts: list[_Part] = field(default_factory=list)
    _dropped: set[int] = field(default_factory=set)
    _next: int = 1

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model["embed_dim"])

    @property
    def rows(self) -> int:
        """Number of rows, dropped ones included."""
        return sum(len(part.vectors) for part in self._parts)

    def blocks(self) -> list[np.ndarray]:
        """The vectors of all rows, part by part (memory-mapped; do not write to them)."""
        return [part.vectors for part in self._parts]

    def vector(self, row: int) -> np.ndarray:
        """The vector (D,) of one row."""
        part = next(p for p in reversed(self._parts) if p.first <= row)
        return np.asarray(part.vectors[row - part.first])

    def generation(self) -> str:
        """Changes whenever rows are added or dropped."""
        return f"{self._next}-{len(self._dropped)}-{len(self.entries)}"

    def add(self, files: Sequence[tuple[str, int, int, str]], vectors: np.ndarray) -> None:
        """Append rows ((path, size, modified, sha256), vectors (n, D)) as a part on disk; older rows are dropped.

        Takes effect for readers with the next `save`. Raises InputError when the disk does not take it.
        """
        if not files:
            return
        columns = dict(zip(_COLUMNS, (list(column) for column in zip(*files, strict=True)), strict=True))
        name = f"part-{self._next:08d}"
        self._next += 1
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"{name}.npy").open("wb") as file:
                np.save(file, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            _write_json(self.folder / f"{name}.json", columns)
        self._attach(_Part(name, np.load(self.folder / f"{name}.npy", mmap_mode="r"), columns, self.rows))

    def drop(self, path: str) -> None:
        """Forget a file; nothing happens when it is unknown."""
        entry = self.entries.pop(path, None)
        if entry is not None:
            self._dropped.add(entry.row)
        self.bad.pop(path, None)

    def save(self, *, compact: bool = False) -> None:
        """Make the present state the one that readers see.

        compact: many or half-empty parts are first put together, which gives the rows new numbers.
        """
        if compact and (len(self._parts) > _MOST_PARTS or 4 * len(self._dropped) > self.rows):
            self._compact()
        document = {
            "format": FORMAT,
            "model": self.model,
            "photographs": len(self.entries),
            "parts": [part.name for part in self._parts],
            "dropped": {part.name: rows for part in self._parts if (rows := self._dropped_of(part))},
            "bad": [[path, *facts] for path, facts in sorted(self.bad.items())],
            "cost": {"files": self.cost.files, "seconds": round(self.cost.seconds, 3), "device": self.cost.device},
            "next": self._next,
        }
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write_json(self.folder / "index.json", document)

    def _dropped_of(self, part: _Part) -> list[int]:
        """The dropped rows of a part, counted from its first row."""
        return [row - part.first for row in sorted(self._dropped) if 0 <= row - part.first < len(part.vectors)]

    def remove_leftovers(self) -> None:
        """Delete files of parts that the saved index does not name (of a killed process, or before compaction)."""
        known = {part.name for part in self._parts}
        for path in self.folder.glob("part-*"):
            if path.name.partition(".")[0] not in known:
                path.unlink(missing_ok=True)

    def _attach(self, part: _Part) -> None:
        self._parts.append(part)
        for i, (path, size, modified, sha256) in enumerate(zip(*(part.columns[c] for c in _COLUMNS), strict=True)):
            row = part.first + i
            if row in self._dropped:
                continue
            before = self.entries.get(path)
            if before is not None:
                self._dropped.add(before.row)
            self.bad.pop(path, None)
            self.entries[path] = Entry(path, size, modified, sha256, row)

    def _compact(self) -> None:
        """All living rows in one part, in the order of their paths."""
        living = sorted(self.entries.values(), key=lambda entry: entry.path)
        vectors = np.empty((len(living), self.dimension), dtype=np.float32)
        for place, entry in enumerate(living):
            vectors[place] = self.vector(entry.row)
        self._parts, self._dropped, self.entries = [], set(), {}
        self.add([(e.path, e.size, e.modified, e.sha256) for e in living], vectors)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.folder}: the index cannot be written ({error.strerror or error}): "
                "make room, or name another place with --index"
            ) from error


def store_folder(index: Path, fingerprint: str) -> Path:
    """Where the store of a model lies in an index."""
    return index / fingerprint[:16]


def open_store(index: Path, model: dict[str, Any]) -> Store:
    """The store of `model` ({"name", "fingerprint", "embed_dim"}) in the folder `index`; empty when there is none.

    A damaged part is left out with a notice: its files count as new and are encoded again. Raises InputError for an
    index of a newer format or of another model with the same sixteen digits.
    """
    folder = store_folder(index, str(model["fingerprint"]))
    store = Store(folder, dict(model))
    document = _read_json(folder / "index.json", store.notices)
    if document is None:
        store._next = 1 + max((_number(path.name) for path in folder.glob("part-*.npy")), default=0)
        return store
    if document.get("format") != FORMAT:
        raise InputError(
            f"{folder}: an index of format {document.get('format')}, this version reads {FORMAT}: delete it"
        )
    stored = document.get("model")
    if not isinstance(stored, dict) or stored.get("fingerprint") != model["fingerprint"]:
        raise InputError(f"{folder}: the index of another model: delete it, or name another place with --index")
    try:
        _fill(store, document)
    except (KeyError, TypeError, ValueError) as error:
        store.notices.append(f"{folder}/index.json is damaged ({error}): everything is encoded again")
        store = Store(folder, dict(model), notices=store.notices)
        store._next = 1 + max((_number(path.name) for path in folder.glob("part-*.npy")), default=0)
    return store


def _fill(store: Store, document: dict[str, Any]) -> None:
    dropped = document["dropped"]
    cost = document["cost"]
    store.cost = Cost(int(cost["files"]), float(cost["seconds"]), str(cost["device"]))
    store._next = int(document["next"])
    for name in document["parts"]:
        found = _read_part(store, str(name))
        if found is None:
            store.notices.append(f"{store.folder / str(name)} is damaged: its photographs are encoded again")
            continue
        store._dropped |= {store.rows + int(row) for row in dropped.get(name, [])}
        store._attach(_Part(str(name), *found, store.rows))
    store.bad = {str(path): (int(size), int(time), str(why)) for path, size, time, why in document["bad"]}


def _read_part(store: Store, name: str) -> tuple[np.ndarray, dict[str, list[Any]]] | None:
    """(vectors, columns) of a part, None when it is damaged."""
    if "/" in name or not name.startswith("part-"):
        return None
    columns = _read_json(store.folder / f"{name}.json", [])
    try:
        vectors = np.load(store.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if columns is None or vectors.ndim != 2 or vectors.shape[1] != store.dimension or vectors.dtype != np.float32:
        return None
    lists = [columns.get(c) for c in _COLUMNS]
    if not all(isinstance(c, list) and len(c) == len(vectors) for c in lists):
        return None
    return (vectors, columns) if all(map(_stays_below, columns["paths"])) else None


def _stays_below(path: Any) -> bool:
    """Whether a stored path can only mean a file below the folder: an index may come with a folder from elsewhere."""
    return isinstance(path, str) and path != "" and "\0" not in path and not path.startswith("/") and (
        ".." not in path.split("/")
    )  # fmt: skip


def _number(name: str) -> int:
    digits = name.removeprefix("part-").partition(".")[0]
    return int(digits) if digits.isdecimal() else 0


def _read_json(path: Path, notices: list[str]) -> dict[str, Any] | None:
    """The object in a file; None when there is none, or (with a notice) when it is not JSON."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError:
        found = None
    if not isinstance(found, dict):
        notices.append(f"{path} is damaged: everything is encoded again")
        return None
    return found


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="ascii") as file:
        json.dump(value, file)  # ASCII: names that are no UTF-8 survive as escaped surrogates
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Only one process updates an index at a time; InputError when another one does. Released when a process dies."""
    try:
        import fcntl
    except ImportError:  # Windows: two updates at once are the user's to avoid
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise InputError(
            f"{folder}: the index cannot be written ({error.strerror or error}): name another place with --index"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{folder}: another process is updating this index; wait for it, or search with --no-update"
            ) from error
        yield
    finally:
        os.close(descriptor)
