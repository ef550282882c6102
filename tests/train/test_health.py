"""Runs that show an illness get a warning with what to try; healthy ones get none."""

import json
from types import SimpleNamespace

import pytest
import torch

from clipdistill.models import build_student, save_model
from clipdistill.train.config import resolve
from clipdistill.train.health import Health, Movement
from clipdistill.train.run import distill


def run(tmp_path, capsys, *assignments, recipe="clip", **settings):
    fixed = ("train.log_every=2", "train.precision=fp32", "train.compile=false", "train.attention=default")
    config = resolve(
        recipe, {"out": str(tmp_path / "run"), **settings}, size="debug", assignments=[*fixed, *assignments]
    )
    distill(config)
    said = capsys.readouterr()
    return [line.strip() for line in (said.out + said.err).splitlines() if "warning:" in line], tmp_path / "run"


@pytest.mark.slow
def test_a_healthy_run_is_not_warned(tmp_path, capsys):
    warnings, _ = run(tmp_path, capsys, "train.steps=120", "train.evaluate_every=40", recipe="clip-kd")
    assert warnings == []


def test_a_loss_that_stays_at_chance_is_told_once(tmp_path, capsys):
    warnings, _ = run(tmp_path, capsys, "train.steps=30", "train.learning_rate=1e-9", "train.logit_scale_init=1")
    assert len(warnings) == 1
    assert "has sat at ln(batch) = 2.77" in warnings[0]
    assert "train.learning_rate" in warnings[0]


def test_chance_is_that_of_the_pairs_there_are(tmp_path, capsys):
    few = ("train.batch_size=32", "data.size=12")
    warnings, _ = run(tmp_path, capsys, "train.steps=30", "train.learning_rate=1e-9", "train.logit_scale_init=1", *few)
    assert any("has sat at ln(batch) = 2.48" in warning for warning in warnings)


def test_captions_that_all_find_one_picture(tmp_path, capsys):
    warnings, folder = run(tmp_path, capsys, "train.steps=20", "train.evaluate_every=5", "train.learning_rate=3")
    assert any("find the same picture first" in warning for warning in warnings)
    points = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()]
    assert points[-1]["top_share"] > 0.5


def test_a_student_that_learns_its_pairs_by_heart(tmp_path, capsys):
    """The curve is written by hand: a small run that overfits for certain would take minutes."""
    say = []
    health = Health(say.append)
    config = resolve("clip", {"out": str(tmp_path / "run")}, size="debug")
    view = SimpleNamespace(config=config, folder=tmp_path, samples=160, images=1000, top_share=0.0)
    for step, recall, loss in [
        (10, 0.1, 2.0),
        (20, 0.3, 1.5),
        (30, 0.25, 1.0),
        (40, 0.2, 0.5),
        (50, 0.15, 0.2),
        (60, 0.1, 0.1),
    ]:
        view.step, view.line, view.scores = (
            step,
            {"step": step, "total": loss, "terms": {"task": loss}},
            {"t2i_R@10": recall},
        )
        health.on_step(view)
        health.on_evaluation(view)
    assert len(say) == 1
    assert "R@10 30.0% at step 20, 10.0% at step 60" in say[0]


def test_a_curve_that_only_trembles_is_left_alone(tmp_path):
    say = []
    health = Health(say.append)
    config = resolve("clip", {"out": str(tmp_path / "run")}, size="debug")
    view = SimpleNamespace(config=config, folder=tmp_path, samples=160, images=100, top_share=0.0)
    for step, recall, loss in [(10, 0.3, 2.0), (20, 0.25, 1.5), (30, 0.24, 1.0), (40, 0.26, 0.5), (50, 0.24, 0.2)]:
        view.step, view.line, view.scores = step, {"step": step, "total": loss}, {"t2i_R@10": recall}
        health.on_step(view)
        health.on_evaluation(view)
    assert say == []


def test_a_pretrained_tower_that_the_rate_destroys(tmp_path, capsys):
    save_model(build_student("scenes-student", seed=3, captions=["a red circle on a blue ground"]), tmp_path / "start")
    ill = ("train.steps=30", "train.learning_rate=0.1")
    warnings, folder = run(tmp_path, capsys, *ill, student_weights=str(tmp_path / "start"))
    assert any("a pretrained tower is being destroyed by the rate" in warning for warning in warnings)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert max(lines[-1]["moved"].values()) > 0.5


def test_a_gentle_rate_destroys_nothing(tmp_path, capsys):
    save_model(build_student("scenes-student", seed=3, captions=["a red circle on a blue ground"]), tmp_path / "start")
    gentle = ("train.steps=20", "train.learning_rate=1e-5")
    warnings, folder = run(tmp_path, capsys, *gentle, student_weights=str(tmp_path / "start"))
    assert warnings == []
    moved = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["moved"]
    assert set(moved) == {"image", "text"}
    assert 0 < max(moved.values()) < 0.1


@pytest.mark.parametrize(
    "line", [{}, {"moved": 3}, {"terms": [1]}, {"moved": {"image": "far"}}, {"step": "x", "total": None}]
)
def test_odd_lines_of_an_old_log_are_no_illness(tmp_path, line):
    say = []
    health = Health(say.append)
    config = resolve("clip", {"out": str(tmp_path / "run")}, size="debug")
    view = SimpleNamespace(
        config=config, folder=tmp_path, samples=160, step=10, line=line, scores={}, images=0, top_share=0.0
    )
    for _ in range(6):
        health.on_step(view)
        health.on_evaluation(view)
    assert say == []


def test_movement_is_the_relative_change_of_matrices():
    module = torch.nn.Module()
    module.visual = torch.nn.Linear(3, 2)
    movement = Movement(module, pretrained=True)
    assert movement(module) == {"image": 0.0}
    with torch.no_grad():
        module.visual.weight.mul_(1.25)
    assert movement(module) == {"image": 0.25}
    assert Movement(module, pretrained=False)(module) == {}
