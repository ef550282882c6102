"""cosine: DCLIP's distance of the student's embeddings to the region-aware teacher's.

Formula: cosine = [1 - mean_N cos(A, u)] + [1 - mean_N cos(B, v)].
    u is the teacher's cross-modal global embedding, v its plain sentence embedding; which embedding the teacher hands
    over is the teacher's business, the term only compares rows.
Gradient: both student towers (through the projections when the sizes differ); the teacher's rows are constants.
Source: DCLIP (arXiv 2505.21549), weight 1 beside a contrastive loss at the fixed temperature 0.05 (`logit_scale` 20).
Default weight: 1.
Released code: half of its "image" target u is pooled from the caption, so the term leaks text into the image tower; the
    region weights described in the paper are never applied. Equal to `fd` with feature_units="cosine".
"""

from __future__ import annotations

from torch import Tensor

from clipdistill.objective.term import LocalBatch, Term


def feature_loss(batch: LocalBatch) -> Tensor:
    """This rank's share of the sum of both distances."""
    rows = batch.features.matrices
    image = (1 - (rows["projected_image"] * rows["teacher_image"]).sum(dim=1)).sum()
    text = (1 - (rows["projected_text"] * rows["teacher_text"]).sum(dim=1)).sum()
    return (image + text) / max(batch.world.total, 1)


TERM = Term(
    name="cosine",
    title="cosine distance to the teacher's embeddings",
    formula="[1 - mean_N A.u] + [1 - mean_N B.v]",
    gradient="student image, student text (through the projections)",
    source="DCLIP, arXiv 2505.21549",
    default_weight=1.0,
    differs="the released teacher pools half of u from the caption and never applies its region weights",
    feature_loss=feature_loss,
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text"),
)
