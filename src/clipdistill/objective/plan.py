"""What a similarity-based term needs, written as data, so that every engine computes the same thing.

Each such term is a weighted list of row- or column-wise *primitives* on named N x N logit matrices (*pairings*).
A term's file declares its primitives; `dense.py` and `tiled.py` interpret them independently of each other, and
the tests hold both against the released implementations. Nothing here computes anything.

Notation as in docs/methods.md: A, B student image and text rows, u, v the teacher's, all L2-normalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Pairing:
    """One N x N logit matrix  scale * rows @ columns.T (+ bias).

    rows, columns: names of normalised feature matrices (N, D) in `Features`; the two have the same D.
    scale: name of the scalar multiplier in `Features.scales`; bias: name of an additive scalar, or None.
    trained: False for teacher-teacher matrices, which never receive a gradient.
    """

    name: str
    rows: str
    columns: str
    scale: str
    bias: str | None = None
    trained: bool = True


@dataclass(frozen=True)
class CrossEntropy:
    """weight * mean_i [logsumexp_i(L) - L_ii] along `axis` ("rows": softmax over each row)."""

    logits: str
    axis: Axis
    weight: float


@dataclass(frozen=True)
class Divergence:
    """weight * (1/N) sum_i D(softmax_i(target) || softmax_i(logits)) along `axis`; the target is detached.

    entropy=True: Kullback-Leibler divergence; False: soft cross-entropy (no target entropy; same gradient).
    """

    target: str
    logits: str
    axis: Axis
    weight: float
    entropy: bool = True


@dataclass(frozen=True)
class Sigmoid:
    """weight * (1/N) sum_ij softplus(-y_ij L_ij).

    targets empty: y = +1 on the diagonal, -1 elsewhere (SigLIP). Otherwise y_ij = 2 mean_k sigmoid(target_k,ij) - 1.
    """

    logits: str
    weight: float
    targets: tuple[str, ...] = ()


Primitive = CrossEntropy | Divergence | Sigmoid
