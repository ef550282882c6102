"""The term crd; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import Divergence
from clipdistill.objective.term import Term

TERM = Term(
    name="crd",
    title="contrastive relational distillation (HRD in CLIP-RD)",
    formula="1/2 [KL(T || S) + KL(T^T || S^T)],  S = s A0 B0^T, T = t u v^T",
    gradient="student image, student text, s; T detached",
    source="CLIP-KD, arXiv 2307.12732; CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="CLIP-RD projects the features first when the sizes differ (projection='before-task')",
    primitives=(Divergence("teacher", "student", "rows", 0.5), Divergence("teacher", "student", "columns", 0.5)),
)
