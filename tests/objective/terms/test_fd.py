from __future__ import annotations

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import random_embeddings
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_kd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("clipkd", student, teacher, scales), "fd", {"fd": 1})


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_rd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("cliprd", student, teacher, scales), "fd", {"fd": 1}, projection="before-task")


def test_cosine_units_by_hand() -> None:
    # image rows at 90 degrees to the teacher's, text rows at 60: (1 - 0) + (1 - 1/2)
    image = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    text = torch.tensor([[0.5, 0.75**0.5], [1.0, 0.0]], dtype=torch.float64)
    turned = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    teacher_text = torch.tensor([[1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    objective = Objective({"fd": 1}, 2, 2, feature_units="cosine", engine="dense")
    output = objective(Embeddings(image, text, 1.0), Embeddings(turned, teacher_text, 1.0))
    assert output.total.item() == pytest.approx(1.5, abs=1e-14)


def test_a_weight_in_cosine_units_means_the_same_at_every_width() -> None:
    for width in (16, 48):
        student, teacher = random_embeddings(6, width, 1.0, 3), random_embeddings(6, width, 1.0, 4)
        released = Objective({"fd": 2000}, width, width, engine="dense")(student, teacher).total
        cosine = Objective({"fd": 2 * 2000 / width}, width, width, feature_units="cosine", engine="dense")
        assert cosine(student, teacher).total.item() == pytest.approx(released.item(), rel=1e-12)
