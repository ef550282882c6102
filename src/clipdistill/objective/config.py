"""The `objective:` part of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pydantic

from clipdistill.config import Config
from clipdistill.errors import InputError
from clipdistill.objective.mix import Mix, checked_weights
from clipdistill.objective.objective import Objective
from clipdistill.objective.pairings import Setting
from clipdistill.objective.terms import find_term


class ObjectiveConfig(Config):
    """Settings of `Objective`; see its docstring for their meaning."""

    weights: dict[str, float]
    scales: Literal["released", "exponential"] = "released"
    projection: Literal["after-task", "before-task"] = "after-task"
    engine: Literal["dense", "tiled", "auto"] = "auto"
    feature_units: Literal["released", "cosine"] = "released"
    gd_temperature: Literal["released", "fixed"] = "released"
    sigmoid_targets: Literal["pairs", "teacher"] = "pairs"
    vrd_target: Literal["text", "image"] = "text"
    reinforced_lambda: float = pydantic.Field(default=1.0, ge=0, le=1)
    products: Literal["exact", "bfloat16"] = "exact"

    @pydantic.field_validator("weights")
    @classmethod
    def _known_terms(cls, weights: dict[str, float]) -> dict[str, float]:
        checked_weights(weights)
        return weights

    @property
    def active_terms(self) -> tuple[str, ...]:
        """Names of the terms with a weight above 0."""
        return tuple(checked_weights(self.weights))

    @property
    def needs_teacher(self) -> bool:
        """Some term reads the teacher's embeddings."""
        setting = Setting(sigmoid_targets=self.sigmoid_targets, reinforced_lambda=self.reinforced_lambda)
        return Mix.of(checked_weights(self.weights), setting).reads_teacher

    @property
    def accepts_ensemble(self) -> bool:
        """Every term has a meaning for several teachers, and one of them uses them."""
        return self.needs_teacher and not any(find_term(name).single_teacher for name in self.active_terms)

    def build(self, student_dim: int, teacher_dim: int, teacher_blocks: Sequence[int] | None = None) -> Objective:
        """The objective for embeddings of these widths; teacher_blocks: widths of an ensemble's members, if it is
        one.
        """
        if teacher_blocks is not None and sum(teacher_blocks) != teacher_dim:
            raise InputError(f"objective: teacher blocks {tuple(teacher_blocks)} do not add up to {teacher_dim}")
        if teacher_blocks is not None and len(teacher_blocks) > 1 and not self.accepts_ensemble:
            wrong = next((name for name in self.active_terms if find_term(name).single_teacher), self.active_terms[0])
            raise InputError(
                f"objective: the term '{wrong}' compares with one teacher, {len(teacher_blocks)} were given"
            )
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        return Objective(student_dim=student_dim, teacher_dim=teacher_dim, **settings)
