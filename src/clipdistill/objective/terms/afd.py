"""The term afd; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import CrossEntropy
from clipdistill.objective.term import Term

TERM = Term(
    name="afd",
    title="augmented feature distillation",
    formula="1/2 [CE(k_f F G^T) + CE(k_f G F^T)],  F = rownorm(W_v [A; u] + c_v), G = rownorm(W_t [B; v] + c_t)",
    gradient="student image, student text, W_v, W_t, c_v, c_t, k_f",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=1.0,
    differs="the released code fails for unequal sizes; its script never switches the term on",
    primitives=(CrossEntropy("fusion", "rows", 0.5), CrossEntropy("fusion", "columns", 0.5)),
)
