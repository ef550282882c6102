from __future__ import annotations

import pytest
import torch

from clipdistill.objective import Objective
from tests.objective.plain import ce, random_embeddings, unit
from tests.objective.released import SETS, assert_equal, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
def test_equals_clip_kd(scales: str) -> None:
    assert_released(clip("clipkd", 32, 32, scales), "afd", {"afd": 1})


def test_unequal_sizes_fuse_projected_rows() -> None:
    """The released code cannot run this; the formula with an input of 2 D_t can."""
    torch.manual_seed(5)
    student, teacher = random_embeddings(6, 4, 9.0, 1, trained=True), random_embeddings(6, 7, 20.0, 2)
    objective = Objective({"afd": 1}, 4, 7, engine="dense").double()
    assert objective.image_fusion is not None
    assert objective.text_fusion is not None
    assert objective.image_projection is not None
    assert objective.text_projection is not None
    assert (objective.image_fusion.in_features, objective.image_fusion.out_features) == (14, 4)
    fused = []
    for rows, targets, projection, fusion in (
        (student.image, teacher.image, objective.image_projection, objective.image_fusion),
        (student.text, teacher.text, objective.text_projection, objective.text_fusion),
    ):
        projected = unit(rows @ projection.weight.T + projection.bias)
        fused.append(unit(torch.cat([projected, unit(targets)], dim=1) @ fusion.weight.T + fusion.bias))
    assert objective.fusion_scale is not None
    logits = objective.fusion_scale * fused[0] @ fused[1].T
    expected = (ce(logits) + ce(logits.T)) / 2
    leaves = [student.image, student.text, *objective.parameters()]
    references = torch.autograd.grad(expected, leaves)
    output = objective(student, teacher)
    assert_equal(output.total.detach(), expected.detach(), "value")
    for ours, reference in zip(torch.autograd.grad(output.total, leaves), references):
        assert_equal(ours, reference, "gradient")
