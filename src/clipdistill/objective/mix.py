"""A mix of weighted terms, worked out: what has to be computed, what is read, what is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from clipdistill.errors import InputError, nearest
from clipdistill.objective.plan import Pairing, Plan, Primitive, named_logits, published_pairings
from clipdistill.objective.term import MODALITIES, Setting, Term
from clipdistill.registry import TERMS


def checked_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The terms with a non-zero weight, in the order given; InputError for unknown names and impossible weights."""
    found: dict[str, float] = {}
    if not isinstance(weights, Mapping):
        raise InputError(f"objective: weights must be a mapping of terms and numbers, got {weights!r}")
    for name, weight in weights.items():
        if name not in TERMS:
            raise InputError(f"objective: unknown term '{name}'{nearest(name, TERMS.names())}")
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

    plan: the similarity terms, for an engine. feature_terms: the others. reads: every matrix and scalar by name; a
    fixed multiplier is "=5.0", a scale that a term owns "term:scale". trained: those that receive a gradient.
    starts: the multiplier at which each scale that a term owns starts.
    """

    setting: Setting
    plan: Plan
    feature_terms: dict[str, Term]
    reads: frozenset[str]
    trained: frozenset[str]
    starts: dict[str, float]

    @classmethod
    def of(cls, weights: Mapping[str, float], setting: Setting) -> Mix:
        """Work out `weights` (all above 0) under `setting`."""
        published = published_pairings(setting.teachers)
        pairings: dict[str, Pairing] = {}
        primitives: dict[str, tuple[Primitive, ...]] = {}
        feature_terms: dict[str, Term] = {}
        reads: set[str] = set()
        trained: set[str] = set()
        starts: dict[str, float] = {}
        for name in weights:
            term = TERMS.get(name)
            if setting.modalities != MODALITIES and not set(modalities(name, setting)) <= {*setting.modalities}:
                continue
            if term.primitives is None:
                feature_terms[name] = term
                reads.update(term.reads, term.gathers)
                trained.update(read for read in (*term.reads, *term.gathers) if _trainable(read))
                continue
            own = {f"{name}:{scale}": start for scale, start in term.scales.items()}
            known = published | {pairing.name: _resolved(pairing, name, own) for pairing in term.pairings}
            with TERMS.blaming(name):
                given = term.primitives
                primitives[name] = _checked(given(setting) if callable(given) else given, known)
            for primitive in primitives[name]:
                for logits in named_logits(primitive):
                    pairing = known[logits]
                    if pairings.setdefault(logits, pairing) != pairing:
                        raise InputError(
                            f"objective: two terms, one of them '{name}', call different pairings '{logits}'"
                        )
                    reads |= pairing.names
                    starts |= {scale: start for scale, start in own.items() if scale == pairing.scale}
                    if logits == primitive.logits:
                        trained |= {read for read in pairing.names if _trainable(read)}
        plan = Plan(pairings, primitives, {name: weights[name] for name in primitives})
        return cls(setting, plan, feature_terms, frozenset(reads), frozenset(trained), starts)

    @property
    def all_primitives(self) -> list[Primitive]:
        """The primitives of all similarity terms."""
        return [primitive for group in self.plan.primitives.values() for primitive in group]

    @property
    def reads_teacher(self) -> bool:
        """Some term reads the teacher's embeddings (fused rows contain them)."""
        return any(name.startswith(("teacher", "fused")) and ":" not in name for name in self.reads)

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
        wrong = [name for name in (*self.plan.primitives, *self.feature_terms) if TERMS.get(name).single_teacher]
        if wrong:
            raise InputError(
                f"objective: the term '{wrong[0]}' compares with one teacher, {teachers} were given; "
                "use 'reinforced' for an ensemble"
            )


def modalities(name: str, setting: Setting) -> tuple[str, ...]:
    """The modalities whose rows a term reads, of student or teacher."""
    reads = Mix.of({name: 1.0}, replace(setting, modalities=MODALITIES)).reads
    bank = TERMS.get(name).bank
    return tuple(m for m in MODALITIES if bank or any(f"_{m}" in read and ":" not in read for read in reads))


def _trainable(name: str) -> bool:
    return not name.startswith("=") and (":" in name or not name.startswith("teacher"))


def _resolved(pairing: Pairing, term: str, own: Mapping[str, float]) -> Pairing:
    """A term's own pairing with the name under which its scale is found."""
    own_name = f"{term}:{pairing.scale}"
    return replace(pairing, scale=own_name) if own_name in own else pairing


def _checked(primitives: tuple[Primitive, ...], known: Mapping[str, Pairing]) -> tuple[Primitive, ...]:
    """The primitives of a term, if they are some. Raises InputError for what no engine could compute."""
    primitives = tuple(primitives)
    if not primitives:
        raise InputError("has no primitives, so there is nothing to compute")
    for primitive in primitives:
        if not isinstance(primitive, Primitive):
            raise InputError(f"expected CrossEntropy, Divergence or Sigmoid as primitives, got {primitive!r:.80}")
        for logits in named_logits(primitive):
            if logits not in known:
                raise InputError(f"unknown pairing '{logits}'{nearest(logits, known)}: name it in `pairings`")
        if not known[primitive.logits].trained:
            raise InputError(f"the pairing '{primitive.logits}' compares teacher with teacher, so nothing is trained")
        if not math.isfinite(primitive.weight) or getattr(primitive, "axis", "rows") not in ("rows", "columns"):
            raise InputError(f"{primitive}: expected a finite weight, and rows or columns as axis")
    return primitives
