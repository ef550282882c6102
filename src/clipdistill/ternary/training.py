"""Distillation into a student with ternary weights (TernaryCLIP, arXiv 2510.21879), with them in every forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from clipdistill.data.loader import Batch
from clipdistill.errors import InputError
from clipdistill.objective import ObjectiveOutput
from clipdistill.ternary.packed import write_packed
from clipdistill.ternary.weights import applied, matrices
from clipdistill.train.config import RunConfig
from clipdistill.train.distil import Distillation
from clipdistill.train.sources import Sources
from clipdistill.train.task import Outcome, Say, Traced


class TernaryDistillation(Distillation):
    """As `Distillation`, but every pass of the student, in training and evaluation, has ternary weights.

    The weights that the optimiser moves have all their bits; checkpoints hold those, so runs resume as others do.
    """

    def __init__(self, config: RunConfig, device: torch.device, sources: Sources | None = None, say: Say = print):
        super().__init__(config, device, sources, say)
        self._weights = matrices(self.setup.student.module, config.train.ternary)
        if not self._weights:
            raise InputError(
                f"train.ternary={config.train.ternary}: no matrix of these towers trains, so there is nothing to make "
                "ternary: unlock some (train.lock_image, train.lock_text, train.freeze)"
            )

    def _evaluated(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(super()._evaluated())  # an average of weights first, then its ternary form
        stack.enter_context(applied(self._weights))
        return stack

    def gradients(self, step: int, batch: Batch) -> tuple[ObjectiveOutput, float]:
        with applied(self._weights):
            return super().gradients(step, batch)

    def trace(self, step: int, batch: Batch, precision: str) -> Iterator[Traced]:
        with applied(self._weights):
            yield from super().trace(step, batch, precision)

    def finish(self, folder: Path, say: Say) -> Outcome:
        with self._evaluated():
            found = write_packed(self.setup.student, self._weights, folder / "packed")
        say(
            f"ternary weights: {found['ternary_share']:.1%} of all, {found['sparsity']:.1%} of these are 0; packed "
            f"{found['bytes']:,} bytes, {found['compression']:.2f} times fewer than in float32"
        )
        return super().finish(folder, say)

    def facts(self) -> dict[str, Any]:
        count = sum(weight.numel() for weight in self._weights.values())
        return {**super().facts(), "ternary_weights": count}
