"""The seam between the objective and what computes it, and the choice of an engine.

An engine turns named feature matrices and a plan (see `plan.py`) into one differentiable number. There are two:
`dense.dense`, which holds the logit matrices, and `tiled.tiled`, which never does. Both satisfy `Engine`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from clipdistill.objective.features import Features
from clipdistill.objective.gather import World
from clipdistill.objective.plan import CrossEntropy, Divergence, Pairing, Primitive
from clipdistill.runtime.machine import free_memory

EngineName = Literal["dense", "tiled"]


@dataclass(frozen=True)
class Plan:
    """What an engine is asked to compute: total = sum over terms of weights[t] * sum over primitives[t].

    pairings: every N x N logit matrix the primitives name (and no other), by name.
    primitives: per term, in the order of `weights`; a term whose weight is 0 is never here.
    """

    pairings: Mapping[str, Pairing]
    primitives: Mapping[str, tuple[Primitive, ...]]
    weights: Mapping[str, float]


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


def load_engine(name: EngineName) -> Engine:
    """The engine called `name`."""
    if name == "tiled":
        from clipdistill.objective.engines.tiled import tiled

        engine: Engine = tiled
        return engine
    from clipdistill.objective.engines.dense import dense

    return dense


UNKNOWN_MEMORY = 4 * 2**30
"""Bytes taken to be free where the system does not tell."""

# Batch size from which tiling was measured to be the faster of the two (benchmarks/objective.py), per device type.
TILED_FROM = {"cpu": 512, "cuda": 4096}


def choose_engine(
    n: int,
    device: torch.device,
    primitives: Sequence[Primitive],
    *,
    world_size: int = 1,
    itemsize: int = 4,
    memory: int | None = None,
) -> tuple[EngineName, str]:
    """The engine for a whole batch of n rows, and the reason in words.

    memory: bytes this process may use; None asks the device. Dense is taken when its matrices fit in half of that and
    the batch is too small for tiling to be faster.
    """
    if not primitives:
        return "dense", "no term compares all pairs"
    need = dense_bytes(n, primitives, world_size=world_size, itemsize=itemsize)
    available = (free_memory(device) or UNKNOWN_MEMORY) if memory is None else memory
    if need > available // 2:
        return "tiled", f"dense would need {_gib(need)} for N={n}, more than half of the {_gib(available)} available"
    limit = TILED_FROM.get(device.type, TILED_FROM["cpu"])
    if n >= limit:
        return "tiled", f"N={n} is at least {limit}, from where tiling is the faster on {device.type}"
    return (
        "dense",
        f"N={n} is below {limit} on {device.type} and its {_gib(need)} fit in the {_gib(available)} available",
    )


def dense_bytes(n: int, primitives: Sequence[Primitive], *, world_size: int = 1, itemsize: int = 4) -> int:
    """An estimate of the bytes the dense engine keeps for one forward and backward pass over n rows.

    Per logit matrix one copy, per softmax two (log-probabilities and their gradient), per divergence two more.
    """
    logits: set[str] = set()
    softmaxes: set[tuple[str, str]] = set()
    copies = 0
    for primitive in primitives:
        if isinstance(primitive, CrossEntropy):
            logits.add(primitive.logits)
            softmaxes.add((primitive.logits, primitive.axis))
        elif isinstance(primitive, Divergence):
            logits.update((primitive.logits, primitive.target))
            softmaxes.update({(primitive.logits, primitive.axis), (primitive.target, primitive.axis)})
            copies += 2
        else:
            logits.update((primitive.logits, *primitive.targets))
            copies += 2 + len(primitive.targets)
    rows = -(-n // world_size)
    return (len(logits) + 2 * len(softmaxes) + copies) * rows * n * itemsize


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
