"""The formulas of the terms written out once more, as plainly as possible, for cases without a released output."""

from __future__ import annotations

import torch
from torch import Tensor

from clipdistill.bank.divergence import Bank
from clipdistill.objective import Embeddings


def unit(matrix: Tensor) -> Tensor:
    return matrix / (matrix * matrix).sum(dim=1, keepdim=True).sqrt()


def softmax(logits: Tensor) -> Tensor:
    powers = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
    return powers / powers.sum(dim=1, keepdim=True)


def ce(logits: Tensor) -> Tensor:
    return -torch.log(softmax(logits).diagonal()).mean()


def kl(target: Tensor, logits: Tensor) -> Tensor:
    p = softmax(target.detach())
    return (p * (torch.log(p) - torch.log(softmax(logits)))).sum() / len(p)


def soft_ce(target: Tensor, logits: Tensor) -> Tensor:
    return -(softmax(target.detach()) * torch.log(softmax(logits))).sum() / len(logits)


def random_embeddings(
    rows: int, width: int, scale: float, seed: int, *, trained: bool = False, dtype: torch.dtype = torch.float64
) -> Embeddings:
    """Embeddings with image and text of a row correlated, as those of a trained model are."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    text = image + torch.randn(rows, width, generator=generator, dtype=torch.float64)
    return Embeddings(
        image.to(dtype).requires_grad_(trained),
        text.to(dtype).requires_grad_(trained),
        torch.tensor(scale, dtype=dtype, requires_grad=trained),
    )


def random_bank(rows: int, width: int, seed: int, *, dtype: torch.dtype = torch.float64) -> Bank:
    """A bank of nine pictures with one to four captions, in which the rows of the batch have a place."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.tensor([2, 1, 4, 3, 1, 2, 2, 3, 1])
    image = torch.randn(len(counts), width, generator=generator, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    text = image[owner] + torch.randn(len(owner), width, generator=generator, dtype=torch.float64)
    place = torch.randint(len(counts), (rows,), generator=generator)
    return Bank(unit(image).to(dtype), unit(text).to(dtype), counts, place)
