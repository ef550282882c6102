"""icl: interactive contrastive learning, the student's rows contrasted against the teacher's.

Formula: P = k_c u B^T, Q = k_c v A^T;  icl = 1/2 [CE(Q^T) + CE(P^T)]: student image against teacher texts, student text
    against teacher images.
Gradient: both student towers (through the projections when the sizes differ) and k_c; the teacher's rows are constants.
Source: CLIP-KD (arXiv 2307.12732), weight 1; CLIP-RD, weight 1.
Default weight: 1.
Released code: k_c multiplies the cosines directly (no exponential), so it starts at 2.66 rather than 14.3; with
    `scales="released"` so does ours. Only one direction of each matrix is used: softmax over the teacher's rows.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import CrossEntropy, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Cross-entropy of each student row over the teacher's rows of the other modality."""
    # a column of Q = v A^T is one student image against every teacher text
    return (CrossEntropy("text_image", "columns", 0.5), CrossEntropy("image_text", "columns", 0.5))


TERM = Term(
    name="icl",
    title="interactive contrastive learning",
    formula="1/2 [CE(Q^T) + CE(P^T)],  P = k_c u B^T, Q = k_c v A^T",
    gradient="student image, student text, k_c",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=1.0,
    differs="k_c multiplies cosines directly although it is initialised as a logarithm (scales='released')",
    primitives=primitives,
)
