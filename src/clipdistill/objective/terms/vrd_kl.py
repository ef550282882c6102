"""The term vrd_kl; its facts are those of TERM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from clipdistill.objective.plan import Axis, Divergence, Primitive
from clipdistill.objective.term import Option, Setting, Term

TARGET = Option(
    "vrd_target",
    Literal["text", "image", "both"],
    "text",
    "the modality that is copied, not trained; both: each in turn, halved",
)
AXES: tuple[Axis, ...] = ("rows", "columns")


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Divergence from the copied modality's distribution to the trained one's, over rows and columns."""
    directions = {
        "text": [("text", "image")],
        "image": [("image", "text")],
        "both": [("text", "image"), ("image", "text")],
    }
    chosen = directions[setting[TARGET]]
    return tuple(Divergence(target, trained, axis, 0.5 / len(chosen)) for target, trained in chosen for axis in AXES)


def remark(weights: Mapping[str, float], setting: Setting, width: int) -> str:
    """What is missing without vrd_ce."""
    alone = "note: without vrd_ce its trivial minimum, both distributions uniform, is not excluded"
    return "" if "vrd_ce" in weights else alone


TERM = Term(
    name="vrd_kl",
    title="vertical relational distillation",
    formula="1/2 [KL(X || I) + KL(X^T || I^T)],  I = k_i u A^T, X = k_t v B^T",
    gradient="student image, k_i; X detached (vrd_target='image': student text, k_t; I detached)",
    source="CLIP-RD, arXiv 2603.25383",
    default_weight=1.0,
    differs="one flag scales vrd_kl and vrd_ce; here each has its weight",
    primitives=primitives,
    options=(TARGET,),
    remark=remark,
)
