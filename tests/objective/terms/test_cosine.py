from __future__ import annotations

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import random_embeddings, unit
from tests.objective.released import assert_equal


def test_by_hand() -> None:
    # image rows opposite to the teacher's (cos -1), text rows at 3-4-5 angles (cos 0.6 and 0.8)
    image = torch.tensor([[1.0, 0.0], [0.0, 5.0]], dtype=torch.float64)
    text = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=torch.float64)
    output = Objective({"cosine": 1}, 2, 2, engine="dense")(
        Embeddings(image, text, 1.0), Embeddings(-2 * image, torch.eye(2, dtype=torch.float64), 1.0)
    )
    assert output.total.item() == pytest.approx((1 + 1) + (1 - 0.7), abs=1e-14)


def test_unequal_sizes_go_through_the_projection() -> None:
    torch.manual_seed(2)
    student, teacher = random_embeddings(6, 4, 9.0, 1, trained=True), random_embeddings(6, 7, 20.0, 2)
    objective = Objective({"cosine": 1}, 4, 7, engine="dense").double()
    assert objective.image_projection is not None
    assert objective.text_projection is not None
    expected = 2.0 - sum(
        (unit(layer(rows)) * unit(target)).sum(dim=1).mean()
        for layer, rows, target in (
            (objective.image_projection, student.image, teacher.image),
            (objective.text_projection, student.text, teacher.text),
        )
    )
    leaves = [student.image, student.text, *objective.parameters()]
    references = torch.autograd.grad(expected, leaves)
    output = objective(student, teacher)
    assert_equal(output.total.detach(), expected.detach(), "value")
    for ours, reference in zip(torch.autograd.grad(output.total, leaves), references):
        assert_equal(ours, reference, "gradient")


def test_dclip_loss_is_task_plus_cosine() -> None:
    """DCLIP's whole loss at its fixed temperature 0.05, and fd in cosine units is the same distance."""
    student, teacher = random_embeddings(6, 5, 20.0, 1), random_embeddings(6, 5, 20.0, 2)
    whole = Objective({"task": 1, "cosine": 1}, 5, 5, engine="dense")(student, teacher)
    same = Objective({"task": 1, "fd": 1}, 5, 5, feature_units="cosine", engine="dense")(student, teacher)
    assert whole.total.item() == pytest.approx(same.total.item(), abs=1e-12)
    assert whole.total.item() == pytest.approx((whole.terms["task"] + whole.terms["cosine"]).item(), abs=1e-12)
