"""The term cluster: by hand, against its definition, refusals, and through a projection."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from clipdistill.bank.cluster import clusters
from clipdistill.bank.divergence import Bank
from clipdistill.errors import InputError, MissingExtraError
from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import random_bank, random_embeddings, unit


def test_four_pictures_in_two_clusters_by_hand() -> None:
    """Centres (1, 0) and (0, 1), tau 0.5: a student at (0.8, 0.6) of the first has -log(e^1.6 / (e^1.6 + e^1.2))."""
    pytest.importorskip("faiss")
    pictures = unit(torch.tensor([[1, 0.1], [1, -0.1], [0.1, 1], [-0.1, 1]], dtype=torch.float64))
    bank = Bank(pictures, pictures, torch.ones(4, dtype=torch.int64), torch.tensor([0, 3]))
    student = torch.tensor([[0.8, 0.6], [0.6, -0.8]], dtype=torch.float64, requires_grad=True)
    ours = Embeddings(student, pictures[[0, 3]], torch.tensor(1.0).double())
    theirs = Embeddings(pictures[[0, 3]], pictures[[0, 3]], 1.0, bank=bank)
    objective = Objective({"cluster": 1}, 2, 2, cluster_count=2, cluster_temperature=0.5)
    # the second picture is of the cluster (0, 1): logits 1.2 and -1.6
    expected = (torch.tensor(1 + 2.718281828459045**-0.4).log() + torch.tensor(1 + 2.718281828459045**2.8).log()) / 2
    output = objective(ours, theirs)
    assert objective(ours, replace(theirs, bank=replace(bank))).total == output.total  # found once, looked up again
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(output.total, student)
    # of the unit row: (softmax - own) C / (tau N), less its part along the row
    slope = torch.tensor([1 / (1 + 2.718281828459045**0.4)]).double()
    raw = torch.cat([-slope, slope])
    along = raw - (raw @ student.detach()[0]) * student.detach()[0]
    torch.testing.assert_close(gradient[0], along, rtol=1e-5, atol=1e-7)


def test_centres_are_the_unit_means_of_their_own_rows() -> None:
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(0)
    rows = unit(torch.randn(200, 6, generator=generator))
    centres, labels = clusters(rows, 7)
    assert sorted(set(labels.tolist())) == list(range(7))
    assert torch.equal(labels, (rows @ centres.T).argmax(1))
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(7))
    means = unit(torch.stack([rows[labels == k].mean(0) for k in range(7)]))
    assert float((means * centres).sum(1).min()) > 0.99
    again = clusters(rows, 7)
    assert torch.equal(again[0], centres)


def test_the_projection_learns_and_the_texts_do_not() -> None:
    pytest.importorskip("faiss")
    student, teacher = random_embeddings(6, 4, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"cluster": 1}, 4, 5, cluster_count=3).double()
    output = objective(student, replace(teacher, bank=random_bank(6, 5, 3)))
    assert objective.image_projection is not None
    assert float(torch.autograd.grad(output.total, objective.image_projection.weight, retain_graph=True)[0].norm()) > 0
    assert torch.autograd.grad(output.total, student.text, allow_unused=True) == (None,)


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"cluster": 1}, 5, 5)
    with pytest.raises(InputError, match=r"'cluster' compares .*`clipdistill cache`"):
        objective(student, teacher)
    with pytest.raises(InputError, match=r"train\.bank_samples=null"):
        objective(student, replace(teacher, bank=replace(random_bank(6, 5, 3), shared=4)))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingExtraError, match=r"the term 'cluster' \(k-means\).*faiss-cpu.*clipdistill\[search\]"):
        objective(student, replace(teacher, bank=random_bank(6, 5, 3)))
