"""The nearest vectors: exactly, by a product taken block by block, or approximately with faiss or usearch."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from clipdistill.errors import InputError, nearest, needing
from clipdistill.runtime.files import new_file
from clipdistill.search import KINDS
from clipdistill.search.store import SearchIndex

_BLOCK = 1 << 16
"""Rows multiplied at a time: 128 MiB of vectors of 512 numbers."""


class Finder(ABC):
    """Finds rows of an index by inner product of unit vectors (the cosine)."""

    kind: str

    @abstractmethod
    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, scores) of the nearest `top` (fewer when there are not so many), best first. query: (D,), length 1."""


class ExactFinder(Finder):
    """All scores are computed; memory is that of one block. Equal scores are ordered by row."""

    kind = "exact"

    def __init__(self, stored: SearchIndex) -> None:
        self._vectors = stored.vectors
        self._living = np.zeros(stored.rows, dtype=bool)
        self._living[[entry.row for entry in stored.entries.values()]] = True
        self._whole = bool(self._living.all())

    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        best_rows, best_scores = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
        first = 0
        for vectors in self._vectors():
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


class GraphFinder(Finder):
    """A graph index of another library, kept in a file beside the vectors and made again when they change."""

    def __init__(self, stored: SearchIndex) -> None:
        self._load_library()
        path = stored.folder / f"{self.kind}-{stored.generation()}.bin"
        if path.is_file():
            try:
                self._graph = self._read(str(path), stored.dimension)
                return
            except Exception:  # a damaged file, whatever the library raises for it: build again
                path.unlink(missing_ok=True)
        self._graph = self._build(*stored.living())
        try:
            with new_file(path) as temporary:
                self._write(str(temporary))
            for old in set(stored.folder.glob(f"{self.kind}-*.bin")) - {path}:
                old.unlink(missing_ok=True)
        except (OSError, RuntimeError):
            stored.notices.append(f"{path} cannot be written: the {self.kind} index is built again at every start")

    @abstractmethod
    def _load_library(self) -> None: ...

    @abstractmethod
    def _build(self, rows: np.ndarray, vectors: np.ndarray) -> Any: ...

    @abstractmethod
    def _read(self, path: str, dimension: int) -> Any: ...

    @abstractmethod
    def _write(self, path: str) -> None: ...


class FaissFinder(GraphFinder):
    """faiss's graph index (HNSW, 32 neighbours)."""

    kind = "faiss"

    def _load_library(self) -> None:
        with needing("faiss-cpu", "search", "--index-kind faiss"):
            import faiss
        self._faiss: Any = faiss

    def _build(self, rows: np.ndarray, vectors: np.ndarray) -> Any:
        graph = self._faiss.IndexHNSWFlat(vectors.shape[1], 32, self._faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 200
        index = self._faiss.IndexIDMap(graph)
        index.add_with_ids(vectors, rows)
        return index

    def _read(self, path: str, dimension: int) -> Any:
        return self._faiss.read_index(path)

    def _write(self, path: str) -> None:
        self._faiss.write_index(self._graph, path)

    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        settings = self._faiss.SearchParametersHNSW(efSearch=max(128, 2 * top))
        scores, rows = self._graph.search(query[None], top, params=settings)
        found = rows[0] >= 0
        return rows[0][found], scores[0][found]


class UsearchFinder(GraphFinder):
    """usearch's graph index."""

    kind = "usearch"

    def _load_library(self) -> None:
        with needing("usearch", "search", "--index-kind usearch"):
            from usearch.index import Index
        self._empty = functools.partial(Index, metric="ip", dtype="f32", expansion_add=200, expansion_search=128)

    def _build(self, rows: np.ndarray, vectors: np.ndarray) -> Any:
        index = self._empty(ndim=vectors.shape[1])
        index.add(rows, vectors)
        return index

    def _read(self, path: str, dimension: int) -> Any:
        index = self._empty(ndim=dimension)
        index.load(path)
        return index

    def _write(self, path: str) -> None:
        self._graph.save(path)

    def search(self, query: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        found = self._graph.search(query, top)
        return np.asarray(found.keys, dtype=np.int64), 1 - np.asarray(found.distances, dtype=np.float32)


FINDERS: dict[str, type[Finder]] = dict(zip(KINDS, (ExactFinder, FaissFinder, UsearchFinder), strict=True))


def make_finder(kind: str, stored: SearchIndex) -> Finder:
    """A finder over the present rows of an index. Raises InputError for an unknown kind or a missing package."""
    if kind not in FINDERS:
        raise InputError(f"unknown kind of index '{kind}'{nearest(kind, FINDERS)}")
    return FINDERS[kind](stored)  # type: ignore[call-arg]


def recall(finder: Finder, stored: SearchIndex, top: int = 10, queries: int = 100) -> float:
    """Share of the exact nearest `top` that `finder` returns; queries are photographs spread over the index."""
    exact = ExactFinder(stored)
    rows = sorted(entry.row for entry in stored.entries.values())
    hits = total = 0
    for row in rows[:: max(1, len(rows) // queries)][:queries]:
        wanted = set(exact.search(stored.vector(row), top)[0].tolist())
        hits += len(wanted & set(finder.search(stored.vector(row), top)[0].tolist()))
        total += len(wanted)
    return hits / total if total else 1.0
