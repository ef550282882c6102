"""The nearest vectors: exactly, by a product taken block by block, or approximately with faiss or usearch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from clipdistill.errors import InputError, MissingExtraError, nearest
from clipdistill.search.store import Store

_BLOCK = 1 << 16
"""Rows multiplied at a time: 128 MiB of vectors of 512 numbers."""


class Finder(ABC):
    """Finds rows of a store by inner product of unit vectors (the cosine)."""

    kind: str

    @abstractmethod
    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scores) of the nearest `top` (fewer when there are not so many), best first. query: (D,), length 1."""


class ExactFinder(Finder):
    """All scores are computed; memory is that of one block. Equal scores are ordered by row."""

    kind = "exact"

    def __init__(self, store: Store) -> None:
        self._blocks = store.blocks()
        self._living = np.zeros(store.rows, dtype=bool)
        self._living[[entry.row for entry in store.entries.values()]] = True
        self._whole = bool(self._living.all())

    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        best_rows, best_scores = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        first = 0
        for vectors in self._blocks:
            for start in range(0, len(vectors), _BLOCK):
                block = vectors[start : start + _BLOCK]
                scores = block @ query
                rows = np.arange(first + start, first + start + len(block))
                if not self._whole:
                    living = self._living[rows]
                    rows, scores = rows[living], scores[living]
                if len(best_scores) >= top:  # most of a later block is worse than what is there
                    better = scores > best_scores[-1]
                    rows, scores = rows[better], scores[better]
                best_rows, best_scores = _best(
                    np.concatenate([best_rows, rows]), np.concatenate([best_scores, scores]), top
                )
            first += len(vectors)
        return best_rows, best_scores


def _best(rows: np.ndarray, scores: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    if len(scores) > 4 * top:
        edge = -np.partition(-scores, top - 1)[top - 1]
        kept = scores >= edge
        rows, scores = rows[kept], scores[kept]
    order = np.lexsort((rows, -scores))[:top]
    return rows[order], scores[order]


class FaissFinder(Finder):
    """faiss's graph index (HNSW, 32 neighbours), kept in a file beside the vectors."""

    kind = "faiss"

    def __init__(self, store: Store) -> None:
        try:
            import faiss
        except ImportError as error:
            raise MissingExtraError("faiss-cpu", "search", "--index-kind faiss") from error

        def build(rows: np.ndarray, vectors: np.ndarray) -> Any:
            graph: Any = faiss.IndexHNSWFlat(store.dimension, 32, faiss.METRIC_INNER_PRODUCT)
            graph.hnsw.efConstruction = 200
            index = faiss.IndexIDMap(graph)
            index.add_with_ids(vectors, rows)
            return index

        self._index = _kept(
            store, "faiss", build, lambda i, p: faiss.write_index(i, str(p)), lambda p: faiss.read_index(str(p))
        )
        self._faiss: Any = faiss

    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        settings = self._faiss.SearchParametersHNSW(efSearch=max(128, 2 * top))
        scores, rows = self._index.search(query[None], top, params=settings)
        found = rows[0] >= 0
        return rows[0][found], scores[0][found]


class UsearchFinder(Finder):
    """usearch's graph index, kept in a file beside the vectors."""

    kind = "usearch"

    def __init__(self, store: Store) -> None:
        try:
            from usearch.index import Index
        except ImportError as error:
            raise MissingExtraError("usearch", "search", "--index-kind usearch") from error

        def empty() -> Any:
            return Index(ndim=store.dimension, metric="ip", dtype="f32", expansion_add=200, expansion_search=128)

        def build(rows: np.ndarray, vectors: np.ndarray) -> Any:
            index = empty()
            index.add(rows, vectors)
            return index

        def read(path: Path) -> Any:
            index = empty()
            index.load(str(path))
            return index

        self._index = _kept(store, "usearch", build, lambda i, p: i.save(str(p)), read)

    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._index.search(query, top)
        return np.asarray(found.keys, dtype=np.int64), 1 - np.asarray(found.distances, dtype=np.float32)


FINDERS: dict[str, type[Finder]] = {"exact": ExactFinder, "faiss": FaissFinder, "usearch": UsearchFinder}


def make_finder(kind: str, store: Store) -> Finder:
    """A finder over the present rows of a store. Raises InputError for an unknown kind or a missing package."""
    if kind not in FINDERS:
        raise InputError(f"unknown kind of index '{kind}'{nearest(kind, FINDERS)}")
    return FINDERS[kind](store)  # type: ignore[call-arg]


def recall(finder: Finder, store: Store, top: int = 10, queries: int = 100) -> float:
    """Share of the exact nearest `top` that `finder` returns; queries are photographs spread over the index."""
    exact = ExactFinder(store)
    rows = sorted(entry.row for entry in store.entries.values())
    chosen = rows[:: max(1, len(rows) // queries)][:queries]
    hits = total = 0
    for row in chosen:
        wanted = set(exact.search(store.vector(row), top)[0].tolist())
        hits += len(wanted & set(finder.search(store.vector(row), top)[0].tolist()))
        total += len(wanted)
    return hits / total if total else 1.0


def _kept(
    store: Store,
    kind: str,
    build: Callable[[np.ndarray, np.ndarray], Any],
    write: Callable[[Any, Path], None],
    read: Callable[[Path], Any],
) -> Any:
    """The approximate index of the store's present rows: read from its file, else built and written."""
    path = store.folder / f"{kind}-{store.generation()}.bin"
    if path.is_file():
        try:
            return read(path)
        except Exception:  # a damaged file, whatever the library raises for it: build again
            path.unlink(missing_ok=True)
    rows = np.array(sorted(entry.row for entry in store.entries.values()), dtype=np.int64)
    vectors = np.empty((len(rows), store.dimension), dtype=np.float32)
    for place, row in enumerate(rows):
        vectors[place] = store.vector(int(row))
    index = build(rows, vectors)
    try:
        temporary = path.with_name(f"{path.name}.tmp")
        write(index, temporary)
        for old in store.folder.glob(f"{kind}-*.bin"):
            old.unlink(missing_ok=True)
        temporary.replace(path)
    except (OSError, RuntimeError):
        store.notices.append(f"{path} cannot be written: the {kind} index is built again at every start")
    return index
