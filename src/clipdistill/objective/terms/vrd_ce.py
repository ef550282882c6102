"""vrd_ce: the cross-entropies that anchor vertical relational distillation, image and text together.

Formula: I = k_i u A^T, X = k_t v B^T;  vrd_ce = 1/2 [CE(I) + CE(I^T)] + 1/2 [CE(X) + CE(X^T)].
Gradient: both student towers, k_i and k_t; nothing is detached.
Source: CLIP-RD (arXiv 2603.25383), weight 1.
Default weight: 1.
Released code: k_i and k_t multiply cosines directly (2.66 at the start), so at N = 1024 the loss cannot fall below 4.29
    until they have grown; the weight is tied to vrd_kl's.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import CrossEntropy, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Cross-entropy over rows and columns within each modality."""
    return tuple(CrossEntropy(name, axis, 0.5) for name in ("image", "text") for axis in ("rows", "columns"))


TERM = Term(
    name="vrd_ce",
    title="vertical contrast, image and text",
    formula="1/2 [CE(I) + CE(I^T)] + 1/2 [CE(X) + CE(X^T)],  I = k_i u A^T, X = k_t v B^T",
    gradient="student image, student text, k_i, k_t",
    source="CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="one flag scales vrd_kl and vrd_ce; here each has its weight",
    primitives=primitives,
)
