from __future__ import annotations

import math

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_kd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("clipkd", student, teacher, scales), "ckd", {"crd": 1})


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_hrd_of_clip_rd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("cliprd", student, teacher, scales), "hrd", {"crd": 1}, projection="before-task")


def test_two_pairs_by_hand() -> None:
    # teacher probabilities (p, 1-p) with p = e^4/(e^4+1); the student's cosines are all 1, so it says (1/2, 1/2)
    p = math.exp(4) / (math.exp(4) + 1)
    expected = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    eye, ones = torch.eye(2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    output = Objective({"crd": 1}, 2, 2, engine="dense")(Embeddings(ones, ones, 7.0), Embeddings(eye, eye, 4.0))
    assert output.total.item() == pytest.approx(expected, abs=1e-14)


def test_vanishes_for_equal_models() -> None:
    rows = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = Embeddings(rows, rows.flip(0), 3.0)
    assert Objective({"crd": 1}, 4, 4, engine="dense")(both, both).total.item() == pytest.approx(0, abs=1e-14)
