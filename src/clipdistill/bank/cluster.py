"""The term cluster; its facts are those of TERM."""

from __future__ import annotations

import functools
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Annotated

import pydantic

from clipdistill.bank.bank_cross import Temperature
from clipdistill.errors import InputError, needing
from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

COUNT = Option(
    "cluster_count",
    Annotated[int, pydantic.Field(ge=2)],
    256,
    "clusters of the teacher's pictures; where there are fewer pictures, as many as these",
)
TEMPERATURE = Option("cluster_temperature", Temperature, 0.07, "of the student's softmax over the centres")

_ROUNDS = 20


@functools.cache
def _found() -> MutableMapping[Tensor, dict[int, tuple[Tensor, Tensor]]]:
    """Centres and clusters by the bank's pictures and the number asked for: k-means runs once in a run."""
    from torch.utils.weak import WeakTensorKeyDictionary

    return WeakTensorKeyDictionary()


def row_loss(batch: LocalBatch) -> Tensor:
    """Each picture's cross-entropy of its own cluster among all."""
    from torch.nn.functional import cross_entropy

    bank = batch.bank
    assert bank is not None
    if bank.shared is not None:
        raise InputError(
            "the term 'cluster' needs the teacher's embeddings of the whole set at each step, and train.bank_samples "
            "draws some: set train.bank_samples=null"
        )
    known, count = _found().setdefault(bank.image, {}), min(batch.setting[COUNT], len(bank.image))
    if count not in known:
        known[count] = clusters(bank.image, count)
    centres, labels = known[count]
    rows = batch["projected_image"]
    return cross_entropy(rows @ centres.T.to(rows) / batch.setting[TEMPERATURE], labels[bank.place], reduction="none")


def clusters(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(centres (count, D) of length 1, cluster of each row (P,)): spherical k-means from a fixed start, by faiss.

    rows: (P, D), of length 1. Raises MissingExtraError without faiss.
    """
    import torch

    with needing("faiss-cpu", "search", "the term 'cluster' (k-means)"):
        import faiss
    points = rows.detach().float().cpu().numpy()
    limits = {"min_points_per_centroid": 1, "max_points_per_centroid": max(256, -(-len(points) // count))}
    found = faiss.Kmeans(points.shape[1], count, niter=_ROUNDS, seed=1, spherical=True, **limits)
    found.train(points)
    assert found.centroids is not None
    centres = torch.from_numpy(found.centroids.copy()).to(rows)
    # ours, block by block, so that the clusters depend on the centres alone
    labels = torch.cat([(part @ centres.T).argmax(1) for part in rows.split(4096)])
    return centres, labels


TERM = Term(
    name="cluster",
    title="cluster discrimination over the teacher's pictures",
    formula="-(1/N) sum_i log softmax(A C^T / tau)_i,c(i),  C the centres of k-means over the teacher's rows of all "
    "pictures, c(i) the cluster of picture i's",
    gradient="student image (through the projection); centres and clusters are constants",
    source="CLIP-CID, arXiv 2408.09441 (its clusters; instance discrimination is `icl`)",
    row_loss=row_loss,
    options=(COUNT, TEMPERATURE),
    reads=("projected_image", "teacher_image"),
    bank=True,
)
