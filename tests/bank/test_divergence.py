"""Divergences over a bank against a dense computation in float64: values, gradients, memory, samples."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from clipdistill.bank import divergence as module
from clipdistill.bank.divergence import Bank, divergence
from clipdistill.errors import InputError
from clipdistill.objective import Objective
from tests.objective.plain import random_bank, random_embeddings, softmax, unit


@pytest.fixture(params=[1, 1 << 20], ids=["many tiles", "one tile"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns in tiles of one, and all at once."""
    monkeypatch.setattr(module, "TILE_ELEMENTS", request.param)
    monkeypatch.setattr(module, "LEAST_COLUMNS", 1)


def visible(given: Bank, side: module.Columns) -> Tensor:
    """Which columns a row is compared with, written out."""
    rows = []
    for place in given.place.tolist():
        shared = len(given.image) if given.shared is None else given.shared
        rows.append([owner < shared or owner == place for owner in side.owner.tolist()])
    return torch.tensor(rows)


def dense(
    student: Tensor, target: Tensor, columns: Tensor, targets: Tensor, seen: Tensor, k: float, t: float
) -> Tensor:
    """KL of each row with whole matrices."""
    logits = (k * student @ columns.T).masked_fill(~seen, -math.inf)
    p = softmax((t * target @ targets.T).masked_fill(~seen, -math.inf))
    logs = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    return torch.where(p > 0, p * (p.log() - logs), 0).sum(1)


def rows(seed: int, count: int = 6, width: int = 5) -> Tensor:
    return unit(random_embeddings(count, width, 1.0, seed).image)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shared", [None, 4, 1, 0])
@pytest.mark.parametrize("modality", ["image", "text"])
@pytest.mark.parametrize("scales", [(3.0, 9.0), (100.0, 1000.0)])
def test_equals_whole_matrices(modality: str, shared: int | None, scales: tuple[float, float]) -> None:
    given = replace(random_bank(6, 5, 3), shared=shared)
    side, student, target = given.side(modality), rows(1).requires_grad_(), rows(2)
    seen = visible(given, side)
    value = divergence(student, side, scales[0], target, scales[1])
    expected = dense(student, target, side.rows, side.rows, seen, *scales)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
    weights = torch.arange(1.0, 7.0).double()
    (found,), (wanted,) = (torch.autograd.grad((weights * v).sum(), student) for v in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("tiles")
def test_a_share_of_the_rows_own_columns() -> None:
    """All captions of a picture at once: the teacher's mixture over them, nothing on the others."""
    given = random_bank(6, 5, 3)
    side, student, target = given.side("text"), rows(1).requires_grad_(), rows(2)
    value = divergence(student, side, 7.0, target, 5.0, positives=0.3)
    every = torch.ones(6, len(side.rows), dtype=torch.bool)
    expected = 0.7 * dense(student, target, side.rows, side.rows, every, 7.0, 5.0)
    logs = torch.log_softmax(7.0 * student @ side.rows.T, dim=1)
    for i, place in enumerate(given.place.tolist()):
        first = int(given.counts[:place].sum())
        own = slice(first, first + int(given.counts[place]))
        share = torch.softmax(5.0 * target[i] @ side.rows[own].T, dim=0)
        expected = expected.index_add(0, torch.tensor([i]), 0.3 * (share * (share.log() - logs[i, own])).sum()[None])
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
    (found,), (wanted,) = (torch.autograd.grad(v.sum(), student) for v in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("tiles")
def test_two_banks_with_a_column_for_each_picture() -> None:
    given = replace(random_bank(6, 5, 3), shared=5)
    pictures, captions = given.paired()
    start = 0
    for picture, count in enumerate(given.counts.tolist()):
        mean = given.text[start : start + count].mean(0)
        torch.testing.assert_close(captions.rows[picture], mean / mean.norm())
        start += count
    student, target = rows(1).requires_grad_(), rows(2).requires_grad_()
    value = divergence(student, captions, 4.0, target, 6.0, target_side=pictures)
    seen = visible(given, pictures)
    expected = dense(student, target.detach(), captions.rows, pictures.rows, seen, 4.0, 6.0)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-11)
    (found,), (wanted,) = (torch.autograd.grad(v.sum(), student) for v in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    assert torch.autograd.grad(value.sum(), target, allow_unused=True) == (None,)


def test_float32_stays_finite_and_close_at_the_sharpest_temperature() -> None:
    given = random_bank(6, 5, 3, dtype=torch.float32)
    student = rows(1).float().requires_grad_()
    value = divergence(student, given.side("text"), 1e4, rows(2).float(), 1e4)
    value.sum().backward()
    double = random_bank(6, 5, 3)
    side = double.side("text")
    every = torch.ones(6, len(side.rows), dtype=torch.bool)
    expected = dense(rows(1), rows(2), side.rows, side.rows, every, 1e4, 1e4)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-2)
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


def test_a_student_like_its_teacher_has_nothing_to_learn() -> None:
    teacher = replace(random_embeddings(6, 5, 20.0, 2), bank=random_bank(6, 5, 3))
    student = replace(teacher, bank=None, image=teacher.image.clone().requires_grad_())
    objective = Objective({"bank_cross": 1, "bank_within": 1}, 5, 5)
    output = objective(student, teacher)
    assert output.total.item() == pytest.approx(0, abs=1e-12)
    (gradient,) = torch.autograd.grad(output.total, student.image)
    assert float(gradient.abs().max()) < 1e-12


class Largest(TorchDispatchMode):
    """Elements of the largest tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_memory_is_linear_in_the_bank() -> None:
    pictures, batch, width = 40_000, 128, 4
    everything = unit(torch.randn(pictures, width))
    given = Bank(everything, everything, torch.ones(pictures, dtype=torch.int64), torch.arange(batch))
    student = rows(1, batch, width).float().requires_grad_()
    with Largest() as seen:
        divergence(student, given.side("text"), 10.0, rows(2, batch, width).float(), 10.0).sum().backward()
    assert seen.elements <= max(module.TILE_ELEMENTS, pictures * width)
    assert seen.elements < pictures * batch / 4


def test_a_bank_that_is_missing_or_of_another_width_is_refused() -> None:
    student, teacher = random_embeddings(4, 5, 9.0, 1), random_embeddings(4, 8, 20.0, 2)
    objective = Objective({"task": 1, "bank_within": 1}, 5, 8)
    with pytest.raises(InputError, match=r"'bank_within' compares .*`clipdistill cache`.*teacher=cache:DIR"):
        objective(student, teacher)
    with pytest.raises(InputError, match=r"bank has the shape \(9, 7\): teacher_dim of the objective is 8"):
        objective(student, replace(teacher, bank=random_bank(4, 7, 3)))
