"""task: the CLIP contrastive loss of the student on its own.

Formula: S = s A0 B0^T;  task = 1/2 [CE(S) + CE(S^T)],  CE(L) = -(1/N) sum_i log softmax(L_i)_i.
    When the step carries synthetic captions (MobileCLIP) the same loss on them is added: a sum, not a mean.
Gradient: both student towers and the student's logit scale; nothing is detached.
Source: CLIP (arXiv 2103.00020); weight 1 in CLIP-RD and CLIP-KD, 1 - lambda in MobileCLIP, 0 in TinyCLIP.
Default weight: 1.
Released code: with unequal sizes CLIP-RD projects the features first, so the evaluated space never sees this loss;
    CLIP-KD does not project them. `projection` chooses; "after-task" (CLIP-KD) is the default.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import CrossEntropy, Primitive
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Cross-entropy over rows and columns, of the real and, if there is one, the synthetic caption."""
    logits = ("student", "student_synthetic") if setting.synthetic else ("student",)
    return tuple(CrossEntropy(name, axis, 0.5) for name in logits for axis in ("rows", "columns"))


TERM = Term(
    name="task",
    title="contrastive loss of the student",
    formula="1/2 [CE(S) + CE(S^T)],  S = s A0 B0^T",
    gradient="student image, student text, s",
    source="CLIP, arXiv 2103.00020",
    default_weight=1.0,
    differs="CLIP-RD projects the features first when the sizes differ (projection='before-task')",
    primitives=primitives,
    single_teacher=False,
)
