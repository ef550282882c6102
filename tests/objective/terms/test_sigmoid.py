from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.plain import random_embeddings, unit
from tests.objective.released import SETS, SIZES, assert_equal, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_siglip(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("openclip", student, teacher, scales), "siglip", {"sigmoid": 1})


def test_orthonormal_pairs_by_hand() -> None:
    # diagonal logits s + b = 3, the six others b = -1:  softplus(-3) + 2 softplus(-1) a row; no teacher is needed
    rows = torch.eye(3, dtype=torch.float64)
    output = Objective({"sigmoid": 1}, 3, 3, engine="dense")(Embeddings(rows, rows, 4.0, logit_bias=-1.0))
    assert output.total.item() == pytest.approx(math.log1p(math.exp(-3)) + 2 * math.log1p(math.exp(-1)), abs=1e-14)


@pytest.mark.parametrize("blocks", [None, (4, 3)])
def test_distilled_labels(blocks: tuple[int, int] | None) -> None:
    student = replace(random_embeddings(6, 5, 8.0, 1, trained=True), logit_bias=torch.tensor(-3.0).double())
    teacher = random_embeddings(6, 7, 12.0, 2)
    if blocks is None:
        teacher = replace(teacher, logit_bias=-5.0)
        probabilities = torch.sigmoid(12.0 * unit(teacher.image) @ unit(teacher.text).T - 5.0)
    else:
        teacher = replace(teacher, blocks=blocks, logit_scale=(12.0, 9.0), logit_bias=(-5.0, -4.0))
        parts = zip(teacher.image.split(blocks, 1), teacher.text.split(blocks, 1), (12.0, 9.0), (-5.0, -4.0))
        probabilities = sum(torch.sigmoid(s * unit(u) @ unit(v).T + b) for u, v, s, b in parts) / 2
    logits = student.logit_scale * unit(student.image) @ unit(student.text).T - 3.0
    expected = torch.log1p(torch.exp(-(2 * probabilities - 1) * logits)).sum() / 6
    leaves = [student.image, student.text, student.logit_scale]
    references = torch.autograd.grad(expected, leaves)
    output = Objective({"sigmoid": 1}, 5, 7, sigmoid_targets="teacher", engine="dense")(student, teacher)
    assert_equal(output.total.detach(), expected.detach(), "value")
    for ours, reference in zip(torch.autograd.grad(output.total, leaves), references):
        assert_equal(ours, reference, "gradient")
