"""The term class_kd: by hand, what it trains, and what is refused; class vectors and who brings them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clipdistill.errors import InputError
from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import kl, random_embeddings, unit


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 2 * math.tanh(1)), (2.0, 4 * math.tanh(0.5))])
def test_two_classes_by_hand(temperature: float, expected: float) -> None:
    """t = 2: the teacher sees class 1 with p = 1 / (1 + e^(-2 / tau)), the student class 2 with the same.

    tau^2 KL = tau^2 (2 p - 1) 2 / tau; the gradient of the student's row is tau t (q - p) along class 1, 0 along the
    row itself.
    """
    eye = torch.eye(2, dtype=torch.float64)
    student = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    ours, theirs = Embeddings(student, student, torch.tensor(9.0).double()), Embeddings(eye[:1], eye[:1], 2.0)
    objective = Objective({"class_kd": 1}, 2, 2, class_kd_temperature=temperature)
    total = objective(ours, replace(theirs, classes=eye)).total
    assert total.item() == pytest.approx(expected, rel=1e-7)
    (gradient,) = torch.autograd.grad(total, student)
    p = 1 / (1 + math.exp(-2 / temperature))
    assert gradient[0].tolist() == pytest.approx([temperature * 2 * ((1 - p) - p), 0.0], rel=1e-7, abs=1e-12)


def test_it_is_the_divergence_written_out_and_trains_pictures_and_projection_alone() -> None:
    student, teacher = random_embeddings(6, 4, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2, trained=True)
    classes = unit(random_embeddings(3, 5, 1.0, 3).image).requires_grad_()
    objective = Objective({"class_kd": 1}, 4, 5).double()
    assert objective.image_projection is not None
    assert objective.text_projection is None
    output = objective(student, replace(teacher, classes=classes))
    rows = unit(objective.image_projection(student.image))
    expected = kl(20 * unit(teacher.image) @ classes.T, 20 * rows @ classes.T)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    found = torch.autograd.grad(output.total, [student.image, objective.image_projection.weight], retain_graph=True)
    wanted = torch.autograd.grad(kl((20 * unit(teacher.image) @ classes.T).detach(), 20 * rows @ classes.detach().T), [
        student.image, objective.image_projection.weight
    ])  # fmt: skip
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    constants = [teacher.image, classes, student.text, student.logit_scale]
    assert torch.autograd.grad(output.total, constants, allow_unused=True) == (None,) * 4
    same = objective(replace(student, image=student.image), replace(teacher, image=rows.detach(), classes=classes))
    assert same.total.item() == pytest.approx(0, abs=1e-12)  # as the teacher: nothing is left to learn


def test_without_class_vectors_or_with_others_it_says_what_to_do() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"class_kd": 1}, 5, 5)
    with pytest.raises(InputError, match=r"'class_kd' .*of 5 numbers each, and none are given: .*train\.classes=SET"):
        objective(student, teacher)
    with pytest.raises(InputError, match="and they have 4"):
        objective(student, replace(teacher, classes=torch.eye(4)))
