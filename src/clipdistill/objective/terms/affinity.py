"""affinity: affinity mimicking, the soft cross-entropy of the student's similarities under the teacher's.

Formula: S = s A0 B0^T, T = t u v^T;  affinity = 1/2 [softCE(T, S) + softCE(T^T, S^T)],
    softCE(T, S) = -(1/N) sum_ij softmax(T)_ij log softmax(S)_ij.
Gradient: both student towers and s, the same as crd's (the two differ by the teacher's entropy, a constant); T
    detached.
Source: TinyCLIP (arXiv 2309.12314), weight 1 with task 0; open_clip's DistillClipLoss is task + affinity, both weight
    1.
Default weight: 1.
Released code: TinyCLIP's scripts set s and t back to 50 at every step (hand both over as `logit_scale`); it works only
    with local losses. No projection is needed when the sizes differ: only N x N similarities are compared.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Divergence, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Soft cross-entropy over rows and columns."""
    return (
        Divergence("teacher", "student", "rows", 0.5, entropy=False),
        Divergence("teacher", "student", "columns", 0.5, entropy=False),
    )


TERM = Term(
    name="affinity",
    title="affinity mimicking (soft cross-entropy)",
    formula="1/2 [softCE(T, S) + softCE(T^T, S^T)],  S = s A0 B0^T, T = t u v^T",
    gradient="student image, student text, s; T detached",
    source="TinyCLIP, arXiv 2309.12314; open_clip DistillClipLoss",
    default_weight=1.0,
    differs="TinyCLIP's scripts fix s = t = 50",
    primitives=primitives,
)
