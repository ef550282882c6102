"""The term reinforced; its facts are those of TERM."""

from __future__ import annotations

from typing import Annotated

import pydantic

from clipdistill.objective.plan import Axis, CrossEntropy, Divergence, Primitive, teacher_names
from clipdistill.objective.term import Option, Setting, Term

LAMBDA = Option(
    "reinforced_lambda",
    Annotated[float, pydantic.Field(ge=0, le=1)],
    1.0,
    "share of distillation inside the term, the rest is the contrastive loss; not together with `task`",
)
AXES: tuple[Axis, ...] = ("rows", "columns")


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Soft cross-entropy per teacher and axis; it is linear in the target, so the mean moves outside."""
    share = setting[LAMBDA]
    captions = [("student", teacher_names(setting.teachers))]
    if setting.synthetic:
        captions.append(("student_synthetic", teacher_names(setting.teachers, synthetic=True)))
    found: list[Primitive] = []
    for student, teachers in captions:
        for axis in AXES:
            found += [
                Divergence(teacher, student, axis, 0.5 * share / setting.teachers, entropy=False)
                for teacher in teachers
                if share > 0
            ]
            if share < 1:
                found.append(CrossEntropy(student, axis, 0.5 * (1 - share)))
    return tuple(found)


TERM = Term(
    name="reinforced",
    title="distillation from reinforced data (ensemble, real and synthetic caption)",
    formula="sum over captions of 1/2 mean_k [softCE(T_k, S) + softCE(T_k^T, S^T)],  T_k = t_k u_k v_k^T",
    gradient="student image, student text, s; every T_k detached",
    source="MobileCLIP, arXiv 2311.17049; MobileCLIP2, arXiv 2508.20691",
    default_weight=1.0,
    differs="one distillation scale for several teachers raises IndexError there; here it serves all of them",
    primitives=primitives,
    options=(LAMBDA,),
    single_teacher=False,
)
