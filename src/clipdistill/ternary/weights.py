"""Weight matrices with entries -1, 0 and 1 times a scale a row, and the context in which a model has them.

A row w becomes s t, s = mean |w| and t = round(w / s) held to -1, 0, 1 (BitNet b1.58, arXiv 2402.17764, with a scale a
row in place of one a matrix). A row of zeros stays zeros. Biases, norms, positions and tables of embeddings
keep all their bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

TOWERS = {"image": ("visual",), "text": ("transformer", "text_projection", "text"), "both": ("",)}


def ternary(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes -1, 0, 1 of the weight's shape, int8; scales (rows,)) of a matrix or kernel (rows, ...)."""
    rows = weight.detach().flatten(1)
    scales = rows.abs().mean(1)
    codes = (rows / scales.clamp(min=torch.finfo(rows.dtype).tiny)[:, None]).round().clamp(-1, 1)
    return codes.to(torch.int8).view(weight.shape), scales


def parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of a weight that is ternary already: `dense` makes it again."""
    return weight.sign().to(torch.int8), weight.flatten(1).abs().amax(1)


def dense(codes: Tensor, scales: Tensor) -> Tensor:
    """The weight that codes and scales stand for, in the scales' number format."""
    return codes.to(scales.dtype) * scales.view(-1, *[1] * (codes.ndim - 1))


def matrices(module: nn.Module, towers: str) -> dict[str, nn.Parameter]:
    """The weights that become ternary, by name: trained matrices and kernels of the towers named."""
    tables = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    found = {}
    for name, parameter in module.named_parameters():
        inside = any(not start or name == start or name.startswith(f"{start}.") for start in TOWERS[towers])
        named = any(word in name.rpartition(".")[2] for word in ("embedding", "token", "pos_embed"))
        if inside and parameter.requires_grad and parameter.ndim >= 2 and name not in tables and not named:
            found[name] = parameter
    return found


@contextmanager
def applied(weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Within, the weights are ternary; afterwards their own again, to the bit.

    What autograd finds within is the gradient at the ternary weights, and it stays with the parameters: the
    straight-through estimate of the gradient at their own.
    """
    kept = [weight.detach().clone() for weight in weights.values()]
    with torch.no_grad():
        for weight in weights.values():
            weight.copy_(dense(*ternary(weight)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights.values(), kept, strict=True):
                weight.copy_(own)
