"""The term logit_mse: logits matched by their squared difference instead of a divergence of their softmaxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

CENTRED = Option(
    "logit_mse_centred",
    bool,
    False,
    "each query's mean logit taken away: then twice the limit of tau^2 KL(T / tau || S / tau) for tau to infinity",
)


def row_loss(batch: LocalBatch) -> Tensor:
    """Each pair's mean squared difference over its row and its column of the two N x N matrices, halved.

    No N x N matrix is made: S - T = X Y^T with X = [s A0, -t u], Y = [B0, v], so row i's sum of squares is
    x_i (Y^T Y) x_i^T. In float64, where a float32 sum of three large parts would lose a small difference.
    """
    import torch

    total: Tensor | float = 0.0
    student, teacher = batch["student"], batch["teacher"]
    for own, other in (("image", "text"), ("text", "image")):
        queries = torch.cat([student * batch[f"student_{own}"], -teacher * batch[f"teacher_{own}"]], dim=1)
        found = torch.cat([batch.whole[f"student_{other}"], batch.whole[f"teacher_{other}"]], dim=1)
        if found.device.type != "mps":
            queries, found = queries.double(), found.double()
        if batch.setting[CENTRED]:
            found = found - found.mean(0)
        total = total + (queries @ (found.T @ found) * queries).sum(1) / len(found)
    assert not isinstance(total, float)
    return (total / 2).to(batch["student_image"].dtype)


_ROWS = ("student_image", "student_text", "teacher_image", "teacher_text")

LOGIT_MSE = Term(
    name="logit_mse",
    title="logits matched by their mean squared difference",
    formula="mean_NN (S - T)^2,  S = s A0 B0^T, T = t u v^T",
    gradient="student image, student text, s; T detached",
    source="Kim et al. 2021, arXiv 2105.08919, on the logits of a batch; for classes, not for CLIP, in the paper",
    row_loss=row_loss,
    options=(CENTRED,),
    reads=(*_ROWS, "student", "teacher"),
    gathers=_ROWS,
)
