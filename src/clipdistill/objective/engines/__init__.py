"""What computes an objective's similarity terms. An engine turns named feature matrices and a plan (see `plan.py`) into
one differentiable number: `dense.dense` holds the logit matrices, `tiled.tiled` never does; `choose` picks one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from clipdistill.objective.features import Features
from clipdistill.objective.gather import World
from clipdistill.objective.plan import Plan

EngineName = Literal["dense", "tiled"]


@dataclass(frozen=True)
class EngineOptions:
    """How to compute, never what: every setting gives the same value up to the stated rounding.

    products: "exact" multiplies matrices in the features' own precision, "bfloat16" rounds the factors first (tiled
        only).
    tile_rows: rows of a tile; None lets the engine choose. compile: use torch.compile; None lets the engine choose.
    """

    products: Literal["exact", "bfloat16"] = "exact"
    tile_rows: int | None = None
    compile: bool | None = None


@dataclass(frozen=True)
class EngineResult:
    """total: the weighted sum, differentiable, 0-dimensional. terms: unweighted values per term, detached."""

    total: Tensor
    terms: dict[str, Tensor]


class Engine(Protocol):
    """The call that every engine answers.

    features: `features.matrices` hold this process's LOCAL rows (n_local, D), normalised, float32 or float64, all of
        one type; `features.scales` hold 0-dimensional multipliers and biases. Any of them may require a gradient, and
        one tensor may stand under two names (exchange it once). n_local may be 0 on some ranks.
    plan: what to compute. The average is over all rows of all ranks, `world.total`; row i of rank r is row
        `world.offsets[r] + i` of the whole batch.
    world: rank, number of ranks, rows per rank. With `world.size > 1` the engine itself exchanges the rows, once.
    Returns `total` and `terms`, equal on every rank. For an incoming gradient g (the same on all ranks) backward gives
        to each local matrix  g * world.size * d(total)/d(its rows)  and to each scale any amount whose MEAN over ranks
        is g * d(total)/d(scale); so the averaging of DistributedDataParallel gives exactly the one-process gradient.
        Targets of `Divergence` and of `Sigmoid` are constants. Must work when called several times before backward.
    """

    def __call__(self, features: Features, plan: Plan, world: World, options: EngineOptions) -> EngineResult: ...
