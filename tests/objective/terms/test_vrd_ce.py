from __future__ import annotations

import math

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.released import SETS, SIZES, assert_equal, clip, run


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_both_parts_of_clip_rd(student: int, teacher: int, scales: str) -> None:
    fixture = clip("cliprd", student, teacher, scales)
    output, gradients = run(fixture, {"vrd_ce": 1}, projection="before-task")
    assert_equal(output.total.detach(), fixture["loss_VRD_ce_img"] + fixture["loss_VRD_ce_txt"], "value")
    for key, ours in gradients.items():
        # each input belongs to exactly one of the two parts; NaN marks the other
        parts = [fixture.get(f"grad_VRD_ce_{part}__{key}") for part in ("img", "txt")]
        reference = [part for part in parts if part is not None and not bool(torch.isnan(part).any())]
        if reference:
            assert ours is not None, key
            assert_equal(ours, reference[0], key)
        else:
            assert ours is None or not ours.any(), key


def test_floor_at_the_starting_scale() -> None:
    # a perfect student on orthonormal rows: at k = 2.66 and N = 1024 the loss cannot be below 2 x 4.29
    n, k = 1024, math.log(1 / 0.07)
    eye = torch.eye(n)
    same = Embeddings(eye, eye, 1.0)
    output = Objective({"vrd_ce": 1}, n, n, engine="dense")(same, same)
    assert output.total.item() == pytest.approx(2 * math.log(1 + (n - 1) * math.exp(-k)), rel=1e-6)
    assert output.total.item() / 2 == pytest.approx(4.29, abs=0.005)
