"""The term cosine; its facts are those of TERM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.objective.term import LocalBatch, Term

if TYPE_CHECKING:
    from torch import Tensor


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
