"""The term sigmoid; its facts are those of TERM."""

from __future__ import annotations

from typing import Literal

from clipdistill.objective.plan import Primitive, Sigmoid
from clipdistill.objective.term import Option, Setting, Term

TARGETS = Option(
    "sigmoid_targets",
    Literal["pairs", "teacher"],
    "pairs",
    "what labels a pair: whether it belongs together (SigLIP), or the teachers' probabilities (distilled)",
)


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """One sigmoid sum, and one more for the synthetic caption."""
    distilled = setting[TARGETS] == "teacher"
    teachers = range(setting.teachers)
    real = tuple("teacher_sigmoid" if setting.teachers == 1 else f"teacher_sigmoid_{k}" for k in teachers)
    found: list[Primitive] = [Sigmoid("student_sigmoid", 1.0, real if distilled else ())]
    if setting.synthetic:
        synthetic = tuple(f"teacher_synthetic_sigmoid_{k}" for k in teachers)
        found.append(Sigmoid("student_synthetic_sigmoid", 1.0, synthetic if distilled else ()))
    return tuple(found)


TERM = Term(
    name="sigmoid",
    title="pairwise sigmoid loss",
    formula="(1/N) sum_ij softplus(-y_ij L_ij),  L = s A0 B0^T + b;  y = +-1, or 2 mean_k sigmoid(teacher_k) - 1",
    gradient="student image, student text, s, b; y detached",
    source="SigLIP, arXiv 2303.15343; MobileCLIP2, arXiv 2508.20691",
    default_weight=1.0,
    primitives=primitives,
    options=(TARGETS,),
    single_teacher=False,
)
