"""A running average of the student's weights, evaluated and saved where `train.ema_decay` asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage(nn.Module):
    """avg <- d avg + (1 - d) weights after every step, d = min(decay, (1 + t) / (10 + t)) at the t-th update.

    The rise of d lets the first steps, still far from anything, be forgotten (as in TensorFlow's and timm's averages).
    Averaged are all floating-point parameters and buffers, batch statistics too. Its state is a part of checkpoints.
    """

    updates: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        live = {n: t.detach() for n, t in module.state_dict(keep_vars=True).items() if t.is_floating_point()}
        self._live = list(live.values())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        for name, tensor in live.items():
            self.register_buffer(name.replace(".", "/"), tensor.clone())
        self._average = [buffer for name, buffer in self.named_buffers() if name != "updates"]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now."""
        self.updates += 1
        step = int(self.updates)
        torch._foreach_lerp_(self._average, self._live, 1 - min(self.decay, (1 + step) / (10 + step)))

    @torch.no_grad()
    def become(self) -> None:
        """Forget the average for the weights as they are now."""
        torch._foreach_copy_(self._average, self._live)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within, the module has the averaged weights; afterwards its own again, to the bit."""
        with torch.no_grad():
            kept = [tensor.clone() for tensor in self._live]
            torch._foreach_copy_(self._live, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._live, kept)
