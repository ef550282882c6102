"""Plans: what variants a command or a file describes, and what settings each becomes."""

import pytest

from clipdistill.ablate.plan import AblationPlan, matching, plan_of_recipes, read_plan, settings_of
from clipdistill.config import build
from clipdistill.errors import InputError

WEIGHTS = {
    "clip-rd": {"task": 1, "crd": 1, "fd": 2000, "vrd_kl": 1, "vrd_ce": 1, "xrd": 1},
    "clip-kd": {"task": 1, "crd": 1, "fd": 2000},
}


def names(recipes, **options):
    return list(plan_of_recipes(recipes, weights_of={r: WEIGHTS[r] for r in recipes}, **options))


def test_each_switch_makes_one_variant_of_each_recipe_it_fits():
    assert names(["clip-rd"], drop=["vrd", "xrd"]) == ["clip-rd", "clip-rd-without-vrd", "clip-rd-without-xrd"]
    assert names(["clip-rd"], drop=["vrd+xrd"]) == ["clip-rd", "clip-rd-without-vrd+xrd"]
    assert names(["clip-rd", "clip-kd"], drop=["xrd", "fd"]) == [
        "clip-rd",
        "clip-kd",
        "clip-rd-without-xrd",
        "clip-rd-without-fd",
        "clip-kd-without-fd",
    ]
    assert names(["clip-kd"], add=["affinity=2"], weights=["fd=500"]) == [
        "clip-kd",
        "clip-kd-with-affinity=2",
        "clip-kd-fd=500",
    ]


def test_students_teachers_and_batches_cross_everything():
    found = plan_of_recipes(
        ["clip-kd"], drop=["fd"], students=["ViT-T-16", "ViT-S-16"], batch_sizes=[64, 128], weights_of=WEIGHTS
    )
    assert len(found) == 2 * 2 * 2
    one = found["clip-kd-without-fd@ViT-S-16@batch-64"]
    assert (one.student, one.batch_size, one.drop) == ("ViT-S-16", 64, ("fd",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["icl"]}, "--drop icl: fits none of the recipes"),
        ({"add": ["fd=1"]}, "--add fd=1: fits none"),
        ({"weights": ["xrd=1"]}, "--weight xrd=1: fits none"),
        ({"weights": ["fdd=1"]}, r"unknown term 'fdd' \(did you mean 'fd'"),
        ({"weights": ["fd"]}, "write term=weight"),
        ({"weights": ["fd=much"]}, "write term=weight"),
    ],
)
def test_switches_that_cannot_be_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        names(["clip-kd"], **options)


def test_a_group_stands_for_its_terms():
    assert matching("vrd", WEIGHTS["clip-rd"]) == ["vrd_kl", "vrd_ce"]
    assert matching("vrd_kl", WEIGHTS["clip-rd"]) == ["vrd_kl"]
    assert matching("vrd", {"vrd_kl": 0.0, "vrd_ce": 1.0}) == ["vrd_ce"]
    assert matching("fd", {"fd_other": 1.0, "fd": 2.0}) == ["fd"]


def variant(**values):
    return build(AblationPlan, {"variants": {"one": {"recipe": "clip-rd", **values}}}, "plan").variants["one"]


def test_the_switches_of_a_variant_become_settings():
    base = {"objective": {"weights": dict(WEIGHTS["clip-rd"])}, "train": {"batch_size": 8, "epochs": 3}}
    one = variant(drop="vrd, xrd", add={"affinity": 0.5}, weights={"fd": 10}, batch_size=4, settings={"train.steps": 7})
    found = settings_of(one, base, "variant 'one'")
    assert found["objective"]["weights"] == {
        "task": 1,
        "crd": 1,
        "fd": 10,
        "vrd_kl": 0,
        "vrd_ce": 0,
        "xrd": 0,
        "affinity": 0.5,
    }
    assert found["train"] == {"batch_size": 4, "steps": 7}  # a length in steps replaces one in epochs
    assert base["objective"]["weights"]["xrd"] == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drop": ["icl"]}, "variant 'one': no term 'icl' to drop"),
        ({"add": {"xrd": 1}}, "has the term 'xrd' already"),
        ({"weights": {"icl": 1}}, "has no term 'icl' to weight"),
        ({"add": {"xrdd": 1}}, r"unknown term 'xrdd' \(did you mean 'xrd'"),
        ({"drop": ["task", "crd", "fd", "vrd", "xrd"]}, "no term is left"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        settings_of(variant(**values), {"objective": {"weights": WEIGHTS["clip-rd"]}}, "variant 'one'")


def test_plans_are_read_and_checked(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("seeds: 3\nvariants:\n  a: {recipe: clip}\n  b: {recipe: clip-kd}\nclaims: [b > a on d m]\n")
    plan = read_plan(path)
    assert (plan.seeds, plan.reference) == ((0, 1, 2), "a")
    assert plan.claims[0].id == "b > a on d m"
    for text, message in (
        ("variants: {a: {recipe: clip, dropp: xrd}}", r"variant 'a': unknown key 'dropp' \(did you mean 'drop'"),
        ("variants: {a: {recipe: clip}}\nbaseline: b", "the baseline 'b' is no variant"),
        ("variants: {a b: {recipe: clip}}", "the variant's name 'a b'"),
        ("variants: {a: {recipe: clip}}\nseeds: [1, 1]", "each once"),
        ("variants: {a: {recipe: clip}}\nseeds: 0", "at least one seed"),
        ("variants: {}", "variants"),
        ("variants: {a: {recipe: clip}}\nclaims: [a beats b]", "is not understood"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_plan(path)
