"""Terms of one modality: what a picture alone, or a text alone, can learn from the teacher."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from clipdistill.objective.plan import Divergence, Pairing
from clipdistill.objective.term import LocalBatch, Term

if TYPE_CHECKING:
    from torch import Tensor

_TEMPERATURE = 0.1


def _distances(modality: str, batch: LocalBatch) -> Tensor:
    return 1 - (batch[f"projected_{modality}"] * batch[f"teacher_{modality}"]).sum(1)


def _cosine(modality: str, own: str, rows: str, source: str) -> Term:
    return Term(
        name=f"cosine_{modality}",
        title=f"cosine distance to the teacher's {rows}, which needs nothing else",
        formula=f"1 - mean_N {own}  (half the squared distance of rows of length 1)",
        gradient=f"student {modality} (through the projection)",
        source=source,
        row_loss=partial(_distances, modality),
        reads=(f"projected_{modality}", f"teacher_{modality}"),
    )


def _within(modality: str, teacher: str, student: str, rows: str) -> Term:
    names = f"{modality}_relations_teacher", f"{modality}_relations_student"
    both = zip(names, (f"teacher_{modality}", f"projected_{modality}"), strict=True)
    return Term(
        name=f"within_{modality}",
        title=f"{rows} of the batch against the teacher's {rows}",
        formula=f"KL({teacher} / tau || {student} / tau),  tau = {_TEMPERATURE}",
        gradient=f"student {modality} (through the projection); the teacher's rows detached",
        source="SEED, arXiv 2101.04731, and CompRess, arXiv 2010.14713, with the batch in place of their queue",
        primitives=(Divergence(*names, "rows", 1.0),),
        pairings=tuple(Pairing(n, own, f"teacher_{modality}", temperature=_TEMPERATURE) for n, own in both),
    )


COSINE_IMAGE = _cosine("image", "A.u", "pictures", "CLIP-KD's feature distillation (arXiv 2307.12732), of one tower")
COSINE_TEXT = _cosine("text", "B.v", "texts", "Reimers and Gurevych 2020, arXiv 2004.09813, on rows of length 1")
WITHIN_IMAGE = _within("image", "u u^T", "A u^T", "pictures")
WITHIN_TEXT = _within("text", "v v^T", "B v^T", "texts")
