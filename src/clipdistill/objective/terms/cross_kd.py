"""cross_kd: the teacher's own distribution taught to the student-teacher cross-modal one.

Formula: T = t u v^T;  cross_kd = 1/2 [KL(T || k_c A v^T) + KL(T^T || k_c B u^T)].
Gradient: both student towers (through the projections when the sizes differ) and k_c; T is the detached target.
Source: the CLIP-KD release (arXiv 2307.12732), where its weight is 0 in every script.
Default weight: 1 when asked for; no published recipe uses it.
Released code: as here, with k_c a direct multiplier (`scales="released"`).
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Divergence, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Divergence over the teacher's texts for each student image, and over its images for each student text."""
    # a row of k_c B u^T is a column of P = k_c u B^T, and a row of T^T a column of T
    return (
        Divergence("teacher", "student_image_teacher_text", "rows", 0.5),
        Divergence("teacher", "image_text", "columns", 0.5),
    )


TERM = Term(
    name="cross_kd",
    title="cross-modal distillation through the teacher's rows",
    formula="1/2 [KL(T || k_c A v^T) + KL(T^T || k_c B u^T)],  T = t u v^T",
    gradient="student image, student text, k_c; T detached",
    source="CLIP-KD release, arXiv 2307.12732",
    default_weight=1.0,
    primitives=primitives,
)
