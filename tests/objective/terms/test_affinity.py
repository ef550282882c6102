from __future__ import annotations

import pytest

from clipdistill.objective import Objective
from tests.objective.released import SETS, SIZES, assert_equal, assert_released, clip, run


@pytest.mark.parametrize("scales", ["ls50", "alt"])
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_tinyclip(student: int, teacher: int, scales: str) -> None:
    fixture = clip("tinyclip", student, teacher, scales)
    assert_released(fixture, "soft", {"affinity": 1})
    assert_released(fixture, "hard", {"task": 1})


@pytest.mark.parametrize("scales", SETS)
@pytest.mark.parametrize(("student", "teacher"), SIZES)
def test_equals_open_clip_distillation(student: int, teacher: int, scales: str) -> None:
    fixture = clip("openclip", student, teacher, scales)
    assert_released(fixture, "distill_loss", {"affinity": 1})
    assert_released(fixture, "total", {"task": 1, "affinity": 1})


def test_same_gradient_as_crd_and_no_projection() -> None:
    fixture = clip("tinyclip", 24, 32, "alt")
    _, soft = run(fixture, {"affinity": 1})
    _, divergence = run(fixture, {"crd": 1})
    for key in ("a", "b", "logit_scale"):
        ours, reference = soft[key], divergence[key]
        assert ours is not None
        assert reference is not None
        assert_equal(ours, reference, key)
    objective = Objective({"task": 1, "affinity": 1}, 24, 32)
    assert objective.image_projection is None
    assert objective.text_projection is None
    assert not list(objective.parameters())
