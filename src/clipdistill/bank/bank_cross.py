"""The term bank_cross; its facts are those of TERM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import pydantic

from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

Temperature = Annotated[float, pydantic.Field(ge=1e-4, allow_inf_nan=False)]

TEACHER = Option("bank_cross_temperature", Temperature, 0.05, "of the teacher's distribution over the bank")
STUDENT = Option("bank_cross_student", Temperature | None, None, "the student's temperature (None: the teacher's)")
POSITIVES = Option(
    "bank_cross_positives",
    Annotated[float, pydantic.Field(ge=0, le=1)],
    0.0,
    "share of a second target: the teacher's distribution over the row's own captions (a caption: its picture) alone",
)


def row_loss(batch: LocalBatch) -> Tensor:
    """Each pair's two divergences, halved."""
    from clipdistill.bank.divergence import divergence

    assert batch.bank is not None
    teacher = batch.setting[TEACHER]
    student = batch.setting[STUDENT] or teacher
    image, text = (
        divergence(
            batch[f"projected_{own}"],
            batch.bank.side(other),
            1 / student,
            batch[f"teacher_{own}"],
            1 / teacher,
            positives=batch.setting[POSITIVES],
        )
        for own, other in (("image", "text"), ("text", "image"))
    )
    return (image + text) / 2


TERM = Term(
    name="bank_cross",
    title="pictures against all captions of the training set, captions against all pictures",
    formula="1/2 [KL(u V^T / tau || A V^T / tau_s) + KL(v U^T / tau || B U^T / tau_s)],  "
    "V, U the teacher's rows of all captions and all pictures",
    gradient="student image, student text; every row of the teacher detached",
    source="own; queues of teacher embeddings: SEED, arXiv 2101.04731; CompRess, arXiv 2010.14713",
    row_loss=row_loss,
    options=(TEACHER, STUDENT, POSITIVES),
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text"),
    bank=True,
)
