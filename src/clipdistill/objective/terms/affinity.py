"""The term affinity; its facts are those of TERM."""

from __future__ import annotations

from clipdistill.objective.plan import Divergence
from clipdistill.objective.term import Term

TERM = Term(
    name="affinity",
    title="affinity mimicking (soft cross-entropy)",
    formula="1/2 [softCE(T, S) + softCE(T^T, S^T)],  S = s A0 B0^T, T = t u v^T",
    gradient="student image, student text, s; T detached",
    source="TinyCLIP, arXiv 2309.12314; open_clip DistillClipLoss",
    default_weight=1.0,
    differs="TinyCLIP's scripts fix s = t = 50",
    primitives=(
        Divergence("teacher", "student", "rows", 0.5, entropy=False),
        Divergence("teacher", "student", "columns", 0.5, entropy=False),
    ),
)
