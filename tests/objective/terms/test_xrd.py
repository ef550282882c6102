from __future__ import annotations

import pytest

from clipdistill.objective import Objective
from tests.objective.plain import kl, random_embeddings, unit
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_rd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("cliprd", student, teacher, scales), "XRD", {"xrd": 1}, projection="before-task")


def test_exponential_scales() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"xrd": 1}, 5, 5, scales="exponential", engine="dense").double()
    objective.set_scales(cross=6.0)
    p, q = (6.0 * unit(t) @ unit(s).T for t, s in ((teacher.image, student.text), (teacher.text, student.image)))
    expected = (kl(q, p) + kl(p, q) + kl(q.T, p.T) + kl(p.T, q.T)) / 4
    assert objective(student, teacher).total.item() == pytest.approx(expected.item(), rel=1e-12)
