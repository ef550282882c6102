"""Opening a run folder: whose it is, what it began with, who is in it, what is damaged in it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipdistill import cli
from clipdistill.errors import InputError, Preempted
from clipdistill.models import build_student, save_model
from clipdistill.runs.folder import RunFolder, stale_scores
from clipdistill.runtime.locks import Claims, FolderLock, holder
from clipdistill.statistics.scores import Scores
from clipdistill.train.config import TrainConfig, resolve
from clipdistill.train.distil import Distillation
from clipdistill.train.opening import check_identity
from clipdistill.train.run import distill


def settings(out, *assignments, recipe="clip-kd", **given):
    common = ["train.steps=4", "train.checkpoint_every=2", "preflight.enabled=false"]
    return resolve(recipe, {"out": str(out), **given}, size="debug", assignments=[*common, *assignments])


@pytest.fixture
def models(tmp_path):
    """Two teachers and a student to start from, in folders whose content the tests change."""
    for name, seed in (("teacher", 1), ("other", 2), ("start", 3)):
        save_model(build_student("scenes-student", seed=seed, captions=["a red circle"]), tmp_path / name)
    return tmp_path


def stopped(config, monkeypatch, step=2):
    """A run that was asked to stop after `step` steps."""
    original = Distillation.gradients

    def stopping(task, number, batch):
        if number == step:
            raise Preempted("asked to stop")
        return original(task, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "gradients", stopping)
        with pytest.raises(Preempted):
            distill(config, quiet=True)
    return RunFolder(config.out)


def test_another_teacher_at_the_same_path_is_refused_and_recorded_when_let_through(models, tmp_path, monkeypatch):
    given = {"teacher": str(models / "teacher"), "student_weights": str(models / "start")}
    config = settings(tmp_path / "run", **given)
    run = stopped(config, monkeypatch)
    first = json.loads((run / "identity.json").read_text())
    assert set(first["parts"]) == {
        "training data", "training images", "validation data", "teacher", "starting student", "tokenizer"
    }  # fmt: skip
    shutil.rmtree(models / "teacher")
    shutil.copytree(models / "other", models / "teacher")
    with pytest.raises(InputError, match="the teacher is not what the run began with"):
        distill(config, quiet=True)
    assert json.loads((run / "identity.json").read_text()) == first
    assert distill(config, quiet=True, allow_changes=True).status == "finished"
    second = json.loads((run / "identity.json").read_text())
    assert second["parts"] == first["parts"]  # never overwritten
    [change] = second["changes"]
    assert (change["part"], change["step"], change["before"]) == ("teacher", 2, first["parts"]["teacher"])


def test_another_starting_student_is_refused(models, tmp_path, monkeypatch):
    config = settings(tmp_path / "run", student_weights=str(models / "start"))
    stopped(config, monkeypatch)
    shutil.rmtree(models / "start")
    shutil.copytree(models / "other", models / "start")
    with pytest.raises(InputError, match="the starting student is not what the run began with"):
        distill(config, quiet=True)


def test_other_pictures_and_another_plug_in_under_the_same_names_are_refused(tmp_path, monkeypatch):
    (tmp_path / "plugin.py").write_text("SIZE = 1\n")
    rows = "".join(f"{i}.png,a red circle {i}\n" for i in range(16))
    (tmp_path / "table.csv").write_text(f"filepath,title\n{rows}")
    for i in range(16):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i}.png")
    given = {"data": {"path": str(tmp_path / "table.csv")}, "plugins": [str(tmp_path / "plugin.py")]}
    config = settings(tmp_path / "run", "train.batch_size=8", teacher="scenes-teacher", **given)
    stopped(config, monkeypatch)
    Image.new("RGB", (40, 40), (0, 99, 0)).save(tmp_path / "2.png")
    with pytest.raises(InputError, match="the training images are not what the run began with"):
        distill(config, quiet=True)
    Image.new("RGB", (40, 40), (2, 0, 0)).save(tmp_path / "2.png")
    (tmp_path / "plugin.py").write_text("SIZE = 2\n")
    with pytest.raises(InputError, match=r"the plug-in plugin\.py is not what the run began with"):
        distill(config, quiet=True)


def test_what_the_run_began_with_is_compared_part_by_part(tmp_path):
    run = RunFolder(tmp_path)
    parts = {"training data": "aa", "teacher": "bb"}
    assert check_identity(run, parts, 0, False) == []
    assert check_identity(run, parts, 4, False) == []
    changed = {**parts, "training data": "cc"}
    with pytest.raises(InputError, match="the training data is not what the run began with"):
        check_identity(run, changed, 4, False)
    assert len(check_identity(run, changed, 4, True)) == 1
    assert check_identity(run, changed, 6, False) == []  # let through once, it is the run's
    with pytest.raises(InputError, match="the training data is not"):
        check_identity(run, parts, 6, False)
    with pytest.raises(InputError, match="the teacher and the training data are not"):
        check_identity(run, {"training data": "dd"}, 6, False)
    (run / "identity.json").write_text("[]")
    [said] = check_identity(run, parts, 6, False)
    assert "damaged" in said
    assert (run / "identity.json.damaged-1").exists()


def test_a_run_of_an_older_version_is_compared_by_what_it_recorded(tmp_path):
    run = RunFolder(tmp_path)
    run.write_facts({"status": "stopped", "data_fingerprint": "aa", "initial_weights": "bb"})
    parts = {"training data": "aa", "starting student": "cc", "teacher": "dd"}
    with pytest.raises(InputError, match="the starting student is not"):
        check_identity(run, parts, 4, False)
    assert check_identity(run, {**parts, "starting student": "bb"}, 4, False) == []


def test_scores_of_a_student_that_was_trained_on_are_stale(tmp_path):
    config = settings(tmp_path / "run", recipe="clip")
    finished = distill(config, quiet=True)
    run = RunFolder(finished.folder)
    measured = Scores.load(run / "scores.json")
    fingerprint = next(s.protocol.model_fingerprint for s in measured if s.model == "student")
    assert stale_scores(run.facts(), fingerprint) is None
    longer = settings(tmp_path / "run", "train.steps=6", "validation=null", recipe="clip")
    with pytest.raises(InputError, match=r"train\.steps: 4 -> 6"):
        distill(longer, quiet=True)
    assert stale_scores(run.facts(), fingerprint) is None
    distill(longer, quiet=True, allow_changes=True)
    assert "other weights" in str(stale_scores(run.facts(), fingerprint))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("content", [b"", b"\0" * 300, b"[]", b"\xff\xfe"])
@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "log.jsonl", "eval.jsonl", "bad_samples.jsonl"])
def test_a_damaged_file_beside_a_whole_checkpoint_is_set_aside(tmp_path, monkeypatch, undamaged, name, content):
    source, weights = undamaged
    shutil.copytree(source, tmp_path / "run")
    config = settings(tmp_path / "run", "train.evaluate_every=2", recipe="clip")
    run = RunFolder(tmp_path / "run")
    (run / name).write_bytes(content)
    finished = distill(config, quiet=True)
    assert finished.status == "finished"
    assert json.loads((run / "run.json").read_text())["steps"] == 4
    found = load_file(finished.student / "model.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in weights.items())
    if content or not name.endswith("jsonl"):  # an empty log is a log
        assert (run / f"{name}.damaged-1").read_bytes() == content


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """A run that was stopped in the middle, and the weights it ends with."""
    tmp_path = tmp_path_factory.mktemp("undamaged")
    with pytest.MonkeyPatch.context() as patch:
        run = stopped(settings(tmp_path / "run", "train.evaluate_every=2", recipe="clip"), patch)
    shutil.copytree(run.path, tmp_path / "whole")
    done = distill(
        settings(tmp_path / "whole", "train.evaluate_every=2", recipe="clip"), quiet=True, allow_changes=True
    )
    return run.path, load_file(done.student / "model.safetensors")


@pytest.mark.parametrize("quiet", [False, True])
def test_a_run_without_a_whole_checkpoint_says_that_it_begins_again(tmp_path, undamaged, capsys, caplog, quiet):
    source, weights = undamaged
    shutil.copytree(source, tmp_path / "run")
    for state in (tmp_path / "run" / "checkpoints").glob("step-*/state.json"):
        state.write_bytes(b"")
    done = distill(settings(tmp_path / "run", "train.evaluate_every=2", recipe="clip"), quiet=quiet)
    said = capsys.readouterr().err + caplog.text
    assert "passed over" in said
    assert "no whole checkpoint is left: the run begins again at step 0" in said
    found = load_file(done.student / "model.safetensors")
    assert all(torch.equal(value, found[key]) for key, value in weights.items())


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from clipdistill.runtime.locks import FolderLock\n"
        "with FolderLock(Path(sys.argv[1]), 'held'): print('in', flush=True); time.sleep(60)"
    )
    out = tmp_path / "run"
    out.mkdir()
    child = subprocess.Popen([sys.executable, "-c", script, str(out / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        with pytest.raises(InputError, match=rf"process {child.pid} on {socket.gethostname()} since \d{{4}}-"):
            distill(settings(out, recipe="clip"), quiet=True)
        assert not (out / "recipe.yaml").exists()
    finally:
        child.kill()
        child.wait()
    assert distill(settings(out, recipe="clip"), quiet=True).status == "finished"  # the lock of the dead
    assert not (out / ".lock").exists()


def owner(path, **values):
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1", **values}))


@pytest.mark.parametrize(
    ("values", "age", "held"),
    [
        ({"host": "elsewhere"}, 0, True),
        ({"host": "elsewhere"}, 3600, False),
        ({"host": "elsewhere"}, -3600, False),  # a clock that was set back: a living holder would have renewed it
        ({"space": "pid:[1]"}, 0, True),  # another container of the same name
        ({}, 0, False),  # the process number was used again
        ({"pid": 4_000_000}, -3600, False),
        ({"pid": -1}, 60, False),
        ({"pid": True}, -3600, False),
        ({"pid": 1 << 80}, 60, False),
    ],
)
def test_locks_of_the_dead_of_other_machines_and_of_other_times(tmp_path, values, age, held):
    path = tmp_path / "a.lock"
    owner(path, **values)
    os.utime(path, (time.time() - age,) * 2)
    assert Claims(tmp_path).take("a") != held
    owner(path, **values)
    os.utime(path, (time.time() - age,) * 2)
    if held:
        with pytest.raises(InputError, match="held"):
            FolderLock(path, "held").__enter__()
    else:
        with FolderLock(path, "held"):
            assert f"process {os.getpid()}" in holder(path)
        assert not path.exists()


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pid": "x"}', b"[" * 100_000])
def test_a_lock_that_cannot_be_read_is_taken_over_after_a_moment(tmp_path, content):
    path = tmp_path / "a.lock"
    path.write_bytes(content)
    assert not Claims(tmp_path).take("a")
    os.utime(path, (time.time() - 60,) * 2)
    assert Claims(tmp_path).take("a")


@pytest.mark.parametrize(
    "setting",
    [
        "data.size=99999999999999999999",
        "plugins=-1",
        "plugins=0",
        "plugins=[1]",
        "train.seed=-1",
        "train.seed=18446744073709551616",
        "train.betas=[0.9, 1.5]",
        "train.betas=[-1, 0.9]",
        "train.betas=[.nan, 0.9]",
        "train.betas=[true, 0.9]",
        "train.epsilon=0",
        "train.epsilon=-1",
        "train.rank_timeout=1.0e+300",
        "train.rank_timeout=.inf",
        "train.learning_rate=.inf",
        "train.learning_rate=.nan",
        "train.steps=true",
        "train.batch_size=true",
        "train.logit_bias_init=.nan",
        "train.teacher_logit_scale=-3",
        "train.teacher_logit_scale=[1, 0]",
        "train.max_logit_scale=0.5",
        "objective.weights.task=true",
        "data.seed=true",
        "evaluation.batch_size=true",
    ],
)
def test_values_that_no_run_can_have_are_refused_by_name(tmp_path, setting):
    with pytest.raises(InputError, match=setting.partition("=")[0].rpartition(".")[2]) as error:
        settings(tmp_path, setting)
    assert "\n" not in str(error.value)


def test_true_is_still_true_where_it_is_asked_for(tmp_path):
    assert settings(tmp_path, "train.deterministic=true").train.deterministic
    assert TrainConfig(compile=True).compile


@pytest.mark.parametrize("size", ["debug", "demo"])
def test_own_data_is_not_measured_on_the_built_in_set(tmp_path, size):
    config = resolve("clip-rd", {"out": str(tmp_path), "data": {"path": "mine.csv"}}, size=size)
    assert (config.data.path, config.data.size, config.validation) == ("mine.csv", None, None)
    assert config.evaluation.zero_shot == ()
    own = {"data": {"path": "mine.csv"}, "validation": {"path": "val.csv"}, "out": str(tmp_path)}
    config = resolve("clip-rd", own, size=size, assignments=["evaluation.zero_shot=[mine]"])
    assert config.validation is not None
    assert (config.validation.path, config.validation.size) == ("val.csv", None)
    assert config.evaluation.zero_shot == ("mine",)
    config = resolve("clip-rd", {"out": str(tmp_path), "data": {"path": "scenes:train?size=40"}}, size=size)
    assert config.validation is not None


def test_explain_needs_no_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--recipe", "clip", "--size", "debug", "--explain", "--teacher", "scenes-teacher"]) == 0
    said = capsys.readouterr().err
    assert "gradient norm" in said
    assert "no term reads a teacher: scenes-teacher teaches nothing" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a file", "a dead link", "n" * 300])
def test_places_that_cannot_be_a_run_folder(tmp_path, name):
    out = tmp_path / name
    if name == "a file":
        out.write_text("keep")
    elif name == "a dead link":
        out.symlink_to(tmp_path / "nowhere" / "at-all")
    with pytest.raises(InputError, match="cannot be written as the place for the run"):
        distill(settings(out, recipe="clip"), quiet=True)


def test_text_of_the_user_is_no_markup(tmp_path, capsys):
    config = settings(tmp_path / "a[/b]", "train.log_every=1", recipe="clip", name="lr[/0.1]")
    distill(config)
    said = capsys.readouterr().err
    assert "lr[/0.1]  step 4/4" in said


def test_what_was_left_out_is_told_without_the_look_before_the_run(models, tmp_path, capsys):
    for number in range(16):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number}.jpg")
    rows = [f"{number}.jpg,a red circle" for number in range(16)]
    (tmp_path / "t.csv").write_text("\n".join(["filepath,title", *rows, "3.jpg,a dog, a cat"]) + "\n")
    given = {"teacher": str(models / "teacher"), "data": {"path": str(tmp_path / "t.csv")}}
    distill(settings(tmp_path / "run", "train.steps=1", "data.bad_sample_budget=0.5", **given))
    assert "left out when opening the data: 1 " in capsys.readouterr().err
