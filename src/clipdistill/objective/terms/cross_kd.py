"""The term cross_kd; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import Divergence
from clipdistill.objective.term import Term

TERM = Term(
    name="cross_kd",
    title="cross-modal distillation through the teacher's rows",
    formula="1/2 [KL(T || k_c A v^T) + KL(T^T || k_c B u^T)],  T = t u v^T",
    gradient="student image, student text, k_c; T detached",
    source="CLIP-KD release, arXiv 2307.12732",
    default_weight=1.0,
    # a row of k_c B u^T is a column of P = k_c u B^T, and a row of T^T a column of T
    primitives=(
        Divergence("teacher", "student_image_teacher_text", "rows", 0.5),
        Divergence("teacher", "image_text", "columns", 0.5),
    ),
)
