"""Masks during training: what the loop draws, constrains, clamps and logs, and how a run starts with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from clipdistill.models.clip_model import ClipModel
from clipdistill.models.inheritance.config import MaskConfig
from clipdistill.models.inheritance.gates import gateable_copy
from clipdistill.models.inheritance.masks import Constraint, Masks, reference_counts


@dataclass
class Masking:
    """The masks of a run and their constraint. `masks` belong to the towers' forward pass, `constraint` does not."""

    config: MaskConfig
    masks: Masks
    constraint: Constraint

    def before_step(self, seed: int, step: int) -> None:
        """New noise, the same on every rank."""
        self.masks.draw(seed, step)

    def after_backward(self, step: int) -> None:
        """Add the constraint's gradients to those of the objective."""
        self.constraint.add_gradients(self.masks, step)

    def after_update(self) -> None:
        """Keep log alpha within its bounds."""
        self.masks.clamp()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: masks, and multipliers that go uphill; neither decayed, scheduled nor clipped."""
        common = {"weight_decay": 0.0, "lr": self.config.learning_rate, "scheduled": False, "clipped": False}
        return [
            {"name": "masks", "params": list(self.masks.parameters()), **common},
            {"name": "multipliers", "params": list(self.constraint.parameters()), "maximize": True, **common},
        ]

    def state(self) -> nn.ModuleDict:
        """What a checkpoint stores of the masks."""
        return nn.ModuleDict({"masks": self.masks, "constraint": self.constraint})

    @torch.no_grad()
    def log(self, step: int) -> dict[str, float]:
        """Expected and wanted sparsity after `step` steps, and the multipliers, for the log."""
        values: dict[str, float] = {}
        for name, expected in self.constraint.expected(self.masks).items():
            values |= {f"{name}/expected": float(expected), f"{name}/target": self.constraint.target(step, name)}
        for name, multipliers in self.constraint.multipliers.items():
            values |= {f"{name}/lambda1": float(multipliers[0]), f"{name}/lambda2": float(multipliers[1])}
        return values


def start_masking(
    student: ClipModel, config: MaskConfig, reference: ClipModel | None, device: torch.device
) -> tuple[ClipModel, Masking]:
    """(the student with blocks that masks act on, its masks), both on `device`.

    `reference` is the model that is 100 %; None: the student as given. Raises InputError for towers without such blocks
    and a target that is reached already.
    """
    student = gateable_copy(student, config.towers)
    student.module.to(device)
    masks = Masks(student.module, config).to(device)
    counts = None
    if reference is not None:
        counts = reference_counts(reference.module, reference.architecture, config.towers)
    return student, Masking(config, masks, Constraint(masks, config, counts).to(device))
