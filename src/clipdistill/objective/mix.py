"""A mix of weighted terms, worked out: what has to be computed, what is read, what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from clipdistill.errors import InputError
from clipdistill.objective.engines.engine import Plan
from clipdistill.objective.pairings import Setting, all_pairings, named_logits
from clipdistill.objective.plan import Primitive
from clipdistill.objective.term import Term
from clipdistill.objective.terms import find_term


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The terms with a non-zero weight, in the order given; InputError for unknown names and impossible weights."""
    found: dict[str, float] = {}
    for name, weight in weights.items():
        find_term(name)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise InputError(f"objective: the weight of '{name}' is {weight!r}, expected a number of at least 0")
        if weight > 0:
            found[name] = float(weight)
    if not found:
        raise InputError("objective: no term has a weight above 0, so there is nothing to train")
    return found


@dataclass(frozen=True)
class Mix:
    """Weighted terms under one setting.

    plan: the similarity terms, for an engine. feature_terms: the others. reads: every matrix and scalar by name.
    trained: those of them that receive a gradient.
    """

    setting: Setting
    plan: Plan
    feature_terms: dict[str, Term]
    reads: frozenset[str]
    trained: frozenset[str]

    @classmethod
    def of(cls, weights: Mapping[str, float], setting: Setting) -> Mix:
        """Work out `weights` (all above 0) under `setting`."""
        known = all_pairings(setting)
        pairings, primitives, feature_terms = {}, {}, {}
        reads: set[str] = set()
        trained: set[str] = set()
        for name in weights:
            term = find_term(name)
            if term.primitives is None:
                feature_terms[name] = term
                reads.update(term.reads)
                trained.update(read for read in term.reads if not read.startswith("teacher"))
                continue
            primitives[name] = term.primitives(setting)
            for primitive in primitives[name]:
                for logits in named_logits(primitive):
                    pairing = pairings[logits] = known[logits]
                    names = {pairing.rows, pairing.columns, pairing.scale, *([pairing.bias] if pairing.bias else [])}
                    reads |= names
                    if logits == primitive.logits:
                        trained |= {read for read in names if not read.startswith("teacher")}
        plan = Plan(pairings, primitives, {name: weights[name] for name in primitives})
        return cls(setting, plan, feature_terms, frozenset(reads), frozenset(trained))

    @property
    def all_primitives(self) -> list[Primitive]:
        """The primitives of all similarity terms."""
        return [primitive for group in self.plan.primitives.values() for primitive in group]

    @property
    def reads_teacher(self) -> bool:
        """Some term reads the teacher's embeddings (fused rows contain them)."""
        return any(name.startswith(("teacher", "fused")) for name in self.reads)

    @property
    def reads_teacher_synthetic(self) -> bool:
        """Some term reads the teacher's embedding of the synthetic caption."""
        return any(name.startswith("teacher_synthetic") for name in self.reads)

    def reads_projected(self, modality: str) -> bool:
        """Some term reads the modality in the teacher's space."""
        return not {f"projected_{modality}", f"fused_{modality}"}.isdisjoint(self.reads)

    def trains(self, modality: str, early: bool) -> bool:
        """A projection of the modality would receive a gradient; early: it stands before every term."""
        names = {f"projected_{modality}", f"fused_{modality}"}
        if early:
            names |= {f"student_{modality}"}
        return not names.isdisjoint(self.trained)

    def check_ensemble(self, teachers: int) -> None:
        """InputError when a term of the mix has no meaning for several teachers."""
        names = [*self.plan.primitives, *self.feature_terms]
        wrong = [name for name in names if find_term(name).single_teacher]
        if wrong:
            raise InputError(
                f"objective: the term '{wrong[0]}' compares with one teacher, the embeddings given hold "
                f"{teachers}; use 'reinforced' for an ensemble"
            )
