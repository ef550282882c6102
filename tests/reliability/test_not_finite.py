"""Row 13: a step that is not finite changes nothing, is kept, and can be run again and looked into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from clipdistill.errors import InputError
from clipdistill.models import build_student, load_model, save_model
from clipdistill.runtime.files import CHECKSUM
from clipdistill.train.checkpoint import read_checkpoint
from clipdistill.train.replay import replay
from clipdistill.train.step import Statistics
from tests.reliability.support import Launcher, newest_step, require_same_run, training


def test_row_13_skipped_captured_and_replayed(
    launcher: Launcher, models: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    said = launcher.start(*training(models, out), fault="nan_gradient", step=2).finish()
    assert "the step is skipped" in " ".join(said.split())
    record = json.loads((out / "skipped_steps" / "step-00000002-rank-0.json").read_text())
    assert len(record["keys"]) == len(record["captions"]) == len(record["views"]) == 8
    found = replay(out)
    assert found.step == 2
    assert found.first is None
    assert "all finite" in found.advice
    values = {finding.what: finding.largest for finding in found.findings}
    for term, value in record["terms"].items():  # the very same step: state, samples, views
        assert values[f"term {term}"] == pytest.approx(abs(value), rel=1e-6), term
    checkpoint = read_checkpoint(out / "skipped_steps" / "state" / "step-00000002")
    assert checkpoint.state["skipped_steps"] == 1
    # what came before the skipped step is what it would have been
    first = [json.loads((run / "log.jsonl").read_text().splitlines()[0])["total"] for run in (undisturbed, out)]
    assert first[0] == first[1]


def test_row_13_too_many_stop_the_run_and_replay_says_where_it_begins(
    launcher: Launcher, models: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = training(models, out, "train.max_skipped_steps=1")
    said = " ".join(launcher.start(*settings, fault="grown_weights", step=0).finish(3).split())
    assert "was not finite in 2 steps of this run" in said
    assert f"clipdistill replay {out}" in said
    assert newest_step(out) == 2  # after the first of the two; the step that ended the run wrote nothing
    said = launcher.start("replay", out, "--step", 1).finish()
    assert "NOT FINITE" in said
    assert "it begins at: student, output of" in said
    assert "weights have grown to 1" in said
    found = replay(out, 1)
    assert found.first is not None
    assert found.first.what in said
    # every line before the one where it begins is finite
    before = found.findings[: found.findings.index(found.first)]
    assert [str(finding).split()[0] for finding in before] == ["pixels", "weights", "teacher,", "teacher,", "teacher,"]


def test_row_13_a_broken_teacher_is_found_out(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    """Weights that are finite, and embeddings that are not: weights that are no numbers are refused when loaded."""
    model = load_model(models / "teacher")
    with torch.no_grad():
        model.module.visual.proj[:, 3] = 3e38  # finite, what it makes is not
    save_model(model, tmp_path / "teacher")
    out = tmp_path / "run"
    settings = training(models, out, "train.max_skipped_steps=0", "preflight.enabled=false")
    settings[settings.index("--teacher") + 1] = str(tmp_path / "teacher")
    launcher.start(*settings).finish(3)
    found = replay(out)
    assert found.first is not None
    assert found.first.what == "teacher, image embeddings"
    assert len(found.first.keys) == 8
    assert "check the data and the teacher" in found.advice


def test_row_13_what_cannot_be_replayed_is_said(undisturbed: Path, models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        replay(tmp_path)
    with pytest.raises(InputError, match="no step of this run was skipped"):
        replay(undisturbed)


def test_row_13_other_data_or_another_step_is_refused(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    launcher.start(*training(models, out, "train.steps=2"), fault="nan_gradient", step=1).finish()
    with pytest.raises(InputError, match="step 0 was not captured; captured: 1"):
        replay(out, 0)
    path = out / "skipped_steps" / "step-00000001-rank-0.json"
    record = json.loads(path.read_text())
    del record[CHECKSUM]
    path.write_text(json.dumps({**record, "keys": ["other", *record["keys"][1:]]}))
    with pytest.raises(InputError, match="the data now gives another batch for step 1: sample 0 was 'other'"):
        replay(out)
    path.write_text("{")
    with pytest.raises(InputError, match="not the record of a captured step"):
        replay(out)


def test_row_13_running_statistics_do_not_keep_what_was_skipped() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module(torch.randn(8, 3))
    statistics = Statistics(module)
    statistics.keep()
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module(torch.full((8, 3), float("nan")))
    assert module[1].running_mean.isnan().all()
    statistics.restore()
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_row_13_a_resnet_student_survives_a_bad_batch(launcher: Launcher, models: Path, tmp_path: Path) -> None:
    tokenizer = load_model(models / "student").tokenizer
    architecture = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {"context_length": 24, "vocab_size": 512, "width": 32, "heads": 1, "layers": 1},
    }
    save_model(build_student(architecture, seed=4, tokenizer=tokenizer), tmp_path / "resnet")
    out = tmp_path / "run"
    settings = training(models, out, "train.steps=3")
    settings[settings.index("--student-weights") + 1] = str(tmp_path / "resnet")
    launcher.start(*settings, fault="nan_pixels", step=1).finish()
    assert json.loads((out / "run.json").read_text())["skipped_steps"] == 1
    assert all(v.isfinite().all() for v in load_model(out).module.state_dict().values())
    launcher.start(*settings[:-1], "train.steps=3", "--out", tmp_path / "again", fault="nan_pixels", step=1).finish()
    require_same_run(out, tmp_path / "again", 3)
