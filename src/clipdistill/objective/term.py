"""What a term of the objective is: its facts, its options, how it is computed. Each lives in its own file.

Light: torch is imported by what computes, so that recipes are checked without it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pydantic

from clipdistill.arguments import checked
from clipdistill.config import Config
from clipdistill.errors import InputError, nearest
from clipdistill.objective.plan import MATRICES, SCALARS, Pairing, Primitive, published_pairings
from clipdistill.registry import TERMS

if TYPE_CHECKING:
    from torch import Tensor

    from clipdistill.objective.features import Features
    from clipdistill.objective.gather import World

MODALITIES = ("image", "text")
RESERVED = ("weights", "student_dim", "teacher_dim", "scales", "projection", "engine", "products", "schedules")
"""Settings of the objective itself, whose names no option may have."""


@dataclass(frozen=True)
class Option:
    """A setting of one term: a key of a recipe's `objective:` part and a keyword of `Objective`.

    type: what it may be, in pydantic's words (Literal["text", "image"]; Annotated[float, pydantic.Field(ge=0)]).
    help: one sentence, for `--explain` and docs/methods.md.
    """

    name: str
    type: Any
    default: Any
    help: str


@dataclass(frozen=True)
class Setting:
    """What a term's form depends on beside its weight; `setting[OPTION]` is an option's value.

    teachers: number of teachers in the ensemble (1: a single one). synthetic: the step carries a synthetic caption for
    each image. modalities: those that the step has; terms that read another one are left out of it.
    """

    teachers: int = 1
    synthetic: bool = False
    modalities: tuple[str, ...] = MODALITIES
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __getitem__(self, option: Option) -> Any:
        return self.options.get(option.name, option.default)


@dataclass(frozen=True)
class LocalBatch:
    """What a feature loss sees; `batch["student_image"]`: own rows (n_local, D), of length 1, or a 0-dimensional scale.

    whole: everybody's rows (N, D) of the matrices the term `gathers`, in the order of the ranks. world: rows by rank.
    bank, classes: the teacher's embeddings of the training set, and its class vectors (C, D), for a term that asks for
        them.
    """

    features: Features
    whole: Mapping[str, Tensor]
    world: World
    setting: Setting
    bank: Any = None
    classes: Tensor | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.features.matrices[name] if name in self.features.matrices else self.features.scales[name]


@dataclass(frozen=True)
class Term:
    """One loss term. Exactly one of these three computes it:

    primitives: a similarity term, a tuple, or a function where they depend on the setting, on the pairings of
        `plan.published_pairings` or on `pairings` of its own; any engine computes it. scales: multipliers of its own
        that are trained, by name, with the effective value they start at.
    feature_loss: this rank's share of the value, 0-dimensional; the shares of all ranks add up to it.
    row_loss: a value for each of the own rows, (n_local,); the term is their mean over the rows of all ranks.

    reads: the matrices and scalars a feature or row loss uses; gathers: those it needs from all ranks. A product of
    gathered rows is (n_local, N) whatever the engine: only primitives are tiled.
    formula: in the notation of docs/methods.md. gradient: what is trained and what is detached. default_weight: that of
    the published recipe. differs: where the released code does something else. single_teacher: no meaning for an
    ensemble. bank: compares with the teacher's embeddings of the whole training set (`LocalBatch.bank`); classes: with
    its class vectors. remark: a line for `--explain` from all weights, the setting and the teacher's width.
    """

    name: str
    title: str = ""
    formula: str = ""
    gradient: str = ""
    source: str = ""
    default_weight: float = 1.0
    differs: str = ""
    primitives: tuple[Primitive, ...] | Callable[[Setting], tuple[Primitive, ...]] | None = None
    feature_loss: Callable[[LocalBatch], Tensor] | None = None
    row_loss: Callable[[LocalBatch], Tensor] | None = None
    reads: tuple[str, ...] = ()
    gathers: tuple[str, ...] = ()
    pairings: tuple[Pairing, ...] = ()
    scales: Mapping[str, float] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    single_teacher: bool = True
    bank: bool = False
    classes: bool = False
    remark: Callable[[Mapping[str, float], Setting, int], str] | None = None

    def __post_init__(self) -> None:
        if sum(form is not None for form in (self.primitives, self.feature_loss, self.row_loss)) != 1:
            raise InputError(f"term '{self.name}': give one of primitives, feature_loss and row_loss")

    @property
    def compares_pairs(self) -> bool:
        """The value depends on more than one row, so a batch of one row says nothing."""
        return self.primitives is not None or bool(self.gathers)


@checked
def register_term(term: Term) -> Term:
    """Add a term of your own; it can then be named in weights, recipes and on the command line. Returns it.

    term: a clipdistill.objective.Term.

    Raises InputError, one sentence, for a name that is taken and for a declaration that does not hold together.
    """
    if not isinstance(term, Term):
        raise InputError(f"register_term takes a clipdistill.objective.Term, got {type(term).__name__}")
    here = f"term '{term.name}'"
    for pairing in term.pairings:
        where = f"{here}: pairing '{pairing.name}'"
        if pairing.name in published_pairings():
            raise InputError(f"{where} has the name of a published one: choose another")
        for name in (pairing.rows, pairing.columns):
            _require(name, MATRICES, f"{where}: unknown rows")
        if pairing.temperature is None:
            _require(pairing.scale, (*SCALARS, *term.scales), f"{where}: unknown scale")
        if pairing.bias is not None:
            _require(pairing.bias, SCALARS, f"{where}: unknown bias")
    for name, start in term.scales.items():
        if not (math.isfinite(start) and start > 0) or "." in name:
            raise InputError(f"{here}: the scale '{name}' starts at {start}, expected a positive number")
    for name in (*term.reads, *term.gathers):
        _require(name, (*MATRICES, *SCALARS), f"{here}: reads unknown rows")
    if term.primitives is None and not term.reads:
        raise InputError(f"{here}: a feature loss must say what it reads, for example reads=('student_image',)")
    taken = {option.name: other for other in TERMS.names() if other != term.name for option in TERMS.get(other).options}
    for option in term.options:
        if option.name in RESERVED or option.name in taken or not option.name.isidentifier():
            owner = f"term '{taken[option.name]}'" if option.name in taken else "the objective"
            raise InputError(f"{here}: the option '{option.name}' is one of {owner} already: choose another name")
    try:
        options_model(term).model_validate({})
    except pydantic.ValidationError as error:
        raise InputError(f"{here}: an option's default does not fit its type ({error.errors()[0]['msg']})") from error
    return TERMS.register(term.name, term)


def options_model(*terms: Term) -> type[Config]:
    """The configuration class of all options of the terms."""
    fields: dict[str, Any] = {option.name: (option.type, option.default) for term in terms for option in term.options}
    return pydantic.create_model("Options", __base__=Config, **fields)


def _require(name: str, known: tuple[str, ...], what: str) -> None:
    if name not in known:
        raise InputError(f"{what} '{name}'{nearest(name, known)}: one of {', '.join(known)}")
