"""What a term of the objective is. Each lives in its own file under `terms/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from clipdistill.objective.features import Features
from clipdistill.objective.gather import World
from clipdistill.objective.pairings import Setting
from clipdistill.objective.plan import Primitive


@dataclass(frozen=True)
class LocalBatch:
    """What a feature loss sees: own rows, everybody's rows of the matrices it `gathers`, and how the term is set."""

    features: Features
    whole: Mapping[str, Tensor]
    world: World
    setting: Setting


@dataclass(frozen=True)
class Term:
    """One published loss term.

    Exactly one of `primitives` (a similarity term, any engine computes it) and `feature_loss` (this rank's share of the
    value; the shares of all ranks add up to it) is given.
    formula: in the notation of docs/methods.md. gradient: what is trained and what is detached.
    default_weight: the weight of the published recipe. differs: where the released code does something else.
    reads: for a feature loss, the matrices and scalars it uses; gathers: those it needs from all ranks.
    single_teacher: the term has no meaning for an ensemble of teachers.
    """

    name: str
    title: str
    formula: str
    gradient: str
    source: str
    default_weight: float
    differs: str = ""
    primitives: Callable[[Setting], tuple[Primitive, ...]] | None = None
    feature_loss: Callable[[LocalBatch], Tensor] | None = None
    reads: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()
    single_teacher: bool = True

    def __post_init__(self) -> None:
        if (self.primitives is None) == (self.feature_loss is None):
            raise TypeError(f"term {self.name}: give either primitives or a feature loss")
