"""What a similarity-based term needs, written as data, so that every engine computes the same thing.

Each such term is a weighted list of row- or column-wise *primitives* on named N x N logit matrices (*pairings*).
A term's file declares its primitives; `engines/dense.py` and `engines/tiled.py` interpret them independently of each
other, and the tests hold both against the released implementations. Nothing here computes anything.

Rows by name, all L2-normalised: student_image, student_text, student_synthetic_text as the task sees them (A0, B0);
projected_image, projected_text in the teacher's space (A, B; the same when the sizes are equal); teacher_image,
teacher_text, teacher_synthetic_text (u, v; with _0, _1 ... at the end for an ensemble); fused_image, fused_text (AFD).
Scalars: student, teacher (multipliers), student_bias, teacher_bias, and the objective's image, text, cross, fusion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from clipdistill.errors import InputError

Axis = Literal["rows", "columns"]

SCALES = ("image", "text", "cross", "fusion")
"""The multipliers that the objective owns."""

MATRICES = (
    *("student_image", "student_text", "student_synthetic_text", "projected_image", "projected_text"),
    *("fused_image", "fused_text", "teacher_image", "teacher_text", "teacher_synthetic_text"),
)
SCALARS = ("student", "student_bias", "teacher", "teacher_bias", *SCALES)


@dataclass(frozen=True)
class Pairing:
    """One N x N logit matrix  scale * rows @ columns.T (+ bias).

    rows, columns: names of feature matrices (N, D); the two have the same D.
    scale: name of the scalar multiplier; or temperature: one over a fixed one. bias: name of an additive scalar.
    """

    name: str
    rows: str
    columns: str
    scale: str = ""
    bias: str | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None:
            if not (math.isfinite(self.temperature) and self.temperature > 0):
                raise InputError(f"pairing '{self.name}': the temperature is {self.temperature}, expected it above 0")
            object.__setattr__(self, "scale", f"={1 / self.temperature!r}")
        if not self.scale:
            raise InputError(f"pairing '{self.name}': name its scale, or give its temperature")

    @property
    def trained(self) -> bool:
        """False for teacher-teacher matrices, which never receive a gradient."""
        return not (self.rows.startswith("teacher") and self.columns.startswith("teacher"))

    @property
    def names(self) -> set[str]:
        """Every matrix and scalar the logits are made of."""
        return {self.rows, self.columns, self.scale, *([self.bias] if self.bias else [])}


@dataclass(frozen=True)
class CrossEntropy:
    """weight * mean_i [logsumexp_i(L) - L_ii] along `axis` ("rows": softmax over each row)."""

    logits: str
    axis: Axis
    weight: float


@dataclass(frozen=True)
class Divergence:
    """weight * (1/N) sum_i D(softmax_i(target) || softmax_i(logits)) along `axis`; the target is detached.

    entropy=True: Kullback-Leibler divergence; False: soft cross-entropy (no target entropy; same gradient).
    """

    target: str
    logits: str
    axis: Axis
    weight: float
    entropy: bool = True


@dataclass(frozen=True)
class Sigmoid:
    """weight * (1/N) sum_ij softplus(-y_ij L_ij).

    targets empty: y = +1 on the diagonal, -1 elsewhere (SigLIP). Otherwise y_ij = 2 mean_k sigmoid(target_k,ij) - 1.
    """

    logits: str
    weight: float
    targets: tuple[str, ...] = ()


Primitive = CrossEntropy | Divergence | Sigmoid


@dataclass(frozen=True)
class Plan:
    """What an engine is asked to compute: total = sum over terms of weights[t] * sum over primitives[t].

    pairings: every N x N logit matrix the primitives name (and no other), by name.
    primitives: per term, in the order of `weights`; a term whose weight is 0 is never here.
    """

    pairings: Mapping[str, Pairing]
    primitives: Mapping[str, tuple[Primitive, ...]]
    weights: Mapping[str, float]


def named_logits(primitive: Primitive) -> tuple[str, ...]:
    """Every pairing a primitive reads."""
    if isinstance(primitive, CrossEntropy):
        return (primitive.logits,)
    if isinstance(primitive, Divergence):
        return (primitive.target, primitive.logits)
    return (primitive.logits, *primitive.targets)


def teacher_names(teachers: int, synthetic: bool = False) -> tuple[str, ...]:
    """Names of the teachers' own logit matrices, one for each of the ensemble."""
    if synthetic:
        return tuple(f"teacher_synthetic_{k}" for k in range(teachers))
    return ("teacher",) if teachers == 1 else tuple(f"teacher_{k}" for k in range(teachers))


def published_pairings(teachers: int = 1) -> dict[str, Pairing]:
    """Every N x N logit matrix the published terms use, by name."""
    found = [
        Pairing("student", "student_image", "student_text", "student"),
        Pairing("student_sigmoid", "student_image", "student_text", "student", "student_bias"),
        Pairing("student_synthetic", "student_image", "student_synthetic_text", "student"),
        Pairing("student_synthetic_sigmoid", "student_image", "student_synthetic_text", "student", "student_bias"),
        Pairing("image", "teacher_image", "projected_image", "image"),
        Pairing("text", "teacher_text", "projected_text", "text"),
        Pairing("image_text", "teacher_image", "projected_text", "cross"),
        Pairing("text_image", "teacher_text", "projected_image", "cross"),
        Pairing("student_image_teacher_text", "projected_image", "teacher_text", "cross"),
        Pairing("fusion", "fused_image", "fused_text", "fusion"),
    ]
    for k in range(teachers):
        suffix = "" if teachers == 1 else f"_{k}"
        image, scale, bias = f"teacher_image{suffix}", f"teacher{suffix}", f"teacher_bias{suffix}"
        text, synthetic = f"teacher_text{suffix}", f"teacher_synthetic_text{suffix}"
        found += [
            Pairing(f"teacher{suffix}", image, text, scale),
            Pairing(f"teacher_sigmoid{suffix}", image, text, scale, bias),
            Pairing(f"teacher_synthetic_{k}", image, synthetic, scale),
            Pairing(f"teacher_synthetic_sigmoid_{k}", image, synthetic, scale, bias),
        ]
    return {pairing.name: pairing for pairing in found}
