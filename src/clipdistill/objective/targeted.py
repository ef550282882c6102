"""The term targeted: cosine distances to the teacher, each pair's weighted by how sure the teacher is of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.objective.term import LocalBatch, Term

if TYPE_CHECKING:
    from torch import Tensor


def row_loss(batch: LocalBatch) -> Tensor:
    """Each pair's distances times the teacher's probability of it among the batch, the mean of both directions."""
    import torch

    world = batch.world
    own = torch.arange(world.counts[world.rank], device=batch["teacher_image"].device) + sum(world.counts[: world.rank])
    with torch.no_grad():
        sure = torch.zeros(len(own), device=own.device)
        for query, found in (("image", "text"), ("text", "image")):
            logits = batch["teacher"] * batch[f"teacher_{query}"] @ batch.whole[f"teacher_{found}"].T
            sure = sure + logits.softmax(dim=1).gather(1, own[:, None]).squeeze(1) / 2
    image, text = ((batch[f"projected_{m}"] * batch[f"teacher_{m}"]).sum(1) for m in ("image", "text"))
    return sure * (2 - image - text)


TARGETED = Term(
    name="targeted",
    title="feature distillation weighted by the teacher's confidence",
    formula="mean_i c_i [(1 - A.u)_i + (1 - B.v)_i],  c_i = 1/2 [softmax(T)_ii + softmax(T^T)_ii],  T = t u v^T",
    gradient="student image, student text (through the projections); c, u, v detached",
    source="CLIP-TD, arXiv 2201.05729, its confidence weights; without its tokens (docs/more-methods.md)",
    row_loss=row_loss,
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text", "teacher"),
    gathers=("teacher_image", "teacher_text"),
)
