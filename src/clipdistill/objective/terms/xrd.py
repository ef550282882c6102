"""The term xrd; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import Divergence
from clipdistill.objective.term import Term

TERM = Term(
    name="xrd",
    title="cross relational distillation",
    formula="1/4 [KL(Q || P) + KL(P || Q) + KL(Q^T || P^T) + KL(P^T || Q^T)],  P = k_c u B^T, Q = k_c v A^T",
    gradient="student image, student text, k_c; the first argument of each KL detached",
    source="CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="k_c, shared with icl, multiplies cosines directly (scales='released')",
    primitives=tuple(
        Divergence(target, trained, axis, 0.25)
        for axis in ("rows", "columns")
        for target, trained in (("text_image", "image_text"), ("image_text", "text_image"))
    ),
)
