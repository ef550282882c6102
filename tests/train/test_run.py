"""`distill` from start to end on built-in data: what is written, exact resume, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from clipdistill.errors import InputError, Preempted
from clipdistill.models import load_student
from clipdistill.runs.folder import read_rows as read_lines
from clipdistill.train import distil
from clipdistill.train.config import resolve
from clipdistill.train.run import distill
from tests.train.support import require_same_run, stop_after


def settings(out, recipe="clip-rd", *assignments):
    return resolve(recipe, {"out": str(out)}, size="debug", assignments=["train.steps=6", *assignments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    return distill(settings(out, "clip-rd", "train.evaluate_every=3"), quiet=True)


def test_the_run_folder_is_complete(finished):
    folder = finished.folder
    described = json.loads((folder / "run.json").read_text())
    assert described["status"] == "finished"
    assert (described["steps"], described["samples_seen"]) == (6, 6 * 16)
    assert described["objective"] == {"task": 1, "crd": 1, "icl": 1, "fd": 2000, "vrd_kl": 1, "vrd_ce": 1, "xrd": 1}
    lines = read_lines(folder / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert set(lines[0]["terms"]) == set(described["objective"])
    assert all(line["total"] > 0 and line["grad_norm"] > 0 for line in lines)
    assert [line["step"] for line in read_lines(folder / "eval.jsonl")] == [3, 6]
    assert finished.scores is not None
    assert {"t2i_R@1", "i2t_R@1"} <= {score.metric for score in finished.scores}
    assert {score.model for score in finished.scores} >= {"student", "teacher"}


def test_the_student_loads_and_encodes(finished):
    model, preprocess, tokenizer = load_student(finished.student)
    from PIL import Image

    image = preprocess(Image.new("RGB", (40, 50), "red")).unsqueeze(0)
    with torch.no_grad():
        a, b = model.encode_image(image), model.encode_text(tokenizer(["a red circle"]))
    assert a.shape == b.shape


def test_a_finished_run_is_returned_not_repeated(finished):
    before = (finished.folder / "run.json").stat().st_mtime_ns
    again = distill(settings(finished.folder, "clip-rd", "train.evaluate_every=3"), quiet=True)
    assert again.status == "finished"
    assert (finished.folder / "run.json").stat().st_mtime_ns == before


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("train.micro_batch=5",),
        pytest.param(("train.precision=bf16",), marks=pytest.mark.slow),
        pytest.param(("train.workers=2",), marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_continues_to_the_bit(tmp_path, monkeypatch, extra):
    changes = ("train.log_every=2", "train.evaluate_every=3", *extra)
    whole = distill(settings(tmp_path / "whole", "clip-rd", *changes), quiet=True)
    stop_after(monkeypatch, 3)
    with pytest.raises(Preempted, match="after step 3"):
        distill(settings(tmp_path / "parts", "clip-rd", *changes), quiet=True)
    monkeypatch.undo()
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "stopped"
    parts = distill(settings(tmp_path / "parts", "clip-rd", *changes), quiet=True)
    require_same_run(whole.folder, parts.folder, 6)


def test_changed_settings_are_refused_with_the_difference(finished):
    with pytest.raises(InputError, match=r"train\.learning_rate: 0\.001 -> 0\.5"):
        distill(settings(finished.folder, "clip-rd", "train.evaluate_every=3", "train.learning_rate=0.5"), quiet=True)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        distill(settings(tmp_path), quiet=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_teacher_at_chance_stops_the_run(tmp_path):
    from clipdistill.models import build_student, save_model

    save_model(build_student("scenes-student", seed=3, captions=["a red circle"]), tmp_path / "random")
    with pytest.raises(InputError, match="guessing"):
        distill(settings(tmp_path / "run", "clip-rd", f"teacher={tmp_path / 'random'}"), quiet=True)


def test_explain_prints_every_term_and_trains_nothing(tmp_path, capsys):
    distill(settings(tmp_path / "run"), explain=True)
    shown = capsys.readouterr().err
    for term in ("task", "crd", "icl", "fd", "vrd_kl", "vrd_ce", "xrd"):
        assert term in shown
    assert "gradient norm" in shown
    assert "16 pairs" in shown
    assert "6: 1.5 epochs of 4, 96 pairs" in shown
    assert "0.001, rising over 1 steps; then cosine to 0" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("poison", ["loss", "all"])
def test_non_finite_steps_are_skipped_recorded_and_limited(tmp_path, monkeypatch, poison):
    original = distil.forward_backward
    seen = []

    def poisoned(towers, *args, **kwargs):
        output = original(towers, *args, **kwargs)
        seen.append(1)
        if len(seen) == 2 or poison == "all":
            next(iter(towers.parameters())).grad.fill_(float("nan"))
        return output

    monkeypatch.setattr(distil, "forward_backward", poisoned)
    if poison == "all":
        from clipdistill.errors import BudgetError

        with pytest.raises(BudgetError, match="max_skipped_steps=3"):
            distill(settings(tmp_path / "run"), quiet=True)
        return
    run = distill(settings(tmp_path / "run"), quiet=True)
    described = json.loads((run.folder / "run.json").read_text())
    assert described["skipped_steps"] == 1
    [record] = (run.folder / "skipped_steps").glob("*.json")
    assert len(json.loads(record.read_text())["keys"]) == 16
    assert all(torch.isfinite(v).all() for v in load_file(run.student / "model.safetensors").values())
