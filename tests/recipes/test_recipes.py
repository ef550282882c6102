"""Every shipped recipe is readable, complete and means what its method says."""

import pytest

from clipdistill.config import read_yaml
from clipdistill.errors import InputError
from clipdistill.recipes import FOLDER, about, load_recipe, recipe_names
from clipdistill.train.config import resolve
from clipdistill.train.stages import resolve_stages

NAMES = recipe_names()


def test_the_published_methods_are_there():
    singles = {f"clip-kd-{term}" for term in ("crd", "fd", "mfd", "gd", "icl", "afd")}
    assert {"clip", "clip-rd", "clip-kd", "tinyclip", "dclip", "mobileclip", "open_clip", "siglip"} | singles <= set(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_recipe_resolves_to_a_typed_run(name, tmp_path):
    teacher = "cache:T" if name == "clipdistill" else "T"  # whose bank comes with a cache
    given = {"teacher": teacher, "student": "S", "data": "scenes", "out": tmp_path}
    if name == "promptkd":
        given["train"] = {"classes": "C"}
    for config in resolve_stages(name, given) or [resolve(name, given)]:
        assert config.objective.weights
        assert (config.train.steps is None) != (config.train.epochs is None)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_header_is_complete(name):
    known = about(name)
    assert known.command.startswith(f"clipdistill train --recipe {name} ")
    assert known.source
    assert known.published
    assert read_yaml(FOLDER / f"{name}.yaml")["about"]["title"] == known.title


def test_clip_rd_is_the_released_mix():
    weights = load_recipe("clip-rd")["objective"]["weights"]
    assert weights == {"task": 1, "crd": 1, "icl": 1, "fd": 2000, "vrd_kl": 1, "vrd_ce": 1, "xrd": 1}
    assert load_recipe("clip-kd")["objective"]["weights"] == {"task": 1, "crd": 1, "icl": 1, "fd": 2000}


def test_steps_and_epochs_replace_each_other(tmp_path):
    given = {"teacher": "T", "student": "S", "data": "scenes", "out": tmp_path}
    config = resolve("clip-rd", given, assignments=["train.steps=7"])
    assert (config.train.steps, config.train.epochs) == (7, None)
    config = resolve("clip-rd", {**given, "train": {"steps": 7}}, assignments=["train.epochs=2"])
    assert (config.train.steps, config.train.epochs) == (None, 2)
    config = resolve("clip-rd", given, size="debug")
    assert (config.train.steps, config.train.epochs) == (3, None)


def test_own_file_builds_on_a_shipped_recipe(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("from: clip-rd\nobjective: {weights: {xrd: 0}}\ntrain: {batch_size: 64}\n")
    values = load_recipe(own)
    assert values["objective"]["weights"]["xrd"] == 0
    assert values["objective"]["weights"]["fd"] == 2000
    assert values["train"]["batch_size"] == 64
    assert load_recipe(own, size="debug")["train"]["steps"] == 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_recipe("clip-rdd"), "unknown recipe 'clip-rdd' (did you mean 'clip-rd'?)"),
        (lambda: load_recipe("absent.yaml"), "no such file"),
        (lambda: load_recipe("clip", size="hgue"), "no size 'hgue'"),
        (lambda: resolve("clip-rd", {"student": "S", "data": "scenes", "out": "x"}), "need a teacher"),
        (
            lambda: resolve("clipdistill", {"teacher": "T", "student": "S", "data": "d", "out": "x"}),
            "--teacher cache:DIR",
        ),
        (lambda: resolve("clip", {"data": "scenes", "out": "x"}), "no student was named"),
        (lambda: resolve("clip", {"student": "S", "data": "d", "out": "x"}, assignments=["train.stesp=3"]), "'steps'"),
        (lambda: resolve("clip-kd", {"teacher": "A,B", "student": "S", "data": "d", "out": "x"}), "several teachers"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)


def test_recipes_cannot_lead_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text(f"from: {tmp_path / 'b.yaml'}\n")
    (tmp_path / "b.yaml").write_text(f"from: {tmp_path / 'a.yaml'}\n")
    with pytest.raises(InputError, match="back to the same recipe"):
        load_recipe(tmp_path / "a.yaml")


def test_a_student_that_goes_on_from_weights_needs_no_other_name() -> None:
    config = resolve("clip", {"data": "scenes", "out": "x", "student_weights": "scenes-teacher"})
    assert config.student == config.student_weights == "scenes-teacher"
