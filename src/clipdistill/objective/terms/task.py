"""The term task; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import CrossEntropy, Primitive
from clipdistill.objective.term import Setting, Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Cross-entropy over rows and columns, of the real and, if there is one, the synthetic caption."""
    logits = ("student", "student_synthetic") if setting.synthetic else ("student",)
    return tuple(CrossEntropy(name, axis, 0.5) for name in logits for axis in ("rows", "columns"))


TERM = Term(
    name="task",
    title="contrastive loss of the student",
    formula="1/2 [CE(S) + CE(S^T)],  S = s A0 B0^T",
    gradient="student image, student text, s",
    source="CLIP, arXiv 2103.00020",
    default_weight=1.0,
    differs="CLIP-RD projects the features first when the sizes differ (projection='before-task')",
    primitives=primitives,
    single_teacher=False,
)
