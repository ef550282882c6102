"""sigmoid: SigLIP's pairwise loss, plain or distilled.

Formula: L = s A0 B0^T + b;  sigmoid = (1/N) sum_ij softplus(-y_ij L_ij): a sum over all N^2 pairs divided by N.
    sigmoid_targets="pairs": y = +1 on the diagonal, -1 elsewhere (SigLIP).
    sigmoid_targets="teacher": y_ij = 2 mean_k sigmoid(t_k u_k v_k^T + b_k)_ij - 1 over the teachers of the ensemble.
    When the step carries synthetic captions the same loss on them is added.
Gradient: both student towers, s and b; the labels are detached.
Source: SigLIP (arXiv 2303.15343), s starts at 10 and b at -10; the distilled labels from MobileCLIP2's patch to
    open_clip (arXiv 2508.20691).
Default weight: 1.
Released code: the distilled labels assume teachers trained with a sigmoid loss; a teacher without `logit_bias` gives
    labels near +1 for every pair of positive cosine.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Primitive, Sigmoid
from clipdistill.objective.term import Term


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """One sigmoid sum, and one more for the synthetic caption."""
    distilled = setting.sigmoid_targets == "teacher"
    teachers = range(setting.teachers)
    real = tuple("teacher_sigmoid" if setting.teachers == 1 else f"teacher_sigmoid_{k}" for k in teachers)
    found: list[Primitive] = [Sigmoid("student_sigmoid", 1.0, real if distilled else ())]
    if setting.synthetic:
        synthetic = tuple(f"teacher_synthetic_sigmoid_{k}" for k in teachers)
        found.append(Sigmoid("student_synthetic_sigmoid", 1.0, synthetic if distilled else ()))
    return tuple(found)


TERM = Term(
    name="sigmoid",
    title="pairwise sigmoid loss",
    formula="(1/N) sum_ij softplus(-y_ij L_ij),  L = s A0 B0^T + b;  y = +-1, or 2 mean_k sigmoid(teacher_k) - 1",
    gradient="student image, student text, s, b; y detached",
    source="SigLIP, arXiv 2303.15343; MobileCLIP2, arXiv 2508.20691",
    default_weight=1.0,
    primitives=primitives,
    single_teacher=False,
)
