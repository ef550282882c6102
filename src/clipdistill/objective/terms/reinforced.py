"""reinforced: MobileCLIP's distillation from an ensemble of teachers, on the real and on a synthetic caption.

Formula: for each teacher k, T_k = t_k u_k v_k^T with its own block of the stored embedding and its own scale t_k;
    L = 1/2 mean_k [softCE(T_k, S) + softCE(T_k^T, S^T)],  S = s A0 B0^T;  reinforced = L(real) + L(synthetic): a sum.
    The whole MobileCLIP loss is (1 - lambda) task + lambda L, summed over both captions. Write it as two weights,
    {"task": 1 - lambda, "reinforced": lambda} (`task` also sums over both captions), or as {"reinforced": 1} with
    `reinforced_lambda` = lambda, which puts the contrastive part inside this term. Not both.
Gradient: both student towers (the text tower through both captions) and s; every T_k is detached.
Source: MobileCLIP (arXiv 2311.17049), MobileCLIP2 (arXiv 2508.20691); lambda 0.75 for MobileCLIP-B, 1 for the others.
Default weight: 1.
Released code: averages the teachers' probabilities before one soft cross-entropy, which is the same number; the paper
    writes a KL divergence, which differs by the teachers' entropy, a constant. Its single distillation scale for two
    teachers raises IndexError; here one scale serves all teachers.
"""

from __future__ import annotations

from clipdistill.objective.pairings import Setting, teacher_names
from clipdistill.objective.plan import Axis, CrossEntropy, Divergence, Primitive
from clipdistill.objective.term import Term

AXES: tuple[Axis, ...] = ("rows", "columns")


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Soft cross-entropy per teacher and axis; soft cross-entropy is linear in the target, so the mean moves
    outside.
    """
    share = setting.reinforced_lambda
    captions = [("student", teacher_names(setting))]
    if setting.synthetic:
        captions.append(("student_synthetic", teacher_names(setting, synthetic=True)))
    found: list[Primitive] = []
    for student, teachers in captions:
        for axis in AXES:
            found += [
                Divergence(teacher, student, axis, 0.5 * share / setting.teachers, entropy=False)
                for teacher in teachers
                if share > 0
            ]
            if share < 1:
                found.append(CrossEntropy(student, axis, 0.5 * (1 - share)))
    return tuple(found)


TERM = Term(
    name="reinforced",
    title="distillation from reinforced data (ensemble, real and synthetic caption)",
    formula="sum over captions of 1/2 mean_k [softCE(T_k, S) + softCE(T_k^T, S^T)],  T_k = t_k u_k v_k^T",
    gradient="student image, student text, s; every T_k detached",
    source="MobileCLIP, arXiv 2311.17049; MobileCLIP2, arXiv 2508.20691",
    default_weight=1.0,
    differs="one distillation scale for several teachers raises IndexError there; here it serves all of them",
    primitives=primitives,
    single_teacher=False,
)
