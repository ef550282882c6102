"""The term gd; its facts are those of TERM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

    from clipdistill.objective.gather import World

TEMPERATURE = Option(
    "gd_temperature",
    Literal["released", "fixed"],
    "released",
    "tau is the scale itself, as in the released code, or one over it (another size of the term: tune its weight)",
)

STRIPE_ELEMENTS = 1 << 22
"""Of one stripe of the N x N matrix E. Stripes are recomputed backward, so memory stays linear in N."""


def feature_loss(batch: LocalBatch) -> Tensor:
    """This rank's share of the four mean squared differences."""
    import torch

    student = _gradients(batch, "projected", batch.features.scales["student"])
    with torch.no_grad():
        teacher = _gradients(batch, "teacher", batch.features.scales["teacher"])
    width = batch.features.matrices["teacher_image"].shape[1]
    squared = torch.stack([((own - target) ** 2).sum() for own, target in zip(student, teacher)]).sum()
    return squared / (width * max(batch.world.total, 1))


def _gradients(batch: LocalBatch, who: str, scale: Tensor) -> list[Tensor]:
    """Own rows of the gradients w.r.t. anchors and candidates, both directions: four of (n_local, D)."""
    temperature = scale if batch.setting[TEMPERATURE] == "released" else 1 / scale
    found: list[Tensor] = []
    for anchors, candidates in (("image", "text"), ("text", "image")):
        own, others = batch.features.matrices[f"{who}_{anchors}"], batch.whole[f"{who}_{candidates}"]
        found += contrastive_gradients(own, others, temperature, batch.world)
    return found


def contrastive_gradients(
    anchors: Tensor, candidates: Tensor, temperature: Tensor, world: World
) -> tuple[Tensor, Tensor]:
    """Gradients of the one-way contrastive loss w.r.t. unit rows.

    anchors: own rows (n_local, D); candidates: all rows (N, D). Returns own rows of both gradients.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    from clipdistill.objective.gather import reduce_rows

    stripe = max(1, STRIPE_ELEMENTS // max(1, len(candidates)))
    by_anchor: list[Tensor] = []
    by_candidate = torch.zeros_like(candidates)
    for start in range(0, len(anchors), stripe):
        rows = anchors[start : start + stripe]
        arguments = (rows, candidates, temperature, world.offset + start)
        if len(anchors) > stripe and torch.is_grad_enabled():
            first, second = checkpoint(_stripe, *arguments, use_reentrant=False)
        else:
            first, second = _stripe(*arguments)
        by_anchor.append(first)
        by_candidate = by_candidate + second
    if not by_anchor:
        # a rank without rows still takes part in the exchange below, forward and backward
        by_anchor, by_candidate = [anchors * temperature], candidates * (0 * temperature)
    factor = 1 / (temperature * max(world.total, 1))
    return torch.cat(by_anchor) * factor, reduce_rows(by_candidate, world) * factor


def _stripe(rows: Tensor, candidates: Tensor, temperature: Tensor, first: int) -> tuple[Tensor, Tensor]:
    import torch

    error = torch.softmax(rows @ candidates.T / temperature, dim=1)
    hit = torch.zeros_like(error)
    torch.diagonal(hit, first).fill_(1.0)
    error = error - hit
    return error @ candidates, error.T @ rows


TERM = Term(
    name="gd",
    title="gradient distillation",
    formula="sum of 4 mean_ND (g_student - g_teacher)^2,  "
    "E = softmax(p k^T / tau) - 1, g_p = E k / (tau N), g_k = E^T p / (tau N)",
    gradient="student image, student text, s (also through the softmax); the teacher's gradients detached",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=1e8,
    differs="the released code uses tau = s instead of 1/s; gd_temperature='fixed' puts it right",
    feature_loss=feature_loss,
    options=(TEMPERATURE,),
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text", "student", "teacher"),
    gathers=("projected_image", "projected_text", "teacher_image", "teacher_text"),
)
