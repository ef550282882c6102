"""The factor that keeps gradients of a float16 pass from vanishing (Micikevicius et al. 2018, arXiv 1710.03740).

A module whose state is a part of checkpoints, because a step that overflows is left out: a continued run must leave out
the same ones. (torch.amp.GradScaler steps the optimiser itself, which the loop here does on all ranks at once.)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FIRST, LARGEST = 2.0**16, 2.0**24
GROWS_AFTER = 2000
"""Steps in a row without an overflow after which the factor doubles."""


class LossScale(nn.Module):
    """Halved when a step's gradients overflow, doubled after GROWS_AFTER steps without; powers of two are exact."""

    factor: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(FIRST))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def take_out(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the factor."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, float(1 / self.factor))

    def follow(self, updated: bool) -> bool:
        """After a step that was taken or left out. Returns whether leaving it out was the factor's fault."""
        if updated:
            self.steps += 1
            if self.steps % GROWS_AFTER == 0:
                self.factor.mul_(2).clamp_(max=LARGEST)
            return False
        self.steps.zero_()
        too_high = float(self.factor) > 1
        if too_high:
            self.factor.div_(2)
        return too_high
