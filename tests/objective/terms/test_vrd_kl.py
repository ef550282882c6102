from __future__ import annotations

import pytest
import torch

from clipdistill.objective import Objective
from tests.objective.plain import kl, random_embeddings, unit
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_rd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("cliprd", student, teacher, scales), "VRD", {"vrd_kl": 1}, projection="before-task")


def test_only_the_image_side_is_trained() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"vrd_kl": 1}, 5, 5, engine="dense").double()
    objective(student, teacher).total.backward()
    assert student.image.grad is not None
    assert student.text.grad is None
    # the copied side's multiplier exists, but an optimiser or DistributedDataParallel must not wait for its gradient
    assert objective.image_scale is not None
    assert objective.image_scale.requires_grad
    assert objective.text_scale is not None
    assert not objective.text_scale.requires_grad


def test_target_can_be_the_image_side() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    objective = Objective({"vrd_kl": 1}, 5, 5, vrd_target="image", engine="dense").double()
    objective.set_scales(image=4.0, text=3.0)
    image, text = 4.0 * unit(teacher.image) @ unit(student.image).T, 3.0 * unit(teacher.text) @ unit(student.text).T
    expected = (kl(image, text) + kl(image.T, text.T)) / 2
    output = objective(student, teacher)
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-12)
    (reference,) = torch.autograd.grad(expected, student.text)
    output.total.backward()
    assert student.image.grad is None
    torch.testing.assert_close(student.text.grad, reference, rtol=1e-10, atol=1e-14)


def test_both_directions_are_the_mean_of_the_two() -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    found = {}
    for target in ("text", "image", "both"):
        objective = Objective({"vrd_kl": 1}, 5, 5, vrd_target=target, engine="dense").double()
        objective.set_scales(image=4.0, text=3.0)
        total = objective(student, teacher).total
        found[target] = (total, *torch.autograd.grad(total, [student.image, student.text], allow_unused=True))
    assert found["both"][0].item() == pytest.approx((found["text"][0] + found["image"][0]).item() / 2, rel=1e-12)
    torch.testing.assert_close(found["both"][1], found["text"][1] / 2)
    torch.testing.assert_close(found["both"][2], found["image"][2] / 2)
