"""fd: feature distillation, the squared distance of student and teacher rows; MFD is the same with a masked student
image.

Formula, feature_units="released": fd = mean_{N,D} (A - u)^2 + mean_{N,D} (B - v)^2: a sum over the two modalities, a
    mean over every element, so each sample's squared distance is divided by the width D.
    feature_units="cosine": fd = mean_N (1 - cos(A, u)) + mean_N (1 - cos(B, v)). As |A - u|^2 = 2 (1 - cos), a released
    weight w at width D is 2 w / D in cosine units: 2000 at D = 512 is 7.8125, at D = 768 it is 5.2083.
Gradient: both student towers, through the projections when the sizes differ; the teacher's rows are constants.
Source: CLIP-KD (arXiv 2307.12732), weight 2000; CLIP-RD, weight 2000. MFD: the student sees 25 % of its patches, the
    teacher the whole image; weight 2000, and the masking itself belongs to the student model, not to the objective.
Default weight: 2000 (released units).
Released code: the mean over D makes the weight depend on the width; in the released MFD the task loss, too, is computed
    on the masked image.
"""

from __future__ import annotations

from torch import Tensor

from clipdistill.objective.term import LocalBatch, Term


def feature_loss(batch: LocalBatch) -> Tensor:
    """This rank's share of the squared distance, in the units of the setting."""
    rows = batch.features.matrices
    image = ((rows["projected_image"] - rows["teacher_image"]) ** 2).sum()
    text = ((rows["projected_text"] - rows["teacher_text"]) ** 2).sum()
    width = rows["teacher_image"].shape[1]
    # half the squared distance is 1 - cos, and keeps its digits where 1 - cos would cancel
    divisor = width if batch.setting.feature_units == "released" else 2
    return (image + text) / (divisor * max(batch.world.total, 1))


TERM = Term(
    name="fd",
    title="feature distillation (MFD when the student image is masked)",
    formula="released units: mean_ND (A - u)^2 + mean_ND (B - v)^2; cosine units: mean_N (1 - A.u) + mean_N (1 - B.v)",
    gradient="student image, student text (through the projections)",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=2000.0,
    differs="released units make the weight depend on the width: w = 2000 at D = 512 is 2 w / D = 7.8125 cosine units",
    feature_loss=feature_loss,
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text"),
)
