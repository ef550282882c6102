from __future__ import annotations

import math

import pytest
import torch

from clipdistill.objective import Embeddings, Objective
from tests.objective.released import SETS, SIZES, assert_released, clip


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_kd(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("clipkd", student, teacher, scales), "task", {"task": 1})


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_clip_rd_which_projects_first(student: int, teacher: int, scales: str) -> None:
    assert_released(clip("cliprd", student, teacher, scales), "task", {"task": 1}, projection="before-task")


@pytest.mark.parametrize("scales", SETS)
def test_equals_open_clip(scales: str) -> None:
    assert_released(clip("openclip", 24, 32, scales), "contrastive_loss", {"task": 1})


def test_orthonormal_pairs_by_hand() -> None:
    # cosines are 1 on the diagonal and 0 elsewhere, so each row's loss is ln(1 + 2 e^-s)
    rows = 3 * torch.eye(3, dtype=torch.float64)
    output = Objective({"task": 1}, 3, 3, engine="dense")(Embeddings(rows, rows, 2.0))
    assert output.total.item() == pytest.approx(math.log(1 + 2 * math.exp(-2)), abs=1e-14)


def test_synthetic_caption_adds_its_own_loss() -> None:
    rows = torch.eye(3, dtype=torch.float64)
    swapped = rows[[1, 0, 2]]
    objective = Objective({"task": 1}, 3, 3, engine="dense")
    both = objective(Embeddings(rows, rows, 2.0, synthetic_text=swapped)).total
    alone = objective(Embeddings(rows, rows, 2.0)).total + objective(Embeddings(rows, swapped, 2.0)).total
    assert both.item() == pytest.approx(alone.item(), abs=1e-14)
