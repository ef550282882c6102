from __future__ import annotations

import pytest
import torch

from clipdistill.objective import Objective
from tests.objective.plain import ce, random_embeddings, unit
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_kd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("clipkd", student, teacher, scales), "icl", {"icl": 1})


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_rd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("cliprd", student, teacher, scales), "icl", {"icl": 1}, projection="before-task")


def test_exponential_scales() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"icl": 1}, 5, 5, scales="exponential", engine="dense").double()
    a, b, u, v = unit(student.image), unit(student.text), unit(teacher.image), unit(teacher.text)
    k = 1 / 0.07  # ln(1/0.07) read as a logarithm
    expected = (ce(k * a @ v.T) + ce(k * b @ u.T)) / 2
    output = objective(student, teacher)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    objective.set_scales(cross=3.5)
    assert objective.cross_scale.item() == pytest.approx(1.252762968495368, abs=1e-15)  # ln 3.5
    expected = (ce(3.5 * a @ v.T) + ce(3.5 * b @ u.T)) / 2
    output = objective(student, teacher)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    # d/d log k = k d/dk
    (gradient,) = torch.autograd.grad(output.total, objective.cross_scale)
    direct = Objective({"icl": 1}, 5, 5, engine="dense").double()
    direct.set_scales(cross=3.5)
    (reference,) = torch.autograd.grad(direct(student, teacher).total, direct.cross_scale)
    assert gradient.item() == pytest.approx(3.5 * reference.item(), rel=1e-12)
