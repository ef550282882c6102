"""The `objective:` part of a recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from clipdistill.config import Config
from clipdistill.errors import InputError, nearest
from clipdistill.objective.mix import Mix, checked_weights, modalities
from clipdistill.objective.term import Setting, options_model
from clipdistill.registry import TERMS


class ObjectiveConfig(Config):
    """Settings of `Objective`; see its docstring for their meaning. Options of terms are keys like the others."""

    model_config = pydantic.ConfigDict(extra="allow")

    weights: dict[str, float]
    """Weight of each term by name; 0 switches a term off."""
    scales: Literal["released", "exponential"] = "released"
    """Own scales of the terms: the multipliers themselves as in the released codes, or their logarithms."""
    projection: Literal["after-task", "before-task"] = "after-task"
    """Where widths differ: the task sees the student's own features, or all terms the projected ones."""
    engine: Literal["dense", "tiled", "auto"] = "auto"
    """Whole N x N matrices, tiles in memory linear in the batch, or chosen by size."""
    products: Literal["exact", "bfloat16"] = "exact"
    """Number format of the tiled engine's matrix products."""

    schedules: dict[str, tuple[tuple[float, float], ...]] = pydantic.Field(default={})
    """Factors over the run, of a term's weight or (`teacher`) of the teacher's multiplier: name -> points [share of the
    run, factor], linear between them: `{fd: [[0, 1], [0.5, 0.1]]}`."""

    _idle: tuple[str, ...] = pydantic.PrivateAttr(default=())

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _check_options(cls, values: Any, read: pydantic.ModelWrapValidatorHandler[ObjectiveConfig]) -> ObjectiveConfig:
        """Every option of the mix's terms with its value; options of other terms are checked and left out."""
        if not isinstance(values, Mapping):
            return read(values)
        given = {key: value for key, value in values.items() if key not in cls.model_fields}
        weights = values.get("weights")
        terms = [TERMS.get(name) for name in weights if name in TERMS] if isinstance(weights, Mapping) else []
        names = {option.name for term in terms for option in term.options}
        everybody = terms if names.issuperset(given) else [TERMS.get(name) for name in TERMS.names()]
        options = options_model(*everybody).model_validate(given).model_dump()
        kept = {name: value for name, value in options.items() if name in names}
        made = read({key: value for key, value in values.items() if key not in given} | kept)
        made._idle = tuple(name for name in given if name not in names)
        return made

    @pydantic.field_validator("weights", mode="wrap")
    @classmethod
    def _check_weights(cls, given: Any, read: pydantic.ValidatorFunctionWrapHandler) -> dict[str, float]:
        weights: dict[str, float] = read(given)
        checked_weights({name: value if isinstance(value, bool) else weights[name] for name, value in given.items()})
        return weights

    @pydantic.field_validator("schedules")
    @classmethod
    def _check_schedules(cls, schedules: dict[str, Any]) -> dict[str, Any]:
        for name, points in schedules.items():
            where, shares = f"objective.schedules: {name}:", [-1.0, *(share for share, _ in points), 2.0]
            if name != "teacher" and name not in TERMS:
                raise InputError(f"{where} unknown term '{name}'{nearest(name, ('teacher', *TERMS.names()))}")
            if not points or shares != sorted(set(shares)) or not 0 <= shares[1] <= shares[-2] <= 1:
                raise InputError(f"{where} give points with rising shares of the run between 0 and 1")
            if not all(0 <= factor < math.inf and (factor or name != "teacher") for _, factor in points):
                raise InputError(f"{where} a factor must be a number of at least 0 (teacher: above)")
        return schedules

    def factor(self, name: str, progress: float) -> float:
        """What the weight of a term, or the teacher's multiplier, is multiplied by at a share of the run."""
        points = self.schedules.get(name, ((0.0, 1.0),))
        for (start, one), (end, other) in itertools.pairwise(points):
            if start <= progress <= end:
                return one + (other - one) * (progress - start) / (end - start)
        return points[0][1] if progress < points[0][0] else points[-1][1]

    @classmethod
    def known_keys(cls) -> list[str]:
        """The keys of this class and of every term's options."""
        return [*cls.model_fields, *(option.name for name in TERMS.names() for option in TERMS.get(name).options)]

    @property
    def active_terms(self) -> tuple[str, ...]:
        """Names of the terms with a weight above 0."""
        return tuple(checked_weights(self.weights))

    @property
    def options(self) -> dict[str, Any]:
        """The options of the terms by name."""
        return dict(self.model_extra or {})

    @property
    def idle(self) -> tuple[str, ...]:
        """Options that were given and that are those of terms without a weight."""
        return self._idle

    @property
    def needs_teacher(self) -> bool:
        """Some term reads the teacher's embeddings."""
        return Mix.of(checked_weights(self.weights), Setting(options=self.options)).reads_teacher

    @property
    def modalities(self) -> dict[str, tuple[str, ...]]:
        """Term by term, the modalities whose rows it reads."""
        return {name: modalities(name, Setting(options=self.options)) for name in self.active_terms}

    @property
    def needs_bank(self) -> bool:
        """Some term compares with the teacher's embeddings of the whole training set."""
        return any(TERMS.get(name).bank for name in self.active_terms)

    @property
    def needs_classes(self) -> bool:
        """Some term classifies by the teacher's class vectors."""
        return any(TERMS.get(name).classes for name in self.active_terms)

    @property
    def accepts_ensemble(self) -> bool:
        """Every term has a meaning for several teachers, and one of them uses them."""
        return self.needs_teacher and not any(TERMS.get(name).single_teacher for name in self.active_terms)

    @property
    def least_rows(self) -> int:
        """Rows a batch needs for its loss to say anything: 2 when some term compares pairs."""
        return 2 if any(TERMS.get(name).compares_pairs for name in self.active_terms) else 1
