"""vrd_kl: vertical relational distillation, the teacher-student distribution of one modality copied from the other's.

Formula: I = k_i u A^T (teacher image x student image), X = k_t v B^T (teacher text x student text);
    vrd_kl = 1/2 [KL(X || I) + KL(X^T || I^T)].
Gradient: the student's image tower and k_i only: X is the detached target. `vrd_target="image"` turns it round
    (KL(I || X), gradient to the text tower and k_t).
Source: CLIP-RD (arXiv 2603.25383), weight 1, always together with `vrd_ce` under one flag.
Default weight: 1.
Released code: one flag scales vrd_kl and both cross-entropies, so they cannot be told apart there; here `vrd_kl` and
    `vrd_ce` are separate. Alone, vrd_kl has a trivial minimum (both distributions uniform); vrd_ce excludes it. On one
    process the released code fails, and with unequal sizes it mixes projected and unprojected features; here the
    projected ones are used throughout.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Divergence, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Divergence from the copied modality's distribution to the trained one's, over rows and columns."""
    target, trained = ("text", "image") if setting.vrd_target == "text" else ("image", "text")
    return (Divergence(target, trained, "rows", 0.5), Divergence(target, trained, "columns", 0.5))


TERM = Term(
    name="vrd_kl",
    title="vertical relational distillation",
    formula="1/2 [KL(X || I) + KL(X^T || I^T)],  I = k_i u A^T, X = k_t v B^T",
    gradient="student image, k_i; X detached (vrd_target='image': student text, k_t; I detached)",
    source="CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="one flag scales vrd_kl and vrd_ce; here each has its weight",
    primitives=primitives,
)
