"""The term bank_within; its facts are those of TERM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.bank.bank_cross import Temperature
from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

TEACHER = Option("bank_within_temperature", Temperature, 0.05, "of the teacher's distribution over the bank")
STUDENT = Option("bank_within_student", Temperature | None, None, "the student's temperature (None: the teacher's)")


def row_loss(batch: LocalBatch) -> Tensor:
    """Each pair's two divergences, halved."""
    from clipdistill.bank.divergence import divergence

    assert batch.bank is not None
    teacher = batch.setting[TEACHER]
    student = batch.setting[STUDENT] or teacher
    image, text = (
        divergence(batch[f"projected_{own}"], batch.bank.side(own), 1 / student, batch[f"teacher_{own}"], 1 / teacher)
        for own in ("image", "text")
    )
    return (image + text) / 2


TERM = Term(
    name="bank_within",
    title="pictures against all pictures of the training set, captions against all captions",
    formula="1/2 [KL(u U^T / tau || A U^T / tau_s) + KL(v V^T / tau || B V^T / tau_s)],  "
    "U, V the teacher's rows of all pictures and all captions",
    gradient="student image, student text; every row of the teacher detached",
    source="SEED, arXiv 2101.04731, and CompRess, arXiv 2010.14713, for pictures and a queue; the rest own",
    row_loss=row_loss,
    options=(TEACHER, STUDENT),
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text"),
    bank=True,
)
