"""Every numeric setting there is, with every number and what is none: refused in one sentence, or meant."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

import clipdistill
from clipdistill.config import LARGEST_FLOAT, Config, as_dict, build
from clipdistill.errors import InputError
from clipdistill.train.config import RunConfig, resolve

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

    return [kind for kind in below(Config) if kind.__module__.startswith("clipdistill.")]


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
