"""The term vrd_kl; its facts are those of TERM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from clipdistill.objective.plan import Divergence, Primitive
from clipdistill.objective.term import Option, Setting, Term

TARGET = Option("vrd_target", Literal["text", "image"], "text", "the modality that is copied, not trained")


def primitives(setting: Setting) -> tuple[Primitive, ...]:
    """Divergence from the copied modality's distribution to the trained one's, over rows and columns."""
    target, trained = ("text", "image") if setting[TARGET] == "text" else ("image", "text")
    return (Divergence(target, trained, "rows", 0.5), Divergence(target, trained, "columns", 0.5))


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
