"""Every numeric setting there is, with every number and what is none: refused in one sentence, or meant."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

import clipdistill
from clipdistill.ablate.plan import read_plan
from clipdistill.config import LARGEST_FLOAT, Config, as_dict, build
from clipdistill.errors import InputError
from clipdistill.recipes import FOLDER, recipe_names
from clipdistill.statistics.claims import read_claims
from clipdistill.train.config import RunConfig, resolve
from clipdistill.train.stages import resolve_stages

NUMBERS: list[Any] = [
    True,
    False,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    1e20,
    10**20,
    10**400,
    -1,
    -0.5,
    -(10**30),
]
WORDS: list[Any] = ["many", "1e", "true", "", "1 000", [], {}, [[1]], {"a": 1}, None]


def configs() -> list[type[Config]]:
    """Every configuration class of the package."""
    for module in pkgutil.walk_packages(clipdistill.__path__, "clipdistill."):
        text = Path(importlib.util.find_spec(module.name).origin).read_text(encoding="utf-8")  # type: ignore
        if "Config" in text and "__main__" not in module.name:
            importlib.import_module(module.name)

    def below(kind: type[Config]) -> Iterator[type[Config]]:
        for one in kind.__subclasses__():
            yield one
            yield from below(one)

    def lasting(kind: type[Config]) -> bool:
        """Not one that a validator makes for a moment: every worker must collect the same cases."""
        return getattr(sys.modules[kind.__module__], kind.__name__, None) is kind

    return [kind for kind in below(Config) if kind.__module__.startswith("clipdistill.") and lasting(kind)]


def numeric(annotation: Any) -> bool:
    """Whether a number may stand there, alone or in a list or mapping."""
    if annotation in (int, float):
        return True
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return any(numeric(part) for part in typing.get_args(annotation))


FIELDS = [(kind, name) for kind in configs() for name, field in kind.model_fields.items() if numeric(field.annotation)]


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def test_there_are_numeric_settings_everywhere() -> None:
    assert len(FIELDS) > 70
    assert {"TrainConfig", "CacheConfig", "AblationPlan", "ImageSpec", "ObjectiveConfig"} <= {
        k.__name__ for k, _ in FIELDS
    }


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_every_number_is_refused_in_one_sentence_or_meant(kind: type[Config], name: str) -> None:
    """Alone and in lists; whatever is taken is a finite number of a size that something can be counted in."""
    for value in (*NUMBERS, *WORDS):
        for given in (value, [value], [value, value], [value] * 3, {"task": value}):
            try:
                build(kind, {**dict.fromkeys(kind.model_fields), name: given}, "here")
            except InputError as error:
                assert "\n" not in str(error), given  # noqa: PT017
            try:
                found = kind.__pydantic_validator__.validate_assignment(kind.model_construct(), name, given)
            except pydantic.ValidationError:
                continue
            for leaf in leaves((found[0] if isinstance(found, tuple) else found.__dict__)[name]):
                assert isinstance(leaf, bool) or not isinstance(value, bool), given
                if isinstance(leaf, int | float):
                    assert math.isfinite(leaf), given
                    assert abs(leaf) < 1 << 63 if isinstance(leaf, int) else abs(leaf) <= LARGEST_FLOAT, given


SETTINGS = as_dict(resolve("clip-rd", {"out": "run", "data": {"path": "scenes:train"}}, size="debug"))


def paths(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("key", [key for key in paths(SETTINGS) if key.startswith(("train.", "data.", "evaluation."))])
def test_on_the_command_line_a_number_is_refused_by_name_or_kept(key: str) -> None:
    for text in ("true", ".nan", ".inf", "-1", "0", "1.0e+308", "1.0e+20", "100000000000000000000", "9" * 5000, "many"):
        try:
            config = resolve("clip-rd", {"out": "run", "data": {"path": "scenes:train"}}, size="debug",
                             assignments=[f"{key}={text}"])  # fmt: skip
        except InputError as error:
            said = str(error)
        else:
            json.dumps(as_dict(config), allow_nan=False)
            assert build(RunConfig, yaml.safe_load(yaml.safe_dump(as_dict(config)))) == config
            continue
        assert key.split(".")[1] in said
        assert "\n" not in said
        assert len(said) < 700


ODD: list[Any] = [None, True, -1, "", "\0", "\ud800", "x" * 100_000, "[/b]", [], ["x"], [None], {}, {"x": 1}, {1: 2},
                  {None: None}, {"a": {"b": [1, {"c": 2}]}}, b"x", object(), 3 + 4j, float, {1, 2}]  # fmt: skip
OTHERS = [(kind, name) for kind in configs() for name in kind.model_fields if (kind, name) not in FIELDS]


@pytest.mark.parametrize(("kind", "name"), OTHERS, ids=lambda value: getattr(value, "__name__", value))
def test_every_other_setting_is_refused_in_one_sentence_or_can_be_written_down(kind: type[Config], name: str) -> None:
    for value in ODD:
        try:
            found = build(kind, {name: value}, "here")
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert 0 < len(str(error)) < 1000  # noqa: PT017
        else:
            json.dumps(as_dict(found))


SHAPES: list[Any] = [None, True, -1, 10**30, math.nan, "", "x", "\0", "[/b]", [], ["x"], [None], {}, {"x": 1}, {1: 2},
                     {None: None}, [[1]], {"x": {"y": 1}}]  # fmt: skip


def in_nested(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    pairs = values.items() if isinstance(values, dict) else enumerate(values[:2]) if isinstance(values, list) else ()
    for key, value in pairs:
        yield from in_nested(value, (*path, key))


def refused_or_taken(path: Path, given: dict[str, Any], size: str | None = None) -> None:
    """As a run and as a run in stages: settings, or one sentence."""
    for read in (resolve_stages, resolve):
        try:
            read(path, given, size=size)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
            assert 0 < len(str(error)) < 1000  # noqa: PT017


FEW = ["clip-rd", "dclip-stages"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in recipe_names()])
def test_every_key_of_a_recipe_takes_any_shape_or_says_one_sentence(name: str, tmp_path: Path) -> None:
    base = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    given = {"teacher": "T", "student": "S", "data": "scenes", "out": tmp_path / "o"}
    for number, place in enumerate(in_nested(base)):
        for value in SHAPES if name not in FEW else SHAPES[number % 6 :: 6]:
            changed = json.loads(json.dumps(base))
            node = changed
            for key in place[:-1]:
                node = node[key]
            node[place[-1]] = value
            (tmp_path / "own.yaml").write_text(yaml.safe_dump(changed))
            refused_or_taken(tmp_path / "own.yaml", given)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("key", [*RunConfig.model_fields, "from", "about", "sizes", "stages", "size", "recipe"])
def test_every_key_of_an_own_recipe_takes_any_shape_or_says_one_sentence(key: str, tmp_path: Path) -> None:
    for number, value in enumerate(SHAPES):
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"from": "clip", key: value}))
        data = ("scenes", "/x/own.json")[number % 2]
        given = {"teacher": "T", "student": "S", "data": data, "out": tmp_path / "o"}
        refused_or_taken(tmp_path / "own.yaml", given, "debug")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from: clip-rd\nfrom: clip\n", "(line 2): not readable as YAML: the key 'from' stands twice"),
        ("train: {steps: 1, steps: 2}\n", "the key 'steps' stands twice"),
        ("1: 2\n1: 3\n", "the key '1' stands twice"),
        ("true: 1\ntrue: 2\n", "the key 'True' stands twice"),
        ("train: {steps: 010}\n", "'010' is not a plain number"),
        ("train: {steps: 1:30}\n", "'1:30' is not a plain number"),
        ("train: {steps: -01_0}\n", "'-01_0' is not a plain number"),
        ("a: 1\n---\na: 2\n", "another document"),
        ("a: &a {x: *a}\n", "aliases unfold"),
        ("<<: 3\n", "for merging"),
        ("? [a]\n: 1\n", "unhashable key"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_means_two_things_is_refused_everywhere(text: str, said: str, tmp_path: Path) -> None:
    """Recipes, plans of ablations, claims: one reader."""
    path = tmp_path / "own.yaml"
    path.write_text(text)
    for read in (resolve, read_plan, read_claims):
        with pytest.raises(InputError) as caught:
            read(path)
        assert said in str(caught.value)
        assert "own.yaml" in str(caught.value)


UNIONS = [
    (kind, name)
    for kind in configs()
    for name, field in kind.model_fields.items()
    if typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
]


@pytest.mark.parametrize(("kind", "name"), UNIONS, ids=lambda value: getattr(value, "__name__", value))
def test_a_setting_of_several_kinds_is_refused_with_all_of_them(kind: type[Config], name: str) -> None:
    kinds = typing.get_args(kind.model_fields[name].annotation)
    names = [choice for part in kinds for choice in typing.get_args(part) if typing.get_origin(part) is typing.Literal]
    refused = 0
    for value in (-1, "\0no", [[{}]], 1e300):
        try:
            build(kind, {name: value})
        except InputError as error:
            said = str(error)
            if f": {name}: Input should" not in said:
                continue  # a sentence of the setting's own, or one about a key that is missing
            refused += 1
            assert all(repr(choice) in said for choice in names)
            assert (" or null, got " in said) == (type(None) in kinds)
            assert ("list" in said.partition(", got")[0]) == any(typing.get_origin(part) is tuple for part in kinds)
            assert "[" not in said.partition(", got")[0]
    required = any(field.is_required() for other, field in kind.model_fields.items() if other != name)
    assert refused or required or name == "validation"


def test_there_are_settings_of_several_kinds_everywhere() -> None:
    assert len(UNIONS) > 70
    assert {"image_prompts", "lock_text", "teacher_logit_scale", "teacher", "compile"} <= {name for _, name in UNIONS}
