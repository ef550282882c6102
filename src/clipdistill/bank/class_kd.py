"""The term class_kd; its facts are those of TERM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipdistill.bank.bank_cross import Temperature
from clipdistill.objective.term import LocalBatch, Option, Term

if TYPE_CHECKING:
    from torch import Tensor

TEMPERATURE = Option("class_kd_temperature", Temperature, 1.0, "of both distributions over the classes")


def row_loss(batch: LocalBatch) -> Tensor:
    """Each picture's divergence of the student's class probabilities from the teacher's."""
    import torch

    assert batch.classes is not None
    temperature, own = batch.setting[TEMPERATURE], batch["projected_image"]
    vectors = batch.classes.detach().to(own).T * (batch["teacher"] / temperature)  # (D, C)
    with torch.no_grad():
        target = (batch["teacher_image"] @ vectors).log_softmax(1)
    difference = target - (own @ vectors).log_softmax(1)
    return temperature**2 * (target.exp() * difference).sum(1)


TERM = Term(
    name="class_kd",
    title="class probabilities of unlabelled pictures, by the teacher's class vectors",
    formula="tau^2 KL(t u W^T / tau || t A W^T / tau),  W the teacher's class vectors, t its multiplier",
    gradient="student image (through the projection); W, t and the teacher's rows are constants",
    source="PromptKD, arXiv 2403.02781",
    row_loss=row_loss,
    options=(TEMPERATURE,),
    reads=("projected_image", "teacher_image", "teacher"),
    classes=True,
)
