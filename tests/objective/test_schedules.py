"""Weights and the teacher's multiplier over a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.objective import Objective
from clipdistill.objective.config import ObjectiveConfig
from tests.objective.plain import random_embeddings

WEIGHTS = {"task": 1.0, "crd": 2.0, "fd": 10.0}


@pytest.mark.parametrize(
    ("points", "at"),
    [
        ([[0, 1.0], [0.5, 0.1]], {0.0: 1.0, 0.25: 0.55, 0.5: 0.1, 0.9: 0.1}),
        ([[0.2, 0.0], [0.4, 1.0], [1, 3.0]], {0.0: 0.0, 0.2: 0.0, 0.3: 0.5, 0.4: 1.0, 0.7: 2.0, 1.0: 3.0}),
        ([[0.5, 2.0]], {0.0: 2.0, 0.5: 2.0, 1.0: 2.0}),
    ],
)
def test_factors_are_linear_between_points_and_constant_outside(points: Any, at: dict[float, float]) -> None:
    config = build(ObjectiveConfig, {"weights": WEIGHTS, "schedules": {"fd": points}})
    for share, factor in at.items():
        assert config.factor("fd", share) == pytest.approx(factor)
        assert config.factor("task", share) == 1


@pytest.mark.parametrize("engine", ["dense", "tiled"])
@pytest.mark.parametrize("progress", [0.0, 0.3, 1.0])
def test_a_scheduled_objective_is_the_one_of_these_weights(engine: Any, progress: float) -> None:
    student, teacher = random_embeddings(6, 5, 9.0, 1, trained=True), random_embeddings(6, 5, 20.0, 2)
    schedules = {"fd": [[0, 1.0], [0.6, 0.0]], "crd": [[0, 0.0], [1, 2.0]], "teacher": [[0, 0.5], [1, 1.5]]}
    scheduled = Objective(WEIGHTS, 5, 5, engine=engine, schedules=schedules)
    scheduled.progress = progress
    now = {"task": 1.0, "crd": 2 * 2 * progress, "fd": 10 * max(1 - progress / 0.6, 0)}
    assert scheduled.current_weights == pytest.approx(now)
    plain = Objective({name: max(weight, 1e-300) for name, weight in now.items()}, 5, 5, engine=engine)
    found = scheduled(student, teacher)
    expected = plain(student, replace(teacher, logit_scale=20 * (0.5 + progress)))
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-12)
    assert list(found.terms) == list(WEIGHTS)
    for part in (student.image, student.logit_scale):
        assert isinstance(part, torch.Tensor)
        one, other = (torch.autograd.grad(v, part, retain_graph=True)[0] for v in (found.total, expected.total))
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"fdd": [[0, 1]]}, "unknown term 'fdd' .did you mean 'fd'"),
        ({"fd": []}, "fd: give points with rising shares"),
        ({"fd": [[0, 1], [0, 2]]}, "fd: give points with rising shares"),
        ({"fd": [[0, 1], [1.5, 2]]}, "fd: give points with rising shares"),
        ({"fd": [[0, -1]]}, "a factor must be a number of at least 0"),
        ({"fd": [[0, float("nan")]]}, "fd"),
        ({"teacher": [[0, 0]]}, "teacher: above"),
        ({"fd": [[0]]}, "schedules"),
    ],
)
def test_impossible_schedules(schedules: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(ObjectiveConfig, {"weights": WEIGHTS, "schedules": schedules})


def test_a_schedule_of_a_term_that_is_switched_off_is_kept_for_ablations() -> None:
    objective = Objective({"task": 1}, 5, 5, schedules={"fd": [[0, 1.0], [1, 0.0]]})
    assert "schedule" not in objective.explain(8)
    assert "schedule of fd: 1 times at 0%, 0 times at 100%" in Objective(
        {"fd": 1}, 5, 5, schedules={"fd": [[0, 1.0], [1, 0.0]]}
    ).explain(8)
