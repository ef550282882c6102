"""The term fd; its facts are those of TERM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from clipdistill.objective.term import LocalBatch, Option, Setting, Term

if TYPE_CHECKING:
    from torch import Tensor

UNITS = Option(
    "feature_units",
    Literal["released", "cosine"],
    "released",
    "the mean of squares over N and D, or the mean of 1 - cos over N (a weight w at width D is then 2 w / D)",
)


def feature_loss(batch: LocalBatch) -> Tensor:
    """This rank's share of the squared distance, in the units of the setting."""
    rows = batch.features.matrices
    image = ((rows["projected_image"] - rows["teacher_image"]) ** 2).sum()
    text = ((rows["projected_text"] - rows["teacher_text"]) ** 2).sum()
    width = rows["teacher_image"].shape[1]
    # half the squared distance is 1 - cos, and keeps its digits where 1 - cos would cancel
    divisor = width if batch.setting[UNITS] == "released" else 2
    return (image + text) / (divisor * max(batch.world.total, 1))


def remark(weights: Mapping[str, float], setting: Setting, width: int) -> str:
    """The weight in the other units."""
    weight = weights["fd"]
    if setting[UNITS] == "cosine":
        return f"units: cosine, so {weight:g} here is {weight * width / 2:g} in released units at D={width}"
    return f"units: released, so {weight:g} here is {2 * weight / width:g} (1 - cos) at D={width}"


TERM = Term(
    name="fd",
    title="feature distillation (MFD when the student image is masked)",
    formula="released units: mean_ND (A - u)^2 + mean_ND (B - v)^2; cosine units: mean_N (1 - A.u) + mean_N (1 - B.v)",
    gradient="student image, student text (through the projections)",
    source="CLIP-KD, arXiv 2307.12732",
    default_weight=2000.0,
    differs="released units make the weight depend on the width: w = 2000 at D = 512 is 2 w / D = 7.8125 cosine units",
    feature_loss=feature_loss,
    options=(UNITS,),
    remark=remark,
    reads=("projected_image", "projected_text", "teacher_image", "teacher_text"),
)
