"""Strict configuration: every refusal names the key, the place and the nearest known key."""

import pytest

from clipdistill.config import Config, as_dict, build, merge, override, read_yaml
from clipdistill.errors import InputError, nearest


class Inner(Config):
    rate: float = 0.1
    kind: str = "a"


class Outer(Config):
    name: str
    inner: Inner = Inner()
    maybe: Inner | None = None


def test_values_arrive_typed_and_frozen():
    config = build(Outer, {"name": "x", "inner": {"rate": "1e-3"}})  # YAML 1.1 reads 1e-3 as text
    assert config.inner.rate == 1e-3
    with pytest.raises(ValueError, match="frozen"):
        config.inner.rate = 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, "recipe.yaml: unknown key 'nmae' (did you mean 'name'?)"),
        ({"name": "x", "inner": {"rte": 1}}, "unknown key 'inner.rte' (did you mean 'rate'?)"),
        ({"name": "x", "maybe": {"rte": 1}}, "unknown key 'maybe.rte' (did you mean 'rate'?)"),
        ({}, "recipe.yaml: the key 'name' is missing"),
        ({"name": "x", "inner": {"rate": "fast"}}, "inner.rate"),
        ([1], "expected a mapping"),
    ],
)
def test_refusals_say_what_and_where(values, message):
    with pytest.raises(InputError) as caught:
        build(Outer, values, "recipe.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_override_reads_yaml_values_and_leaves_the_base_alone():
    base = {"train": {"steps": 5}}
    assert override(base, ["train.steps=7", "train.betas=[0.9, 0.95]", "name=x"]) == {
        "train": {"steps": 7, "betas": [0.9, 0.95]},
        "name": "x",
    }
    assert base == {"train": {"steps": 5}}


@pytest.mark.parametrize("assignment", ["steps", "=3", "train.steps.deep=1", "a=[1"])
def test_bad_assignments_are_refused(assignment):
    with pytest.raises(InputError):
        override({"train": {"steps": 5}}, [assignment])


def test_merge_is_deep():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


def test_as_dict_round_trips():
    config = build(Outer, {"name": "x", "maybe": {"kind": "b"}})
    assert build(Outer, as_dict(config)) == config


def test_yaml_faults_name_file_and_line(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: 1\nb: [1\n")
    with pytest.raises(InputError, match=r"broken\.yaml \(line"):
        read_yaml(broken)
    with pytest.raises(InputError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    broken.write_text("- 1\n")
    with pytest.raises(InputError, match="expected 'key: value'"):
        read_yaml(broken)


def test_yaml_cannot_construct_objects(tmp_path):
    hostile = tmp_path / "hostile.yaml"
    touched = tmp_path / "touched"
    hostile.write_text(f"a: !!python/object/apply:os.system ['touch {touched}']\n")
    with pytest.raises(InputError):
        read_yaml(hostile)
    assert not touched.exists()


def test_nearest_suggests_or_lists():
    assert nearest("clip-rdd", ["clip-rd", "clip"]) == " (did you mean 'clip-rd'?)"
    assert "known: a, b" in nearest("zzz", ["b", "a"])
