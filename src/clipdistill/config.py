"""Typed, frozen configuration: filled from YAML and `key=value` overrides, unknown keys refused.

Each part of the package owns the `Config` of what it builds; this module only knows how to fill one.
It reads plain YAML (`yaml.safe_load`): a recipe can name values, never code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import pydantic
import yaml

from clipdistill.errors import InputError, nearest, without_secrets


class Config(pydantic.BaseModel):
    """Base of every configuration: frozen, typed, unknown keys refused. Declare fields as in a dataclass."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        if _holds(value, bool) and _allows(annotation, int, float) and not _allows(annotation, bool):
            raise ValueError("true and false are no numbers")
        return value

    @pydantic.field_validator("*", mode="after")
    @classmethod
    def _numbers_have_a_size(cls, value: Any) -> Any:
        for number in _numbers(value):
            if isinstance(number, int) and abs(number) >= 1 << 63:
                raise ValueError("no count or seed is that large: give a whole number below 2^63")
            if isinstance(number, float) and abs(number) > LARGEST_FLOAT:
                raise ValueError(f"no setting is that large: give a number up to {LARGEST_FLOAT:g}")
        return value

    @classmethod
    def known_keys(cls) -> list[str]:
        """What may be set, for suggestions after an unknown key."""
        return list(cls.model_fields)


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)


def _holds(value: Any, kind: type) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, kind) or any(_holds(part, kind) for part in parts)


def _allows(annotation: Any, *kinds: Any) -> bool:
    """Whether an annotation names one of `kinds`; Any and the parts that check themselves name all."""
    if annotation in kinds or annotation is Any or (isinstance(annotation, type) and issubclass(annotation, Config)):
        return True
    return any(_allows(part, *kinds) for part in get_args(annotation))


C = TypeVar("C", bound=Config)

LARGEST_FLOAT = 1e12
LARGEST_SCALE = 1e4
"""Of a multiplier of logits: cosines times more than this are one-hot in any number format."""
_LARGEST_YAML = 1 << 22  # bytes
_MOST_VALUES = 100_000
_DEEPEST = 100  # mappings and lists in each other


def build(cls: type[C], values: Mapping[str, Any], where: str = "configuration") -> C:
    """Fill the configuration class `cls` from nested mappings.

    Raises InputError that names the key (with the nearest known one), what was expected and `where` it was read.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected a mapping of settings, got {values!r:.200}")
    try:
        return cls.model_validate(dict(values))
    except pydantic.ValidationError as error:
        raise InputError(f"{where}: {_first_problem(cls, error)}") from error
    except UnicodeEncodeError as error:  # a validator's own sentence about such a text
        raise InputError(f"{where}: a text holds half of a character (\\ud800 to \\udfff), which is none") from error


def _first_problem(cls: type[Config], error: pydantic.ValidationError) -> str:
    """The first validation error in one sentence."""
    # unknown keys first: they are usually the cause of the others (a misspelt key is also a missing one)
    problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    place = [str(part) for part in problem["loc"]]
    holder = _class_at(cls, place[:-1])
    if problem["type"] == "extra_forbidden":
        keys = [] if holder is None else holder.known_keys()
        return f"unknown key '{'.'.join(place)}'{nearest(place[-1], keys)}"
    if problem["type"] == "missing":
        return f"the key '{'.'.join(place)}' is missing"
    branch = next((i for i, part in enumerate(place) if i and _BRANCH.match(part)), len(place))
    own = [_words(other, branch) for other in error.errors() if other["loc"][:branch] == problem["loc"][:branch]]
    message = " or ".join([own[0], *(words.removeprefix("Input should be ") for words in dict.fromkeys(own[1:]))])
    field = getattr(_class_at(cls, place[: branch - 1]), "model_fields", {}).get(place[branch - 1] if place else "")
    if field and message.startswith("Input should") and _allows(field.annotation, type(None)):
        message += " or null"
    return f"{'.'.join(place[:branch])}: {message}, got {problem['input']!r:.200}" if place else message


def _words(problem: Any, branch: int) -> str:
    """What pydantic says of one kind that a setting may have; `branch`: where in its place the kinds begin."""
    message = re.sub("Unable to parse input string as an integer.*", "Input should be below 2^63", problem["msg"])
    message = re.sub("Input is not a valid path.*", "Input should be a path", message).replace("valid tuple", "list")
    message = re.sub("^Value error, |, unable to .*", "", message)
    item = f"a list whose item {problem['loc'][-1]} is " if len(problem["loc"]) > branch + 1 else ""
    return message.replace("Input should be ", f"Input should be {item}")


_BRANCH = re.compile(r"(constrained-|literal\[|tuple\[|list\[|dict\[|function-)|(str|int|float|bool)$")
"""What pydantic puts behind a setting's name for each kind that it may have."""


def _class_at(cls: type[Config], path: Sequence[str]) -> type[Config] | None:
    """The configuration reached from `cls` by `path`."""
    current: Any = cls
    for name in path:
        field = getattr(current, "model_fields", {}).get(name)
        options = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, Config)), None)
    return current  # type: ignore[no-any-return]


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """A copy of nested `values` with each 'a.b=value' applied; values are read as YAML ('1', 'true', '[1, 2]')."""
    result: dict[str, Any] = _copy(values)
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator or not path.strip():
            raise InputError(f"'{assignment}' is not a setting: write  key=value,  for example  train.epochs=10")
        node = result
        *parents, leaf = path.strip().split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if not isinstance(child, dict):
                raise InputError(f"'{assignment}': '{parent}' is a plain value, it has no setting '{leaf}'")
            node = child
        node[leaf] = parse_yaml(text, f"'{assignment:.200}'")
    return result


def agreed(options: Mapping[str, Any], settings: Mapping[str, Any], path: str = "") -> None:
    """Raise InputError where an option and a `key=value` give one setting two values."""
    for key in options.keys() & settings.keys():
        ours, theirs = options[key], settings[key]
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            agreed(ours, theirs, f"{path}{key}.")
        elif ours != theirs and not isinstance(theirs, Mapping):
            raise InputError(f"{path}{key}={theirs!s:.80}: an option says {ours!s:.80}: leave one of the two out")


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; neither is changed."""
    result = _copy(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), Mapping):
            result[key] = merge(result[key], value)
        else:
            result[key] = _copy(value) if isinstance(value, Mapping) else value
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or an InputError with file and line."""
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_YAML + 1)
        text = content.decode("utf-8")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not readable as text ({error})") from error
    if len(content) > _LARGEST_YAML:
        raise InputError(f"{path}: longer than {_LARGEST_YAML} bytes, so these are no settings")
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected 'key: value' settings, got {type(values).__name__}")
    return values


_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where it is built: ten times as fast


class _UniqueKeys(_SafeLoader):  # type: ignore[misc]
    """A key that stands twice in one mapping is an error: the first would be dropped in silence.

    So are 010 and 1:30, which YAML 1.1 takes for 8 and for 90.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        digits = text.lstrip("+-").replace("_", "")
        if ":" in text or (len(digits) > 1 and digits[0] == "0" and digits.isdigit()):
            raise yaml.constructor.ConstructorError(
                None, None, f"'{text:.40}' is not a plain number: quote it if it is a text", node.start_mark
            )
        return int(super().construct_yaml_int(node))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' stands twice", key_node.start_mark
                )
            seen.append(key)
        return super().construct_mapping(node, deep)


_UniqueKeys.add_constructor("tag:yaml.org,2002:int", _UniqueKeys.construct_yaml_int)


def parse_yaml(text: str, where: str) -> Any:
    """The plain values of a YAML text that may come from anywhere.

    Raises InputError, beginning with `where`, for text that is no YAML, tags that name Python objects, and aliases that
    would unfold into more than a hundred thousand values (a few lines can stand for billions) or into themselves.
    """
    try:
        values = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        line = f" (line {place.line + 1})" if place else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise InputError(f"{where}{line}: not readable as YAML: {problem}") from error
    except RecursionError as error:
        raise InputError(f"{where}: not readable as YAML: nested too deeply") from error
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError) as error:  # values such as 2000-13-77
        raise InputError(f"{where}: not readable as YAML: {' '.join(str(error).split())[:200]}") from error
    if _unfolded(values, {}, 0) > _MOST_VALUES:
        raise InputError(f"{where}: its aliases unfold into more than {_MOST_VALUES} values, so these are no settings")
    return values


def _unfolded(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values there are when every alias is written out; a value inside itself counts as endless."""
    if not isinstance(value, dict | list | tuple | set):
        return 1
    if depth > _DEEPEST:
        return _MOST_VALUES + 1
    if id(value) not in known:
        known[id(value)] = _MOST_VALUES + 1  # while it is being counted: met again, it holds itself
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_unfolded(part, known, depth + 1) for part in parts)
    return known[id(value)]


def as_dict(config: Config) -> dict[str, Any]:
    """Plain dictionaries, lists and scalars of a configuration, ready to be written; URLs without their secrets."""
    return _public(config.model_dump(mode="json"))


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _public(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_public(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}
