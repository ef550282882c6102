"""The best student by the validation curve, runs that end early, and schedules of the rate."""

import json

import pytest
from safetensors.torch import load_file

from clipdistill.errors import InputError, Preempted
from clipdistill.train import loop
from clipdistill.train.best import judge
from clipdistill.train.config import TrainConfig, resolve
from clipdistill.train.loop import learning_rate_factor
from clipdistill.train.run import distill

BEST = ("train.steps=8", "train.evaluate_every=2", "train.keep_best=t2i_R@10")


def settings(out, *assignments):
    return resolve("clip", {"out": str(out)}, size="debug", assignments=assignments)


def curve_of(monkeypatch, values):
    """Every point of the curve has the next of these values."""
    original, left = loop._evaluate, iter(values)

    def evaluated(running):
        point = running.task.evaluate
        running.task.evaluate = lambda: point()._replace(scores={"t2i_R@10": next(left)})
        try:
            original(running)
        finally:
            running.task.evaluate = point

    monkeypatch.setattr(loop, "_evaluate", evaluated)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return all(a[name].equal(b[name]) for name in a)


def test_the_student_is_that_of_the_best_point_and_the_last_is_kept(tmp_path, monkeypatch):
    at_four = distill(settings(tmp_path / "four", *BEST[1:2], "train.steps=4", "train.schedule=constant"), quiet=True)
    curve_of(monkeypatch, [0.1, 0.4, 0.3, 0.4])
    run = distill(settings(tmp_path / "run", *BEST, "train.schedule=constant"), quiet=True)
    assert json.loads((run.folder / "run.json").read_text())["best"]["step"] == 4
    assert same(weights(run.student), weights(at_four.student))
    assert not same(weights(run.folder / "last"), weights(run.student))
    assert not (run.folder / "best").exists()


def test_the_best_of_averaged_weights_is_what_was_measured(tmp_path, monkeypatch):
    """The average of step 1 was measured: neither its live weights nor the last average is the student."""
    curve_of(monkeypatch, [0.4, 0.3])
    ends = ("train.steps=2", "train.evaluate_every=1", "train.checkpoint_every=1", "train.keep_best=t2i_R@10")
    run = distill(settings(tmp_path / "run", *ends, "train.ema_decay=0.9"), quiet=True)
    for step, folder in ((1, run.student), (2, run.folder / "last")):
        average = load_file(run.folder / "checkpoints" / f"step-{step:08d}" / "average.safetensors")
        saved = weights(folder)
        assert all(saved[name.replace("/", ".")].equal(v) for name, v in average.items() if name != "updates"), step


def test_when_the_last_is_the_best_there_is_one_student(tmp_path, monkeypatch):
    curve_of(monkeypatch, [0.1, 0.2, 0.3, 0.4])
    run = distill(settings(tmp_path / "run", *BEST), quiet=True)
    assert not (run.folder / "last").exists()
    assert weights(run.student)


def test_a_run_without_progress_ends_early(tmp_path, monkeypatch, capsys):
    curve_of(monkeypatch, [0.3, 0.2, 0.2, 0.9])
    run = distill(settings(tmp_path / "run", *BEST, "train.patience=2"))
    assert (run.status, run.steps) == ("finished", 6)
    assert "no better t2i_R@10 in 2 points: the run ends at step 6" in capsys.readouterr().err
    assert json.loads((run.folder / "run.json").read_text())["best"] == {
        "step": 2, "metric": "t2i_R@10", "value": 0.3, "since": 2,
    }  # fmt: skip


@pytest.mark.sampled(3)
@pytest.mark.parametrize("stop_at", [4, pytest.param(5, marks=pytest.mark.slow), 7])
def test_a_run_that_was_interrupted_chooses_the_same_student(tmp_path, monkeypatch, stop_at):
    values = {2: 0.3, 4: 0.5, 6: 0.2, 8: 0.1}

    def evaluate(running):
        point = running.task.evaluate
        running.task.evaluate = lambda: point()._replace(scores={"t2i_R@10": values[running.progress.step]})
        original(running)
        running.task.evaluate = point

    original = loop._evaluate
    monkeypatch.setattr(loop, "_evaluate", evaluate)
    whole = distill(settings(tmp_path / "whole", *BEST, "train.patience=1"), quiet=True)

    class Stop:
        def on_step(self, view):
            if view.step == stop_at:
                raise_signal()

    def raise_signal():
        import os
        import signal

        os.kill(os.getpid(), signal.SIGTERM)

    config = settings(tmp_path / "run", *BEST, "train.patience=1")
    if stop_at < whole.steps:
        with pytest.raises(Preempted):
            distill(config, quiet=True, callbacks=[Stop()])
    run = distill(config, quiet=True)
    assert (run.steps, whole.steps) == (6, 6)
    assert same(weights(run.student), weights(whole.student))
    assert same(weights(run.folder / "last"), weights(whole.folder / "last"))


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (("train.keep_best=t2i_R@10",), "train.evaluate_every"),
        (("train.patience=3", "train.evaluate_every=2"), "train.keep_best=t2i_R@1"),
        (("train.keep_best=accuracy", "train.evaluate_every=2"), "keep_best"),
        (("train.decay_share=0.5",), "only for train.schedule=wsd"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, assignments, words):
    with pytest.raises(InputError, match=words):
        settings(tmp_path / "run", *assignments)


def test_of_equal_points_the_first_is_the_best():
    best = judge({}, {"t2i_R@1": 0.2}, "t2i_R@1", 5)
    assert judge(best, {"t2i_R@1": 0.2}, "t2i_R@1", 10) == {"step": 5, "metric": "t2i_R@1", "value": 0.2, "since": 1}
    assert judge(best, {"t2i_R@1": 0.3}, "t2i_R@1", 10)["step"] == 10


def test_the_wsd_schedule_rises_stays_and_falls_to_its_floor():
    config = TrainConfig(steps=100, schedule="wsd", learning_rate=1e-3, final_learning_rate=1e-4)
    factors = [learning_rate_factor(step, 100, 10, config) for step in range(101)]
    assert factors[:11] == pytest.approx([(step + 1) / 10 for step in range(10)] + [1.0])
    assert factors[10:81] == [1.0] * 71
    assert factors[90] == pytest.approx(0.55)
    assert factors[100] == pytest.approx(0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)
