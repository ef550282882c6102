"""Every setting of `train`, `ablate` and `cache`, read from the configuration classes and the docstrings beside fields.

A field's meaning is the string that follows it in its class; pydantic would read it at every start of every command.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from clipdistill.ablate.plan import AblationPlan, Variant
from clipdistill.cache.config import CacheConfig
from clipdistill.config import Config
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.registry import TERMS
from clipdistill.train.config import RunConfig

SECTIONS = (
    ("train, ablate", "", RunConfig),
    ("ablate", "", AblationPlan),
    ("ablate", "variants.NAME.", Variant),
    ("cache", "", CacheConfig),
)
"""Commands, what stands before the key, and the class that is filled. `ablate` takes a run's settings for every run."""

_TYPES = {str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Any: "anything"}
_BOUNDS = {"ge": "at least {}", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "{} or more"}


@dataclass(frozen=True)
class SettingRow:
    """A setting as it is listed: its key (`train.batch_size`), type, default, range or choices, meaning, commands."""

    key: str
    kind: str
    default: str
    range: str
    meaning: str
    commands: str


def settings(pattern: str = "") -> list[SettingRow]:
    """All settings in the order they are declared; only those whose key or meaning holds `pattern` (in any case)."""
    rows = [row for commands, prefix, cls in SECTIONS for row in _rows(cls, prefix, commands)]
    wanted = pattern.casefold()
    return [row for row in rows if wanted in row.key.casefold() or wanted in row.meaning.casefold()]


def _rows(cls: type[Config], prefix: str, commands: str) -> Iterator[SettingRow]:
    meanings = field_meanings(cls)
    for name, field in cls.model_fields.items():
        inner = _section(field.annotation)
        meaning = meanings.get(name, "")
        if inner is None:
            kind, limits = _described(field.annotation)
            limits = "; ".join(filter(None, (limits, _limits(field.metadata))))
            yield SettingRow(prefix + name, kind, _default(field), limits, meaning, commands)
            continue
        given = "needed" if field.is_required() else "none" if field.default is None else ""
        yield SettingRow(prefix + name, "section", given, "", meaning, commands)
        yield from _rows(inner, f"{prefix}{name}.", commands)
    if issubclass(cls, ObjectiveConfig):
        for term in map(TERMS.get, TERMS.names()):
            for option in term.options:
                kind, limits = _described(option.type)
                meaning = f"Of `{term.name}`: {option.help}."
                yield SettingRow(prefix + option.name, kind, _shown(option.default), limits, meaning, commands)


@functools.cache
def field_meanings(cls: type) -> dict[str, str]:
    """Field -> the docstring beside it, own and inherited."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not (base.__module__.startswith("clipdistill") and "model_fields" in dir(base)):
            continue
        body = next(node.body for node in _classes(inspect.getsourcefile(base) or "") if node.name == base.__name__)
        for field, text in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                value = text.value if isinstance(text, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[field.target.id] = " ".join(value.value.split())
    return found


@functools.cache
def _classes(path: str) -> list[ast.ClassDef]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [node for node in tree.body if isinstance(node, ast.ClassDef)]


def _section(annotation: Any) -> type[Config] | None:
    """The configuration class that a field holds (or None), if it holds one."""
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, Config)), None)


def _default(field: FieldInfo) -> str:
    return "needed" if field.is_required() else _shown(field.get_default(call_default_factory=True))


def _shown(value: Any) -> str:
    """As it would be written after `key=`."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return "{}" if not value else str(value)
    return re.sub(r"e-0?(\d)", r"e-\1", f"{value:.4g}") if isinstance(value, float) else str(value)


def _described(annotation: Any) -> tuple[str, str]:
    """A type in words, and its choices or bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, limits = _described(inner[0])
        return kind, "; ".join(filter(None, (limits, _limits(inner[1:]))))
    if origin is Literal:
        return "choice", ", ".join(map(str, inner))
    if origin in (Union, types.UnionType):
        parts = [_described(part) for part in inner if part is not type(None)]
        kinds = [kind for kind, _ in parts] + ["none"] * (type(None) in inner)
        return " or ".join(dict.fromkeys(kinds)), "; ".join(dict.fromkeys(limits for _, limits in parts if limits))
    if origin is tuple:
        kind, limits = _described(inner[0])
        if inner[-1] is Ellipsis:
            return f"list of {kind}", limits
        return f"{len(inner)} of {kind}", f"each {limits}" if limits else ""
    if origin is dict:
        return f"{_described(inner[0])[0]}: {_described(inner[1])[0]}", ""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section", ""
    return _TYPES.get(annotation, getattr(annotation, "__name__", str(annotation))), ""


def _limits(metadata: Any) -> str:
    """'at least 0, below 1' of pydantic's constraints, also where a field is `Field(ge=0)` inside Annotated."""
    facts = [fact for entry in metadata for fact in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    words = []
    for fact in facts:
        for name, text in _BOUNDS.items():
            bound = getattr(fact, name, None)
            if bound is not None:
                words.append(text.format("2^63" if bound == 2**63 else f"{bound:,}"))
        if getattr(fact, "pattern", None):
            words.append(f"like {fact.pattern}")
    return ", ".join(words)
