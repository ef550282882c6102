"""The term vrd_ce; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import CrossEntropy
from clipdistill.objective.term import Term

TERM = Term(
    name="vrd_ce",
    title="vertical contrast, image and text",
    formula="1/2 [CE(I) + CE(I^T)] + 1/2 [CE(X) + CE(X^T)],  I = k_i u A^T, X = k_t v B^T",
    gradient="student image, student text, k_i, k_t",
    source="CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="one flag scales vrd_kl and vrd_ce; here each has its weight",
    primitives=tuple(CrossEntropy(name, axis, 0.5) for name in ("image", "text") for axis in ("rows", "columns")),
)
