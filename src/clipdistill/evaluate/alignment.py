"""How much of the teacher's geometry the student has: CKA, rank correlation, shared neighbours, VRD and XRD.

All on held-out pairs that both models embedded. Widths may differ; only VRD and XRD compare teacher with student
features directly and need equal widths or the projections that were trained with the student.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError

DISCREPANCY_SCALE = 1 / 0.07
"""Multiplier of the cosines in the VRD and XRD softmaxes, the same for every student, so that values compare."""


def alignment(
    student: EncodedPairs,
    teacher: EncodedPairs,
    *,
    rows: int = 2000,
    k: tuple[int, ...] = (1, 5, 10),
    projections: tuple[nn.Linear, nn.Linear] | None = None,
) -> dict[str, Any]:
    """Teacher-student alignment over the first caption of at most `rows` images, evenly spread over the set.

    Returns {"rows", "cka": {"image", "text"}, "cka_unbiased": {...}, "rank_correlation": {"image_to_text",
    "text_to_image"} (mean and quartiles over rows of Spearman's rho), "neighbour_overlap": {"image_image": {k: share},
    "text_text", "image_to_text", "text_to_image"}, "discrepancy": {"vrd", "xrd", "scale"} or {"unavailable": why}}.
    projections: (image, text) linear maps from student to teacher width, as trained.
    """
    if student.keys != teacher.keys:
        raise InputError("alignment needs the same samples from both models, but their keys differ")
    chosen = _spread(len(student.keys), rows)
    if len(chosen) <= max(3, *k):
        raise InputError(f"alignment over {len(chosen)} images cannot look at {max(3, *k)} neighbours: use more images")
    ours, theirs = ((e.image[chosen], _first_captions(e)[chosen]) for e in (student, teacher))
    result: dict[str, Any] = {"rows": len(chosen)}
    for name, unbiased in (("cka", False), ("cka_unbiased", True)):
        result[name] = {side: linear_cka(a, b, unbiased) for side, a, b in _sides(ours, theirs)}
    student_scores, teacher_scores = ours[0] @ ours[1].T, theirs[0] @ theirs[1].T
    result["rank_correlation"] = {
        "image_to_text": _spearman(student_scores, teacher_scores),
        "text_to_image": _spearman(student_scores.T, teacher_scores.T),
    }
    pairs = {side + "_" + side: (a @ a.T, b @ b.T, True) for side, a, b in _sides(ours, theirs)}
    pairs["image_to_text"] = (student_scores, teacher_scores, False)
    pairs["text_to_image"] = (student_scores.T, teacher_scores.T, False)
    result["neighbour_overlap"] = {
        name: {str(n): neighbour_overlap(a, b, n, exclude_self=alone) for n in k}
        for name, (a, b, alone) in pairs.items()
    }
    result["discrepancy"] = discrepancy(ours, theirs, projections)
    return result


def linear_cka(a: Tensor, b: Tensor, unbiased: bool = False) -> float:
    """Linear centred kernel alignment of two feature matrices (N, D1), (N, D2) of the same samples, up to 1.

    Kornblith et al. 2019. With fewer samples than a few times D it is biased upwards; unbiased=True uses the unbiased
    estimate of HSIC (Song et al. 2012) instead, which is 0 on average for independent features.
    """
    a, b = (x.double() for x in (a, b))
    if not unbiased:
        a, b = (x - x.mean(dim=0) for x in (a, b))
        cross, own_a, own_b = (_squared(x.T @ y) for x, y in ((a, b), (a, a), (b, b)))
        return cross / max((own_a * own_b) ** 0.5, 1e-300)
    gram_a, gram_b = (x @ x.T for x in (a, b))
    for gram in (gram_a, gram_b):
        gram.fill_diagonal_(0)
    cross, own_a, own_b = (_hsic(x, y) for x, y in ((gram_a, gram_b), (gram_a, gram_a), (gram_b, gram_b)))
    return cross / max((own_a * own_b) ** 0.5, 1e-300) if min(own_a, own_b) > 0 else 0.0


def neighbour_overlap(a: Tensor, b: Tensor, k: int, exclude_self: bool) -> float:
    """Mean share of the k nearest columns of each row that two score matrices (N, M) have in common."""
    if exclude_self:
        a, b = (x.clone().fill_diagonal_(-torch.inf) for x in (a, b))
    ours, theirs = (torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(k, dim=1).indices, True) for x in (a, b))
    return float((ours & theirs).sum(dim=1).double().mean() / k)


def discrepancy(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], projections: tuple[nn.Linear, nn.Linear] | None
) -> dict[str, Any]:
    """VRD and XRD of CLIP-RD as measures: how far the student's relations to the teacher are from consistent.

    student, teacher: (image (N, D), text (N, D)) rows of the same pairs. Lower is better; each is a mean
    Kullback-Leibler divergence in nats over batches of up to 1000 pairs at the fixed scale `DISCREPANCY_SCALE`.
    """
    from clipdistill.objective import Embeddings, Objective

    if projections is not None:
        with torch.no_grad():
            student = projections[0](student[0]), projections[1](student[1])
    widths = student[0].shape[1], teacher[0].shape[1]
    if widths[0] != widths[1]:
        return {"unavailable": f"student and teacher embeddings have {widths[0]} and {widths[1]} dimensions"}
    objective = Objective({"vrd_kl": 1.0, "xrd": 1.0}, widths[0], widths[1], engine="dense")
    objective.set_scales(image=DISCREPANCY_SCALE, text=DISCREPANCY_SCALE, cross=DISCREPANCY_SCALE)
    count = len(student[0])
    batch = -(-count // -(-count // 1000))
    found: dict[str, list[float]] = {"vrd_kl": [], "xrd": []}
    with torch.no_grad():
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            one, other = (Embeddings(x[0][part], x[1][part], torch.tensor(1.0)) for x in (student, teacher))
            terms = objective(one, other).terms
            for name, values in found.items():
                values.append(float(terms[name]))
    return {"vrd": float(np.mean(found["vrd_kl"])), "xrd": float(np.mean(found["xrd"])), "scale": DISCREPANCY_SCALE}


def _sides(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
) -> tuple[tuple[str, Tensor, Tensor], tuple[str, Tensor, Tensor]]:
    return ("image", ours[0], theirs[0]), ("text", ours[1], theirs[1])


def _squared(matrix: Tensor) -> float:
    return float(matrix.square().sum())


def _hsic(a: Tensor, b: Tensor) -> float:
    """Unbiased HSIC of two Gram matrices with zero diagonals (up to the constant factor)."""
    n = len(a)
    rows_a, rows_b = a.sum(dim=1), b.sum(dim=1)
    return float((a * b).sum() + rows_a.sum() * rows_b.sum() / ((n - 1) * (n - 2)) - 2 * (rows_a @ rows_b) / (n - 2))


def _spearman(a: Tensor, b: Tensor) -> dict[str, float]:
    """Mean and quartiles over rows of the rank correlation of two (N, M) matrices; rows without spread count as 0."""
    ranks = [stats.rankdata(x.numpy(), axis=1) for x in (a, b)]
    ranks = [x - x.mean(axis=1, keepdims=True) for x in ranks]
    norm = np.sqrt((ranks[0] ** 2).sum(axis=1) * (ranks[1] ** 2).sum(axis=1))
    rho = np.divide((ranks[0] * ranks[1]).sum(axis=1), norm, out=np.zeros(len(norm)), where=norm > 0)
    quartiles = np.quantile(rho, (0.25, 0.5, 0.75))
    return {"mean": float(rho.mean()), **{f"q{q}": float(v) for q, v in zip((25, 50, 75), quartiles, strict=True)}}


def _first_captions(encoded: EncodedPairs) -> Tensor:
    """(N, D): the embedding of the first caption of every image."""
    first = torch.full((len(encoded.image),), len(encoded.text), dtype=torch.int64)
    first.scatter_reduce_(0, encoded.text_to_image, torch.arange(len(encoded.text)), reduce="amin")
    return encoded.text[first]


def _spread(total: int, most: int) -> Tensor:
    count = min(total, most)
    return torch.arange(count) * total // count
