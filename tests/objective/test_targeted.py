"""The term targeted by hand: a pair that the teacher is unsure of teaches less."""

from __future__ import annotations

import math

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import random_embeddings, softmax, unit


def test_two_pairs_by_hand() -> None:
    """T = 2 [[1, 0], [0, 1]]: both weights 1 / (1 + e^-2) = 0.8808; cosines of the student 0.6 and 1, 1 and 0.8."""
    eye = torch.eye(2, dtype=torch.float64)
    image = torch.tensor([[0.6, 0.8], [0, 1]], dtype=torch.float64)
    text = torch.tensor([[1, 0], [0.6, 0.8]], dtype=torch.float64)
    student, teacher = Embeddings(image, text, torch.tensor(1.0).double()), Embeddings(eye, eye, 2.0)
    found = Objective({"targeted": 1}, 2, 2)(student, teacher).total.item()
    assert found == pytest.approx((0.4 + 0.2) / 2 / (1 + math.exp(-2)), rel=1e-7)


def test_weights_are_the_teachers_probabilities_and_no_gradient_flows_through_them() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 4.0, 2, trained=True)
    output = Objective({"targeted": 1}, 5, 5)(student, teacher)
    u, v = unit(teacher.image).detach(), unit(teacher.text).detach()
    logits = 4.0 * u @ v.T
    sure = (softmax(logits).diagonal() + softmax(logits.T).diagonal()) / 2
    assert float(sure.max() / sure.min()) > 1.5
    expected = (sure * (2 - (unit(student.image) * u).sum(1) - (unit(student.text) * v).sum(1))).mean()
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    for part in (student.image, student.text):
        (found,), (wanted,) = (
            torch.autograd.grad(value, part, retain_graph=True) for value in (output.total, expected)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert torch.autograd.grad(output.total, teacher.image, allow_unused=True) == (None,)
