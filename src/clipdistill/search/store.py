"""The index on disk: a folder of the cache's blocks for each model, and what changes in it.

    INDEX/<first 16 digits of the model's fingerprint>/
        index.json                  model, list of parts, rows that are no longer valid, unreadable files, cost
        part-00000001.safetensors   vectors: (n, D) float32 of length 1; files: path, size, time of change and SHA-256
                                    of the n files, as JSON

A part is written first and index.json, which names it, is then replaced in one step: whatever kills the process, the
index is as it was at the last save, and parts it does not name are left-overs that the next update removes. Indexes of
version 0.1 (format 1: part-00000001.npy and .json) are read; the first update writes them in the present form.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipdistill.cache.blocks import Block, BlockFolder
from clipdistill.errors import InputError
from clipdistill.runtime.files import make_folder, read_json, remove_leftovers
from clipdistill.runtime.locks import FolderLock

FORMAT = 2
_MOST_PARTS = 16
_REMEDY = "what it held is encoded again by the next update"

Row = tuple[str, int, int, str]
"""Path, bytes, st_mtime in nanoseconds and SHA-256 (hex) of a file."""


@dataclass(frozen=True)
class IndexedFile:
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
    """Rows `first` and on; `name` is None for a part of format 1, which is never named again."""

    name: str | None
    stored: Block | np.ndarray
    files: list[Row]
    first: int

    @property
    def vectors(self) -> np.ndarray:
        return self.stored if isinstance(self.stored, np.ndarray) else self.stored.arrays["vectors"]


@dataclass
class SearchIndex:
    """The index of one model. Rows are numbered over all parts; a row that was dropped keeps its number until `save`
    puts parts together.

    folder: where its files lie; model: {"name", "fingerprint", "embed_dim"}; entries: by path;
    bad: path -> (size, modified, reason) of files that are no readable image; notices: damage that was found.
    """

    folder: Path
    model: dict[str, Any]
    entries: dict[str, IndexedFile] = field(default_factory=dict)
    bad: dict[str, tuple[int, int, str]] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    notices: list[str] = field(default_factory=list)
    _parts: list[_Part] = field(default_factory=list)
    _dropped: set[int] = field(default_factory=set)
    _next: int = 1

    def __post_init__(self) -> None:
        self.blocks = BlockFolder(self.folder, what="search index (--index)", remedy=_REMEDY, manifest="index.json")
        self._seen = self._stamp()

    @property
    def dimension(self) -> int:
        """Length of a vector."""
        return int(self.model["embed_dim"])

    @property
    def rows(self) -> int:
        """Number of rows, dropped ones included."""
        return sum(len(part.vectors) for part in self._parts)

    def vectors(self) -> list[np.ndarray]:
        """The vectors of all rows, part by part (memory-mapped: to be asked for anew at every use, not written to)."""
        return [part.vectors for part in self._parts]

    def vector(self, row: int) -> np.ndarray:
        """The vector (D,) of one row."""
        part = next(p for p in reversed(self._parts) if p.first <= row)
        return np.asarray(part.vectors[row - part.first])

    def living(self) -> tuple[np.ndarray, np.ndarray]:
        """(rows (n,), vectors (n, D)) of all files in the index, rising."""
        rows = np.array(sorted(entry.row for entry in self.entries.values()), dtype=np.int64)
        vectors = np.empty((len(rows), self.dimension), dtype=np.float32)
        for place, row in enumerate(rows.tolist()):
            vectors[place] = self.vector(row)
        return rows, vectors

    @property
    def old(self) -> bool:
        """Whether parts of format 1 are among its parts: it is written anew before anything is added."""
        return any(part.name is None for part in self._parts)

    def generation(self) -> str:
        """Changes whenever rows are added or dropped."""
        return f"{self._next}-{len(self._dropped)}-{len(self.entries)}"

    def add(self, files: Sequence[Row], vectors: np.ndarray) -> None:
        """Append rows (files, their vectors (n, D)) as a part on disk; older rows of the same files are dropped.

        Takes effect for readers with the next `save`. Raises InputError when the disk does not take it.
        """
        if not files:
            return
        name = f"part-{self._next:08d}"
        self._next += 1
        listed = torch.frombuffer(bytearray(json.dumps(files).encode()), dtype=torch.uint8)  # ASCII keeps any name
        tensors = {"vectors": torch.from_numpy(np.array(vectors, dtype=np.float32)), "files": listed}
        self.blocks.write(name, tensors, self._metadata())
        self._attach(name, self.blocks.read(name), list(files))

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
        if compact and (self.old or len(self._parts) > _MOST_PARTS or 4 * len(self._dropped) > self.rows):
            vectors = self.living()[1]
            entries = sorted(self.entries.values(), key=lambda entry: entry.row)
            files = [(e.path, e.size, e.modified, e.sha256) for e in entries]
            self._parts, self._dropped, self.entries = [], set(), {}
            self.add(files, vectors)
        dropped = {
            str(part.name): [n for n in range(len(part.files)) if part.first + n in self._dropped]
            for part in self._parts
        }
        document = {
            "format": FORMAT,
            "model": self.model,
            "photographs": len(self.entries),
            "parts": list(dropped),
            "dropped": {name: rows for name, rows in dropped.items() if rows},
            "bad": [[path, *facts] for path, facts in sorted(self.bad.items())],
            "cost": {"files": self.cost.files, "seconds": round(self.cost.seconds, 3), "device": self.cost.device},
            "next": self._next,
        }
        self.blocks.describe(document)
        self._seen = self._stamp()

    def lock(self) -> FolderLock:
        """Only one process updates an index at a time: entering raises InputError when another one does."""
        folder = make_folder(self.folder, "search index (--index)")
        return FolderLock(folder / "update.lock", f"{folder}: another process is updating this index")

    def refresh(self) -> None:
        """Take in what another process has saved since this was opened. For the one that holds the index's lock."""
        if self._stamp() != self._seen:
            self.__dict__.update(open_index(self.folder.parent, self.model).__dict__)
        if self.old:
            self.save(compact=True)
        self.remove_leftovers()

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = self.blocks.manifest.stat()
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def remove_leftovers(self) -> None:
        """Delete files of parts that the saved index does not name (of a killed process, or before compaction)."""
        known = {part.name for part in self._parts}
        for path in self.folder.glob("part-*"):
            if path.suffix != ".safetensors" or path.stem not in known:
                path.unlink(missing_ok=True)
        (self.folder / "lock").unlink(missing_ok=True)  # of version 0.1
        remove_leftovers(self.folder)

    def _metadata(self) -> dict[str, str]:
        return {"model": str(self.model["fingerprint"])}

    def _attach(self, name: str | None, vectors: Block | np.ndarray, files: list[Row]) -> None:
        part = _Part(name, vectors, files, self.rows)
        self._parts.append(part)
        for row, (path, size, modified, sha256) in enumerate(files, part.first):
            if row in self._dropped:
                continue
            before = self.entries.get(path)
            if before is not None:
                self._dropped.add(before.row)
            self.bad.pop(path, None)
            self.entries[path] = IndexedFile(path, size, modified, sha256, row)

    def _fill(self, document: dict[str, Any]) -> None:
        """Take in what index.json says; damaged parts are left out with a notice."""
        if document["format"] not in (1, FORMAT) or document["model"]["fingerprint"] != self.model["fingerprint"]:
            raise ValueError(f"format {document['format']!r}, model {document['model']!r:.100}")
        cost = document["cost"]
        self.cost = Cost(int(cost["files"]), float(cost["seconds"]), str(cost["device"]))
        self._next = int(document["next"])
        self.bad = {_below(path): (int(size), int(time), str(why)) for path, size, time, why in document["bad"]}
        for name in document["parts"]:
            if not _number(name):
                raise ValueError(f"{name!r} is no part")
            rows = [int(row) for row in document["dropped"].get(name, [])]
            try:
                vectors, files = (self._read if document["format"] == FORMAT else self._read_old)(name)
            except InputError as error:
                self._note(error)
                continue
            self._dropped |= {self.rows + row for row in rows if 0 <= row < len(files)}
            self._attach(name if document["format"] == FORMAT else None, vectors, files)

    def _read(self, name: str) -> tuple[Block, list[Row]]:
        block = self.blocks.read(name, self._metadata(), check=Block.verify)
        vectors, listed = block.arrays.get("vectors"), block.arrays.get("files")
        if vectors is None or listed is None:
            raise InputError(f"{block.path}: damaged block (it holds {', '.join(block.arrays)}): {_REMEDY}")
        return block, self._checked(block.path, vectors, listed.tobytes())

    def _read_old(self, name: str) -> tuple[np.ndarray, list[Row]]:
        path = self.folder / f"{name}.npy"
        columns = read_json(path.with_suffix(".json"), _REMEDY)
        try:
            vectors = np.load(path, allow_pickle=False)
            lists = [columns[column] for column in ("paths", "sizes", "modified", "hashes")]
            files = json.dumps(list(zip(*lists, strict=True))).encode()
        except FileNotFoundError as error:
            raise InputError(f"{path}: missing: {_REMEDY}") from error
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: damaged ({' '.join(str(error).split())[:200]}): {_REMEDY}") from error
        return vectors, self._checked(path, vectors, files)

    def _checked(self, path: Path, vectors: np.ndarray, listed: bytes) -> list[Row]:
        """A part's files, which must fit its vectors and lie below the folder."""
        try:
            files = [(_below(p), int(size), int(time), str(sha256)) for p, size, time, sha256 in json.loads(listed)]
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            raise InputError(f"{path}: damaged (its list of files: {error}): {_REMEDY}") from error
        if vectors.shape != (len(files), self.dimension) or vectors.dtype != np.float32:
            raise InputError(
                f"{path}: damaged (vectors of shape {vectors.shape} for {len(files)} files, {self.dimension} wide): "
                f"{_REMEDY}"
            )
        return files

    def _note(self, error: InputError) -> None:
        """Remember damage; what cannot be read at the moment is no damage and stops the command."""
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error
        self.notices.append(str(error))


def open_index(index: Path, model: dict[str, Any]) -> SearchIndex:
    """The index of `model` ({"name", "fingerprint", "embed_dim"}) in the folder `index`; empty when there is none.

    A damaged part is left out with a notice: its files count as new and are encoded again. Raises InputError for an
    index of a newer format or of another model with the same sixteen digits.
    """
    folder = index / str(model["fingerprint"])[:16]
    found = SearchIndex(folder, dict(model))
    fresh = SearchIndex(folder, dict(model), notices=found.notices)
    fresh._next = 1 + max((_number(path.stem) for path in folder.glob("part-*")), default=0)
    if not found.blocks.manifest.exists():
        return fresh
    try:
        document = found.blocks.description()
    except InputError as error:
        found._note(error)
        return fresh
    number, stored = document.get("format"), document.get("model")
    if type(number) is int and number > FORMAT:
        raise InputError(f"{folder}: an index of format {number}, this version reads {FORMAT}: delete it")
    if isinstance(stored, dict) and stored.get("fingerprint", model["fingerprint"]) != model["fingerprint"]:
        raise InputError(f"{folder}: the index of another model: delete it, or name another place with --index")
    try:
        found._fill(document)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        found.notices.append(f"{found.blocks.manifest}: damaged ({error!r}): {_REMEDY}")
        return fresh
    return found


def _below(path: Any) -> str:
    """A stored path, which can only mean a file below the folder: an index may come with a folder from elsewhere."""
    if not isinstance(path, str) or not path or "\0" in path or path.startswith("/") or ".." in path.split("/"):
        raise ValueError(f"{path!r} is not the name of a file below the folder")
    return path


def _number(name: Any) -> int:
    """The number of a part, 0 for what is no name of one."""
    digits = name.removeprefix("part-") if isinstance(name, str) and name.startswith("part-") else ""
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 12 else 0
