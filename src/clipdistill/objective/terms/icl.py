"""The term icl; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import CrossEntropy
from clipdistill.objective.term import Term

TERM = Term(
    name="icl",
    title="interactive contrastive learning",
    formula="1/2 [CE(Q^T) + CE(P^T)],  P = k_c u B^T, Q = k_c v A^T",
    gradient="student image, student text, k_c",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=1.0,
    differs="k_c multiplies cosines directly although it is initialised as a logarithm (scales='released')",
    # a column of Q = v A^T is one student image against every teacher text
    primitives=(CrossEntropy("text_image", "columns", 0.5), CrossEntropy("image_text", "columns", 0.5)),
)
