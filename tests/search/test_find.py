"""The nearest rows, exact and approximate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clipdistill.errors import InputError
from clipdistill.search import find
from clipdistill.search.find import ExactFinder, make_finder, recall
from clipdistill.search.store import SearchIndex, open_index


def filled(folder: Path, count: int = 300, dimension: int = 16, drop: int = 0) -> SearchIndex:
    """A store of random unit vectors in three parts, `drop` of them dropped."""
    store = open_index(folder, {"name": "m", "fingerprint": "ab" * 32, "embed_dim": dimension})
    vectors = np.random.default_rng(0).normal(size=(count, dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[7] = vectors[200] = vectors[3]  # equal scores
    for part in np.array_split(np.arange(count), 3):
        store.add([(f"{i}.png", 1, 1, f"{i}") for i in part], vectors[part])
    for i in range(drop):
        store.drop(f"{3 * i}.png")
    store.save()
    return store


@pytest.mark.parametrize("drop", [0, 40])
@pytest.mark.parametrize("block", [1 << 16, 7])
def test_exact_search_is_a_full_sort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: int, block: int) -> None:
    monkeypatch.setattr(find, "_BLOCK", block)
    store = filled(tmp_path, drop=drop)
    everything = np.concatenate(store.vectors())
    living = np.array(sorted(entry.row for entry in store.entries.values()))
    for top in (1, 10, 400):
        for query in everything[[3, 50]]:
            rows, scores = ExactFinder(store).search(query, top)
            wanted = everything[living] @ query
            order = np.lexsort((living, -wanted))[:top]
            np.testing.assert_allclose(scores, wanted[order], rtol=1e-5, atol=1e-6)
            assert len(set(rows.tolist())) == len(rows) == min(top, len(living))
            assert set(rows.tolist()) <= set(living.tolist())
            np.testing.assert_allclose(everything[rows] @ query, scores, rtol=1e-5, atol=1e-6)
            if drop == 0:
                assert rows[:3].tolist() == [3, 7, 200][:top] or query is not everything[3]


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_approximate_search_finds_nearly_all_and_is_kept(tmp_path: Path, kind: str) -> None:
    pytest.importorskip(kind)
    store = filled(tmp_path, 600, drop=30)
    finder = make_finder(kind, store)
    assert recall(finder, store) > 0.95
    rows, scores = finder.search(store.vector(100), 5)
    assert rows[0] == 100
    assert scores[0] == pytest.approx(1, abs=1e-5)
    assert (np.diff(scores) <= 0).all()
    assert not {3 * i for i in range(30)} & set(finder.search(store.vector(100), 600)[0].tolist())
    (file,) = store.folder.glob(f"{kind}-*.bin")
    before = file.stat().st_mtime_ns
    assert recall(make_finder(kind, store), store) > 0.95
    assert file.stat().st_mtime_ns == before
    file.write_bytes(b"broken")
    assert recall(make_finder(kind, store), store) > 0.95
    store.drop("100.png")
    assert 100 not in make_finder(kind, store).search(store.vector(100), 5)[0]
    assert len(list(store.folder.glob(f"{kind}-*.bin"))) == 1


@pytest.mark.parametrize("kind", ["faiss", "usearch"])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name.split(".")[0] == kind:
            raise ImportError(name)
        return real(name, *rest, **more)  # type: ignore[arg-type]

    store = filled(tmp_path)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"clipdistill\[search\]"):
        make_finder(kind, store)


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'faiss'"):
        make_finder("fais", filled(tmp_path))
