"""crd: contrastive relational distillation; CLIP-RD calls the same term HRD.

Formula: S = s A0 B0^T, T = t u v^T;  crd = 1/2 [KL(T || S) + KL(T^T || S^T)], KL the mean over rows.
Gradient: both student towers and the student's logit scale; T is the detached target.
Source: CLIP-KD (arXiv 2307.12732), weight 1; CLIP-RD (arXiv 2603.25383), weight 1.
Default weight: 1.
Released code: as `task`, CLIP-RD uses the projected features when the sizes differ.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Divergence, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Kullback-Leibler divergence from the teacher's to the student's distribution, over rows and columns."""
    return (Divergence("teacher", "student", "rows", 0.5), Divergence("teacher", "student", "columns", 0.5))


TERM = Term(
    name="crd",
    title="contrastive relational distillation (HRD in CLIP-RD)",
    formula="1/2 [KL(T || S) + KL(T^T || S^T)],  S = s A0 B0^T, T = t u v^T",
    gradient="student image, student text, s; T detached",
    source="CLIP-KD, arXiv 2307.12732; CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="CLIP-RD projects the features first when the sizes differ (projection='before-task')",
    primitives=primitives,
)
