from __future__ import annotations

import pytest

from clipdistill.objective import Objective
from tests.objective.plain import kl, random_embeddings, unit
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_kd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("clipkd", student, teacher, scales), "cross_kd", {"cross_kd": 1})


def test_exponential_scales() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"cross_kd": 1}, 5, 5, scales="exponential", engine="dense").double()
    objective.set_scales(cross=6.0)
    a, b, u, v = unit(student.image), unit(student.text), unit(teacher.image), unit(teacher.text)
    target = 20.0 * u @ v.T
    expected = (kl(target, 6.0 * a @ v.T) + kl(target.T, 6.0 * b @ u.T)) / 2
    assert objective(student, teacher).total.item() == pytest.approx(expected.item(), rel=1e-12)
