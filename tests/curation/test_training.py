"""Runs on chosen batches: what they train on, exact resume, a live teacher, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.curation import training
from clipdistill.errors import InputError, Preempted
from clipdistill.runs.folder import RunFolder
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.run import distill, make_task
from tests.cache.support import filled, saved_teacher
from tests.train.support import signal_at

SIZE = 24
SETTINGS = [
    "train.steps=6",
    "train.precision=fp32",
    "train.batch_size=6",
    "train.cache_samples=0",
    "preflight.enabled=false",
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, teacher: str) -> Path:
    return filled(tmp_path_factory.mktemp("cache") / "c", teacher, SIZE).folder


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_teacher(tmp_path_factory.mktemp("student") / "student", seed=3)


@pytest.fixture
def settings(store: Path, student: str) -> Any:
    def made(out: Path, *assignments: str, recipe: str = "clip", teacher: str | None = f"cache:{store}") -> RunConfig:
        given = {"out": str(out), "data": {"path": "scenes:train", "size": SIZE}, "teacher": teacher}
        given |= {"student": "tiny", "student_weights": student}
        return resolve(recipe, given, assignments=[*SETTINGS, *assignments])

    return made


def test_a_batch_is_drawn_from_its_super_batch_and_is_that_of_the_formula(tmp_path: Path, settings: Any) -> None:
    config = settings(tmp_path / "run", "train.curation=0.5")
    task = make_task(config, torch.device("cpu"))
    drawn = next(iter(task.loader(0, 1)))
    larger = settings(tmp_path / "other", "train.curation=0.5", "train.batch_size=12")
    whole = next(iter(dataclasses.replace(task.setup, config=larger).loader(0, 1)))
    places = [whole.keys.index(key) for key in drawn.keys]
    assert len(drawn.keys) == 6
    assert task.super_batch == len(whole.keys) == 12
    assert torch.equal(drawn.student_images, whole.student_images[places])
    assert torch.equal(drawn.indices, whole.indices[places])
    assert drawn.captions == [whole.captions[place] for place in places]
    assert task.setup.student.module.training  # scored in evaluation mode, trained in training mode


def test_every_kind_of_field_is_cut(tmp_path: Path, settings: Any) -> None:
    task = make_task(settings(tmp_path / "run", "train.curation=0.5", recipe="clip-kd"), torch.device("cpu"))
    whole = next(iter(super(training.CuratedDistillation, task).loader(0, 1)))
    part = training.part_of(whole, torch.tensor([4, 1]))
    assert part.keys == [whole.keys[4], whole.keys[1]]
    assert part.captions == [whole.captions[4], whole.captions[1]]
    assert part.views == [whole.views[4], whole.views[1]]
    assert part.stored is not None
    assert whole.stored is not None
    for name, rows in part.stored.items():
        assert torch.equal(rows, whole.stored[name][[4, 1]]), name


@pytest.mark.parametrize("chosen", ["train.curation=0.5", "train.neighbours=3"])
def test_a_run_resumes_to_the_bit(tmp_path: Path, settings: Any, chosen: str, monkeypatch: Any) -> None:
    whole = distill(settings(tmp_path / "whole", chosen, recipe="clip-kd"), quiet=True)
    described = RunFolder(tmp_path / "whole").facts()
    assert described["super_batch"] == (12 if "curation" in chosen else 6)
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["samples_seen"] == 36  # trained on, not looked at
    signal_at(monkeypatch, 3)
    with pytest.raises(Preempted):
        distill(settings(tmp_path / "parts", chosen, recipe="clip-kd"), quiet=True)
    parts = distill(settings(tmp_path / "parts", chosen, recipe="clip-kd"), quiet=True)
    one, other = (load_file(run.student / "model.safetensors") for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_live_teacher_weighs_pairs_too(tmp_path: Path, settings: Any, teacher: str) -> None:
    run = distill(settings(tmp_path / "live", "train.curation=0.5", "train.steps=2", teacher=teacher), quiet=True)
    assert run.status == "finished"


@pytest.mark.parametrize(
    ("assignments", "named", "sentence"),
    [
        (["train.curation=0.5"], False, "a teacher weighs the pairs, and none is named"),
        (["train.neighbours=4", "train.ternary=both"], True, r"train\.neighbours=4: not together with train\.ternary"),
        (
            ["train.curation=0.5", "train.mean_captions=0.5", "train.lock_text=all"],
            True,
            "embeds single captions",
        ),
        (["train.curation=1"], True, r"train\.curation"),
        (["train.neighbours=1"], True, r"train\.neighbours"),
    ],
)
def test_what_is_refused(tmp_path: Path, settings: Any, assignments: list[str], named: bool, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        settings(tmp_path / "x", *assignments, **({} if named else {"teacher": None}))


def test_neighbours_take_a_cache(tmp_path: Path, settings: Any, teacher: str) -> None:
    with pytest.raises(InputError, match=r"neighbours are found in a cache: fill one"):
        make_task(settings(tmp_path / "x", "train.neighbours=4", teacher=teacher), torch.device("cpu"))
