"""xrd: cross relational distillation, the two teacher-student cross-modal distributions pulled together.

Formula: P = k_c u B^T (teacher image x student text), Q = k_c v A^T (teacher text x student image);
    xrd = 1/4 [KL(Q || P) + KL(P || Q) + KL(Q^T || P^T) + KL(P^T || Q^T)].
Gradient: both student towers and k_c; in each of the four divergences the first argument is detached.
Source: CLIP-RD (arXiv 2603.25383), weight 1.
Default weight: 1.
Released code: shares k_c with icl, not exponentiated (`scales="released"`); on one process with unequal sizes it
    multiplies matrices of different width and stops.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Divergence, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Divergence both ways, over rows and columns."""
    return tuple(
        Divergence(target, trained, axis, 0.25)
        for axis in ("rows", "columns")
        for target, trained in (("text_image", "image_text"), ("image_text", "text_image"))
    )


TERM = Term(
    name="xrd",
    title="cross relational distillation",
    formula="1/4 [KL(Q || P) + KL(P || Q) + KL(Q^T || P^T) + KL(P^T || Q^T)],  P = k_c u B^T, Q = k_c v A^T",
    gradient="student image, student text, k_c; the first argument of each KL detached",
    source="CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="k_c, shared with icl, multiplies cosines directly (scales='released')",
    primitives=primitives,
)
