"""What is said of settings that come to nothing, or that say two things."""

import re

import pytest

from clipdistill.cli import main
from clipdistill.config import build
from clipdistill.errors import InputError
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.recipes import recipe_names
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.idle import idle
from clipdistill.train.run import distill

NAMES = {"teacher": "cache:store", "student": "scenes-student", "data": "scenes", "out": "run"}
IDLE = {
    "train.final_learning_rate=0.0001 train.schedule=constant": "a train.schedule that falls",
    "train.prompt_depth=3": "train.image_prompts",
    "train.classes=classes": "the term class_kd",
    "train.bank_samples=8": "a term that compares with the whole set",
    "train.stored_views=3": "train.views=stored without a cache",
    "train.teacher_logit_scale=20": "a term that reads a teacher",
    "train.logit_bias_init=3": "the term sigmoid",
    "train.evaluate_every=5": "--validation",
    "evaluation.curve_images=50": "train.evaluate_every",
    "evaluation.protocol=first-caption": "--validation",
    "evaluation.teacher=scenes-teacher": "--validation or --zero-shot",
    "objective.gd_temperature=fixed": "no term of it has a weight",
}


@pytest.mark.parametrize("given", IDLE)
def test_a_setting_that_nothing_reads_is_said(given):
    config = resolve("clip", NAMES, assignments=[*given.split(), "train.warmup_steps=0"])
    [sentence] = idle(config, 100)
    assert sentence.startswith(f"{given.partition('=')[0]} is not read in this run: ")
    assert sentence.endswith(IDLE[given]) or IDLE[given] in sentence


def test_what_a_run_reads_is_not_said():
    given = (
        "train.evaluate_every=5 evaluation.curve_images=50 evaluation.teacher=scenes-teacher train.prompt_depth=3 "
        "train.image_prompts=2 train.schedule=wsd train.final_learning_rate=0.0001 train.teacher_logit_scale=20"
    )
    config = resolve("clip-kd", {**NAMES, "validation": "scenes"}, assignments=given.split())
    assert idle(config, 10**6) == []


@pytest.mark.parametrize("name", recipe_names())
def test_no_shipped_recipe_sets_what_it_does_not_read(name):
    if "stages" in name:
        return
    classes = {"train": {"classes": "classes"}} if name == "promptkd" else {}
    assert idle(resolve(name, {**NAMES, **classes, "validation": "scenes"}), 10**7) == []


@pytest.mark.parametrize(
    ("capability", "precision", "told"), [("AVX2", "bf16", 1), ("AVX512", "bf16", 0), ("AVX2", "fp32", 0)]
)
def test_bfloat16_that_a_processor_has_not_is_said(monkeypatch, capability, precision, told):
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    config = resolve("clip", {**NAMES, "device": "cpu"}, assignments=[f"train.precision={precision}"])
    said = idle(config, 10**6)
    assert [sentence.startswith("warning: train.precision=bf16: this processor") for sentence in said] == [True] * told


@pytest.mark.parametrize(("steps", "told"), [(19, True), (20, False)])
def test_a_warm_up_over_most_of_the_run_is_said(steps, told):
    said = idle(resolve("clip", NAMES, assignments=["train.warmup_steps=10"]), steps)
    assert said == ["warning: the rate rises over train.warmup_steps=10 steps, and the run has 19: a tenth is usual, "
                    "train.warmup_steps=1"] * told  # fmt: skip


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("train.logit_scale_init=200", "above train.max_logit_scale"),
        ("train.final_learning_rate=0.5", "above train.learning_rate"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(assignment, sentence):
    with pytest.raises(InputError, match=sentence):
        resolve("clip", NAMES, assignments=[assignment])


@pytest.mark.parametrize("recipe", ["clip", "assistant-stages"])
@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ("--data captions.json --split train", "data.split=val"),
        ("--data captions.json", "data=scenes"),
        ("--student scenes-student", "student=ViT-T-16"),
        ("--protocol standard", "evaluation.protocol=first-caption"),
    ],
)
def test_an_option_and_a_setting_that_differ_are_refused(recipe, options, setting, tmp_path, capsys):
    arguments = ["--recipe", recipe, *options.split(), "--out", str(tmp_path / "run"), "train.steps=2", setting]
    for command in ("train", *(["ablate"] if recipe == "clip" else [])):
        assert main([command, *arguments]) == 2
        assert f"{setting}: an option says " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_option_and_a_setting_that_agree_are_taken():
    config = resolve("clip", NAMES, assignments=["student=scenes-student", "data.path=scenes", "train.steps=2"])
    assert build(RunConfig, config.model_dump(), "again").student == "scenes-student"


@pytest.mark.parametrize("name", ["nowhere", "{}/empty", "cifar10@{}/empty", "winoground"])
def test_a_set_to_classify_that_cannot_be_read_is_told_before_the_first_step(name, tmp_path):
    (tmp_path / "empty").mkdir()
    given = {"out": str(tmp_path / "run"), "evaluation": {"zero_shot": [name.format(tmp_path)]}}
    with pytest.raises(InputError):
        distill(resolve("clip", given, size="debug"), quiet=True)
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_the_model_measured_beside_the_student_needs_no_term_that_reads_a_teacher(tmp_path):
    given = {"out": str(tmp_path / "run"), "evaluation": {"teacher": "scenes-teacher"}, "train": {"steps": 1}}
    run = distill(resolve("clip", given, size="debug", assignments=["validation.size=8"]), quiet=True)
    assert run.scores.models() == ["student", "teacher"]


def test_options_of_terms_without_a_weight_are_known_and_left_out():
    config = ObjectiveConfig(weights={"task": 1}, gd_temperature="fixed")
    assert (config.idle, config.options) == (("gd_temperature",), {})
    assert ObjectiveConfig(weights={"gd": 1}, gd_temperature="fixed").idle == ()


def test_a_run_in_which_nothing_trains_says_so_and_explain_is_no_dry_run(tmp_path, capsys):
    locked = ["train.lock_image=all", "train.lock_text=all", "train.prompt_depth=3"]
    distill(resolve("clip", {"out": str(tmp_path / "run")}, size="debug", assignments=locked), explain=True)
    said = capsys.readouterr().err
    assert "nothing but the logit scale trains" in said
    assert "train.prompt_depth is not read" in said
    assert main(["train", "--recipe", "clip", "--size", "debug", "--explain", "--dry-run"]) == 2
    assert "leave one of them out" in capsys.readouterr().err


def test_a_set_smaller_than_the_batch_is_reckoned_with(tmp_path, capsys):
    few = {"path": "scenes:train", "size": 12}
    given = {"out": str(tmp_path / "run"), "data": few, "validation": few}
    distill(resolve("clip", given, size="debug", assignments=["train.batch_size=32", "train.steps=2"]), explain=True)
    said = "".join(capsys.readouterr())
    assert "2 steps of 12\n" in said
    assert "engine for N=12:" in said
    assert re.search(r"\nbatch +12 pairs\n", said)
    assert re.search(r"\nsteps +2: 2 epochs of 1, 24 pairs\n", said)
    assert "warning: validation has the very pairs that are trained on" in said
    assert "teacher 0.0%" not in said
    distill(resolve("clip", {**given, "validation": None}, size="debug", assignments=["train.steps=2"]), explain=True)
    said = "".join(capsys.readouterr())
    assert re.search(r"\ncurve +(none: no validation set|at the end only)\n", said)
    assert "very pairs" not in said
