"""Two loss terms of your own. Put this file anywhere, name the terms in a recipe, and give both to any command:

    clipdistill train --plugin own_loss.py --recipe mine.yaml --explain

with mine.yaml:

    from: clip-kd
    objective:
      weights: {relations: 2, huber: 10}
      relations_of: both
"""

from typing import Annotated, Literal

import pydantic
import torch.nn.functional as F

import clipdistill as cd
from clipdistill.objective import Divergence, LocalBatch, Option, Pairing, Setting, Term

# A term of similarities: which images (texts) are alike is learnt from the teacher, at a fixed temperature. It is
# written as data, so the dense and the tiled engine compute it, on any number of ranks.
OF = Option("relations_of", Literal["images", "texts", "both"], "images", "whose likeness is learnt")


def relations(setting: Setting) -> tuple[Divergence, ...]:
    chosen = ("images", "texts") if setting[OF] == "both" else (setting[OF],)
    return tuple(Divergence(f"teacher_{kind}", f"student_{kind}", "rows", 1.0) for kind in chosen)


cd.register_term(
    Term(
        "relations",
        formula="KL(u u^T / 0.1 || A0 A0^T / 0.1)",
        primitives=relations,
        pairings=(
            Pairing("student_images", "student_image", "student_image", temperature=0.1),
            Pairing("teacher_images", "teacher_image", "teacher_image", temperature=0.1),
            Pairing("student_texts", "student_text", "student_text", temperature=0.1),
            Pairing("teacher_texts", "teacher_text", "teacher_text", temperature=0.1),
        ),
        options=(OF,),
    )
)

# A term of rows: one value for each of this rank's rows; the mean over all ranks is taken for you.
BETA = Option(
    "huber_beta", Annotated[float, pydantic.Field(gt=0)], 0.1, "where the distance turns from square to linear"
)


def huber(batch: LocalBatch):  # type: ignore[no-untyped-def]
    ours, theirs = batch["projected_image"], batch["teacher_image"]  # (n_local, D), of length 1
    return F.smooth_l1_loss(ours, theirs, beta=batch.setting[BETA], reduction="none").sum(dim=1)


cd.register_term(Term("huber", row_loss=huber, reads=("projected_image", "teacher_image"), options=(BETA,)))
