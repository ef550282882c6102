"""The term bank_xrd; its facts are those of TERM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.bank.bank_cross import Temperature
from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = Option("bank_xrd_temperature", Temperature, 0.05, "of both distributions")


def row_loss(batch: LocalBatch) -> Tensor:
    """Each pair's two divergences, halved."""
    from clipdistill.bank.divergence import divergence

    assert batch.bank is not None
    pictures, captions = batch.bank.paired()
    image, text, scale = batch["projected_image"], batch["projected_text"], 1 / batch.setting[TEMPERATURE]
    to_image = divergence(image, captions, scale, text, scale, target_side=pictures)
    to_text = divergence(text, pictures, scale, image, scale, target_side=captions)
    return (to_image + to_text) / 2


TERM = Term(
    name="bank_xrd",
    title="cross relational distillation over the training set",
    formula="1/2 [KL(Y || X) + KL(X || Y)],  X = A C^T / tau, Y = B U^T / tau,  "
    "U the teacher's rows of all pictures, C the mean of each picture's captions, of length 1",
    gradient="student image, student text; the first argument of each KL detached, as every row of the teacher",
    source="own; over a batch: xrd of CLIP-RD, arXiv 2603.25383",
    row_loss=row_loss,
    options=(TEMPERATURE,),
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text"),
    bank=True,
)
