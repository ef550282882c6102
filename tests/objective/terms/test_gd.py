from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clipdistill.objective import Objective
from clipdistill.objective.terms import gd
from tests.objective.plain import ce, random_embeddings, softmax, unit
from tests.objective.released import SETS, SIZES, assert_equal, assert_released, clip, run


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_kd_with_its_inverted_temperature(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("clipkd", student, teacher, scales), "gd", {"gd": 1})


def test_fixed_temperature_compares_true_gradients() -> None:
    """With the temperature put right, g is what autograd finds for the one-way contrastive loss."""
    student, teacher = random_embeddings(6, 5, 9.0, 1), random_embeddings(6, 5, 20.0, 2)

    def gradients(image: Tensor, text: Tensor, scale: float) -> list[Tensor]:
        found = []
        for anchors, candidates in ((image, text), (text, image)):
            p, k = anchors.clone().requires_grad_(), candidates.clone().requires_grad_()
            found += torch.autograd.grad(ce(scale * p @ k.T), (p, k))
        return found

    ours = gradients(unit(student.image), unit(student.text), 9.0)
    theirs = gradients(unit(teacher.image), unit(teacher.text), 20.0)
    expected = sum(((a - b) ** 2).mean() for a, b in zip(ours, theirs))
    output = Objective({"gd": 1}, 5, 5, gd_temperature="fixed", engine="dense")(student, teacher)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)


def test_fixed_temperature_gradient() -> None:
    student, teacher = random_embeddings(5, 4, 3.0, 1, trained=True), random_embeddings(5, 4, 6.0, 2)

    def formula(image: Tensor, text: Tensor, scale: Tensor) -> list[Tensor]:
        found = []
        for p, k in ((image, text), (text, image)):
            error = softmax(scale * p @ k.T) - torch.eye(len(p), dtype=p.dtype)
            found += [scale * error @ k / len(p), scale * error.T @ p / len(p)]
        return found

    ours = formula(unit(student.image), unit(student.text), student.logit_scale)
    theirs = formula(unit(teacher.image), unit(teacher.text), teacher.logit_scale)
    expected = sum(((a - b) ** 2).mean() for a, b in zip(ours, theirs))
    leaves = [student.image, student.text, student.logit_scale]
    references = torch.autograd.grad(expected, leaves)
    output = Objective({"gd": 1}, 4, 4, gd_temperature="fixed", engine="dense")(student, teacher)
    for mine, reference in zip(torch.autograd.grad(output.total, leaves), references):
        assert_equal(mine, reference, "gradient")


def test_stripes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = clip("clipkd", 24, 32, "alt")
    whole, whole_gradients = run(fixture, {"gd": 1})
    monkeypatch.setattr(gd, "STRIPE_ELEMENTS", 24)  # three rows of eight
    striped, gradients = run(fixture, {"gd": 1})
    assert_equal(striped.total.detach(), whole.total.detach(), "value")
    for key, reference in whole_gradients.items():
        if reference is not None:
            ours = gradients[key]
            assert ours is not None
            assert_equal(ours, reference, key)
