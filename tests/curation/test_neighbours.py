"""Groups of neighbours: the graph against plain products, epochs that see every sample once, and ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipdistill.curation import neighbours
from clipdistill.curation.neighbours import GroupedSampler, grouped_order, nearest


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_the_graph_is_that_of_all_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_PART", 7)
    table = rows(40)
    expected = (table @ table.T).fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :5]
    assert np.array_equal(nearest(table, 5), expected.numpy())
    assert nearest(table[:3], 9).shape == (3, 2)


def test_a_large_set_takes_the_approximate_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("usearch")
    monkeypatch.setattr(neighbours, "EXACT", 10)
    table = torch.cat([rows(200), rows(200)[:5]])  # with doubles
    found = nearest(table, 6)
    assert found.shape == (205, 6)
    assert not (found == np.arange(205)[:, None]).any()
    exact = (table @ table.T).fill_diagonal_(-2).topk(6).indices.numpy()
    assert np.mean([len(set(a) & set(b)) / 6 for a, b in zip(found, exact, strict=True)]) > 0.95


def test_groups_by_hand() -> None:
    """In the order 2, 0, 1, 3: 2 takes 0 (nearest), 1 takes 3; the shuffle puts the second group first."""
    near = np.array([[2, 1], [0, 3], [0, 1], [1, 0]])
    assert grouped_order(np.array([2, 0, 1, 3]), near, 2, np.array([1, 3, 0, 2])).tolist() == [1, 3, 2, 0]
    assert grouped_order(np.array([2, 0, 1, 3]), near, 3, np.array([0, 1, 2, 3])).tolist() == [2, 0, 1, 3]


@pytest.mark.parametrize("size", [2, 3, 16])
@pytest.mark.parametrize("count", [5, 64, 101])
def test_an_epoch_sees_every_sample_once_and_ranks_share_it(count: int, size: int) -> None:
    near = nearest(rows(count), 8 * size)
    for epoch in range(3):
        assert sorted(GroupedSampler(near, size, count, 4, 7).order(epoch).tolist()) == list(range(count))
    one = GroupedSampler(near, size, count, 4, 7)
    two = [GroupedSampler(near, size, count, 4, 7, rank, 2) for rank in range(2)]
    for step in range(2 * one.steps_per_epoch):
        assert one.indices(step).tolist() == [*two[0].indices(step).tolist(), *two[1].indices(step).tolist()]
    assert one.order(0).tolist() != one.order(1).tolist()


def test_groups_are_nearer_than_chance() -> None:
    table = rows(300)
    order = GroupedSampler(nearest(table, 32), 4, 300, 20, 0).order(0)
    within = (table[order[:-1]] * table[order[1:]]).sum(1).mean()
    assert float(within) > 0.4
