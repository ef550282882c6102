"""Chains of teacher assistants: who teaches whom, whatever is named on the command line, and one chain run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipdistill.train.config import RunConfig
from clipdistill.train.stages import distill_stages, resolve_stages


def chain(recipe: str, out: Path, *assignments: str, **settings: Any) -> list[RunConfig]:
    return resolve_stages(recipe, {"out": str(out), **settings}, size="debug", assignments=assignments)


def test_each_stage_is_taught_by_the_one_before() -> None:
    out = Path("x")
    for settings, first in (({}, "scenes-teacher"), ({"teacher": "ViT-L-14"}, "ViT-L-14")):
        one, student = chain("assistant-stages", out, **settings)
        assert (one.student, one.teachers) == ("scenes-assistant", (first,))
        assert (student.student, student.teachers) == ("scenes-student", ("x/stage-1-assistant/student",))
        stages = chain("two-assistants-stages", out, **settings)
        assert [stage.student for stage in stages] == ["scenes-assistant", "scenes-assistant-small", "scenes-student"]
        previous = ["x/stage-1-assistant/student", "x/stage-2-smaller/student"]
        assert [stage.teachers for stage in stages] == [(first,), *((name,) for name in previous)]
        assert [stage.train.seed for stage in stages] == [0, 1, 2]
    # a stage's teacher named for it alone wins
    _, student = chain("assistant-stages", out, "stages.student.teacher=scenes-teacher")
    assert student.teachers == ("scenes-teacher",)


def test_chains_have_the_budget_of_one_direct_run() -> None:
    direct = 150  # of `--recipe clip-kd --size demo`
    for recipe, count in (("assistant-stages", 2), ("two-assistants-stages", 3)):
        steps = [stage.train.steps for stage in resolve_stages(recipe, {"out": "x"}, size="demo")]
        assert (len(steps), sum(steps)) == (count, direct)


@pytest.mark.slow
def test_a_chain_of_two_assistants_ends_in_the_student(tmp_path: Path) -> None:
    runs = distill_stages(chain("two-assistants-stages", tmp_path / "run"), quiet=True)
    assert [run.status for run in runs] == ["finished"] * 3
    facts = [json.loads((run.folder / "run.json").read_text()) for run in runs]
    assert [fact["teacher"] for fact in facts] == ["scenes-teacher", "scenes-assistant", "scenes-assistant-small"]
    last = json.loads((tmp_path / "run" / "student" / "model.json").read_text())
    assert last["architecture"]["vision_cfg"]["width"] == 64
