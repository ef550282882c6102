"""What an ablation compares: named variants of recipes, the seeds, the baseline; from a YAML file or from options.

baseline: clip-kd
seeds: 5
size: demo
variants:
  clip-kd: {recipe: clip-kd}
  clip-kd+vrd: {recipe: clip-rd, drop: [xrd]}
  more-features: {recipe: clip-kd, weights: {fd: 4000}}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pydantic

from clipdistill.config import Config, build, override, read_yaml
from clipdistill.errors import InputError, listed, nearest
from clipdistill.recipes import lay
from clipdistill.registry import TERMS
from clipdistill.statistics.claims import Claim


def _distinct(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ValueError("at least one seed is needed, each once and none below 0")
    return seeds


def _counted(seeds: Any) -> Any:
    if not isinstance(seeds, int) or isinstance(seeds, bool):
        return seeds
    if seeds > _MOST_SEEDS:
        raise ValueError(f"at most {_MOST_SEEDS} seeds")
    return tuple(range(seeds))


Seeds = Annotated[tuple[int, ...], pydantic.BeforeValidator(_counted), pydantic.AfterValidator(_distinct)]
_NAME = re.compile(r"^[\w][\w.%+=@-]{0,79}$")
_MOST_SEEDS = 1000


class Variant(Config):
    """One way of training."""

    recipe: str
    """The recipe it starts from."""
    drop: tuple[str, ...] = ()
    """Terms switched off (vrd stands for vrd_kl and vrd_ce)."""
    add: dict[str, float] = pydantic.Field(default_factory=dict)
    """Terms switched on, with their weights."""
    weights: dict[str, float] = pydantic.Field(default_factory=dict)
    """Weights of terms that the recipe has."""
    student: str | None = None
    """Another student than the plan's."""
    teacher: str | None = None
    """Another teacher than the plan's."""
    batch_size: int | None = pydantic.Field(default=None, ge=1)
    """Another batch size than the plan's."""
    settings: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Any settings of the run, nested or as train.view.flip."""
    seeds: Seeds | None = None
    """Seeds of this variant, where they are not the plan's."""
    about: str | None = None
    """A line for the report."""

    @pydantic.field_validator("drop", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return listed(value, "drop") if isinstance(value, str) else value


class AblationPlan(Config):
    """The grid: each variant with each seed."""

    variants: dict[str, Variant] = pydantic.Field(min_length=1)
    """The variants by name."""
    baseline: str | None = None
    """What the others are compared with (None: the first variant)."""
    seeds: Seeds = (0, 1, 2, 3, 4)
    """A number n (seeds 0 to n - 1) or the seeds themselves."""
    size: str | None = None
    """Size of every run (debug, demo, ...)."""
    settings: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Settings of every run."""
    metrics: tuple[str, ...] = ()
    """Metrics compared (none named: the headline ones)."""
    claims: tuple[Claim, ...] = ()
    """Lines or entries of the claim language (docs/ablation.md), judged from the results."""
    title: str | None = None
    """Heading of the report."""

    @pydantic.field_validator("claims", mode="before")
    @classmethod
    def _lines(cls, claims: Any) -> Any:
        if isinstance(claims, (list, tuple)):
            return [{"id": line, "claim": line} if isinstance(line, str) else line for line in claims]
        return claims

    @pydantic.model_validator(mode="after")
    def _fitting(self) -> AblationPlan:
        for name in self.variants:
            if not _NAME.match(name):
                raise ValueError(f"the variant's name '{name}' has other signs than letters, digits and . % + = @ - _")
        if self.baseline is not None and self.baseline not in self.variants:
            raise ValueError(f"the baseline '{self.baseline}' is no variant{nearest(self.baseline, self.variants)}")
        return self

    def seeds_of(self, name: str) -> tuple[int, ...]:
        """The seeds of a variant."""
        return self.variants[name].seeds or self.seeds

    @property
    def reference(self) -> str:
        """The name of the baseline."""
        return self.baseline or next(iter(self.variants))


def read_plan(path: Path) -> AblationPlan:
    """The plan in a YAML file. Raises InputError with the key that is wrong."""
    values = read_yaml(path)
    variants = values.get("variants")
    if isinstance(variants, Mapping):  # each by itself first: the message then names the nearest key
        for name, variant in variants.items():
            build(Variant, variant, f"{path}: variant '{name}'")
    return build(AblationPlan, values, str(path))


def plan_of_recipes(
    recipes: Sequence[str],
    *,
    drop: Sequence[str] = (),
    add: Sequence[str] = (),
    weights: Sequence[str] = (),
    students: Sequence[str] = (),
    teachers: Sequence[str] = (),
    batch_sizes: Sequence[int] = (),
    weights_of: Mapping[str, Mapping[str, float]],
) -> dict[str, Variant]:
    """Variants of recipes: each recipe as it is, then with one switch at a time; all of it for each student, teacher
    and batch size.

    drop: terms, several together joined with '+'; add, weights: 'term=weight'; weights_of: each recipe's own weights.
    A switch that fits only some of the recipes makes variants of those; one that fits none is an InputError.
    """
    plain: dict[str, Variant] = {_short(recipe): Variant(recipe=recipe) for recipe in recipes}
    if len(plain) < len(recipes):
        raise InputError("two of the recipes have the same name: describe the variants in a YAML file, with names")
    for switch in drop:
        wanted = tuple(switch.split("+"))
        fitting = [r for r in recipes if all(matching(name, weights_of[r]) for name in wanted)]
        _require(fitting, f"--drop {switch}", weights_of)
        for recipe in fitting:
            plain[f"{_short(recipe)}-without-{switch}"] = Variant(recipe=recipe, drop=wanted)
    for option, switches in (("add", add), ("weight", weights)):
        for switch in switches:
            term, weight = _term_and_weight(switch, option)
            has = option == "weight"
            fitting = [r for r in recipes if (weights_of[r].get(term, 0) != 0) == has]
            _require(fitting, f"--{option} {switch}", weights_of)
            for recipe in fitting:
                name = f"{_short(recipe)}-{'' if has else 'with-'}{term}={weight:g}"
                changed = {"weights" if has else "add": {term: weight}}
                plain[name] = Variant.model_validate({"recipe": recipe, **changed})
    variants: dict[str, Variant] = {}
    named: list[Sequence[str | None]] = [students or [None], teachers or [None]]
    sizes: Sequence[int | None] = batch_sizes or [None]
    for (name, variant), student, teacher, batch_size in product(plain.items(), named[0], named[1], sizes):
        parts = [name]
        parts += [_short(student)] if student is not None and len(students) > 1 else []
        parts += [_short(teacher)] if teacher is not None and len(teachers) > 1 else []
        parts += [f"batch-{batch_size}"] if batch_size is not None and len(batch_sizes) > 1 else []
        update = {"student": student, "teacher": teacher, "batch_size": batch_size}
        joined = "@".join(parts)
        if joined in variants:
            raise InputError(f"two variants would be called '{joined}': describe them in a YAML file, with names")
        variants[joined] = variant.model_copy(update=update)
    return variants


def settings_of(variant: Variant, base: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`base` (nested settings with the recipe's objective in it) with the switches of `variant` laid over it."""
    values = lay(base, _nested(variant.settings))
    weights: dict[str, float] = dict(values.get("objective", {}).get("weights", {}))
    for name in variant.drop:
        found = matching(name, weights)
        if not found:
            raise InputError(f"{where}: no term '{name}' to drop; the recipe has {', '.join(weights) or 'none'}")
        weights |= dict.fromkeys(found, 0.0)
    for name, weight in variant.add.items():
        _known(name, where)
        if weights.get(name, 0):
            raise InputError(f"{where}: the recipe has the term '{name}' already; set its weight with 'weights'")
        weights[name] = weight
    for name, weight in variant.weights.items():
        _known(name, where)
        if not weights.get(name, 0):
            raise InputError(f"{where}: the recipe has no term '{name}' to weight; switch it on with 'add'")
        weights[name] = weight
    if not any(weights.values()):
        raise InputError(f"{where}: no term is left to train with")
    over: dict[str, Any] = {"objective": {"weights": weights}}
    if variant.batch_size is not None:
        over["train"] = {"batch_size": variant.batch_size}
    for key in ("student", "teacher"):
        if getattr(variant, key) is not None:
            over[key] = getattr(variant, key)
    return lay(values, over)


def matching(name: str, weights: Mapping[str, float]) -> list[str]:
    """The switched-on terms that `name` stands for: itself, or all that begin with it and an underscore."""
    active = [term for term, weight in weights.items() if weight]
    return [name] if name in active else [term for term in active if term.startswith(f"{name}_")]


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with dotted keys opened: {'train.steps': 5} is {'train': {'steps': 5}}."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, leaf = str(key).split(".")
        tree: dict[str, Any] = {leaf: value}
        for parent in reversed(parents):
            tree = {parent: tree}
        nested = lay(nested, tree)
    return nested


def _term_and_weight(switch: str, option: str) -> tuple[str, float]:
    try:
        values = override({}, [switch])
        ((term, weight),) = values.items()
        number = float(weight)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"--{option} {switch}: write term=weight, for example  --{option} fd=2000") from error
    _known(term, f"--{option} {switch}")
    return term, number


def _known(name: str, where: str) -> None:
    if name not in TERMS:
        raise InputError(f"{where}: unknown term '{name}'{nearest(name, TERMS.names())}")


def _require(fitting: Sequence[str], option: str, weights_of: Mapping[str, Mapping[str, float]]) -> None:
    if not fitting:
        listed = "; ".join(f"{recipe}: {', '.join(weights)}" for recipe, weights in weights_of.items())
        raise InputError(f"{option}: fits none of the recipes ({listed})")


def _short(name: str) -> str:
    """A name for tables and folders: the last part of a path, without signs that folders cannot have."""
    stem = Path(name).name.removesuffix(".yaml").removesuffix(".yml")
    return re.sub(r"[^\w.%+-]+", "-", stem.removeprefix("inherit:")).strip("-.") or "model"
