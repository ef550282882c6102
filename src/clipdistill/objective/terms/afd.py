"""afd: augmented feature distillation, a contrastive loss on student and teacher features fused by a linear layer.

Formula: F = rownorm(W_v [A; u] + c_v), G = rownorm(W_t [B; v] + c_t);  afd = 1/2 [CE(k_f F G^T) + CE(k_f G F^T)].
    The fused width is D_s; the input is D_s + D_t, or 2 D_t when the sizes differ (A and B are then projected).
Gradient: both student towers, the two fusion layers and k_f; the teacher's rows are constants.
Source: CLIP-KD (arXiv 2307.12732), weight 1 on its own; not part of the final mix.
Default weight: 1.
Released code: builds the fusion layers for D_s + D_t inputs but feeds 2 D_t, so it fails when the sizes differ; its
    script sets CRD's weight instead of AFD's. k_f is a direct multiplier (`scales="released"`).
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import CrossEntropy, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Cross-entropy over rows and columns of the fused similarities."""
    return (CrossEntropy("fusion", "rows", 0.5), CrossEntropy("fusion", "columns", 0.5))


TERM = Term(
    name="afd",
    title="augmented feature distillation",
    formula="1/2 [CE(k_f F G^T) + CE(k_f G F^T)],  F = rownorm(W_v [A; u] + c_v), G = rownorm(W_t [B; v] + c_t)",
    gradient="student image, student text, W_v, W_t, c_v, c_t, k_f",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=1.0,
    differs="the released code fails for unequal sizes; its script never switches the term on",
    primitives=primitives,
)
