"""The teacher's embeddings of the whole training set as a constant to compare with, in memory linear in its size.

A row's distribution over the bank is a softmax over all of its columns. It is never held: tiles of columns are passed
once, with a running maximum, and leave three sums a row (the logarithm of the normaliser, the mean logit, the mean
column). They are all that the divergence and its gradient need:

    KL(p || q) = sum_j p_j log p_j + log sum_j exp(k a.b_j) - k a.m,   m = sum_j p_j b_j
    gradient at a:  k (sum_j q_j b_j - m)

so the teacher's part of a row, however long, is one number and one vector m of the embedding's width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 20
"""Of a tile of logits: rows of the batch times columns of the bank."""
LEAST_COLUMNS = 64


@dataclass(frozen=True)
class Bank:
    """The teacher's embeddings of a training set, or of a sample of it, and whose rows the batch's are in it.

    image: (P, D), one row a picture; text: (T, D), the captions of a picture side by side, in the order of the
    pictures; rows of length 1. counts: int64 (P,), captions of each picture, at least 1. place: int64 (n_local,), the
    picture of each of this rank's rows. shared: pictures that every row is compared with; those behind them are not
    in the sample, and only their own rows see them (None: all).
    """

    image: Tensor
    text: Tensor
    counts: Tensor
    place: Tensor
    shared: int | None = None

    def side(self, modality: str) -> Columns:
        """The columns of one modality, "image" or "text"."""
        if modality == "image":
            pictures = torch.arange(len(self.image), device=self.place.device)
            return Columns(self.image, pictures, self.place, self.place[:, None], None, self._shared)
        ends = self.counts.cumsum(0)
        owner = torch.repeat_interleave(torch.arange(len(ends), device=ends.device), self.counts)
        number = torch.arange(int(self.counts.max()), device=ends.device)
        counts = self.counts[self.place]
        # beyond a picture's last caption the places repeat its first one, and are masked
        missing = number[None, :] >= counts[:, None]
        own = (ends[self.place] - counts)[:, None] + number[None, :].masked_fill(missing, 0)
        shared = int(ends[self._shared - 1]) if self._shared else 0
        return Columns(self.text, owner, self.place, own, missing, shared)

    def paired(self) -> tuple[Columns, Columns]:
        """(pictures, captions) with a column for each picture: that of the captions is their mean, of length 1."""
        image = self.side("image")
        owner = torch.repeat_interleave(image.owner, self.counts)
        sums = torch.zeros_like(self.image).index_add_(0, owner, self.text)
        means = torch.nn.functional.normalize(sums, dim=-1)
        return image, Columns(means, image.owner, image.place, image.own, image.missing, image.shared)

    @property
    def _shared(self) -> int:
        return len(self.image) if self.shared is None else self.shared


@dataclass(frozen=True)
class Columns:
    """Columns to compare with: rows (M, D), the picture `owner` (M,) of each, and which every row sees (`shared`).

    place (n,): each row's picture; own (n, C): its columns, without those that `missing` (n, C) marks.
    """

    rows: Tensor
    owner: Tensor
    place: Tensor
    own: Tensor
    missing: Tensor | None
    shared: int


@dataclass(frozen=True)
class Means:
    """Of each row's distribution p = softmax(k a B^T): log sum exp, sum_j p_j log p_j, and sum_j p_j b_j."""

    log_sum: Tensor
    negative_entropy: Tensor
    mixture: Tensor


@torch.no_grad()
def means(rows: Tensor, side: Columns, scale: float, mixed: Tensor | None = None) -> Means:
    """One pass over the columns. rows: (n, D). mixed: (M, D), averaged instead of the columns themselves."""
    n, scaled = len(rows), rows * scale
    top, mass = rows.new_full((n, 1), -torch.inf), rows.new_zeros(n, 1)
    sums = [torch.zeros_like(rows) for _ in range(1 if mixed is None else 2)]
    step = max(TILE_ELEMENTS // max(n, 1), LEAST_COLUMNS)
    for start in range(0, len(side.rows), step):
        part = slice(start, start + step)
        columns = side.rows[part].to(rows.dtype)
        logits = scaled @ columns.T
        if start + len(columns) > side.shared:
            others = side.owner[part][None, :] != side.place[:, None]
            others[:, : max(side.shared - start, 0)] = False
            logits.masked_fill_(others, -torch.inf)
        largest = torch.maximum(top, logits.amax(1, keepdim=True))
        # where no column was seen yet, differences must stay numbers
        safe = largest.clamp(min=torch.finfo(rows.dtype).min)
        shrink, top = (top - safe).exp(), largest
        weights = logits.sub_(safe).exp_()
        mass = mass * shrink + weights.sum(1, keepdim=True)
        for total, values in zip(sums, (columns, columns if mixed is None else mixed[part].to(rows.dtype))):
            total.mul_(shrink).addmm_(weights, values)
    found = [total / mass for total in sums]
    log_sum = (top + mass.log()).squeeze(1)
    # the mean logit is the mean column's own
    return Means(log_sum, (scaled * found[0]).sum(1) - log_sum, found[-1])


class _LogSum(torch.autograd.Function):
    """log sum_j exp(k a.b_j) of each row; its gradient is k times the mean column."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, side: Columns, scale: float) -> Tensor:
        found = means(rows.detach(), side, scale)
        ctx.save_for_backward(scale * found.mixture)
        return found.log_sum

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return incoming[0][:, None] * slope, None, None


def divergence(
    student: Tensor,
    side: Columns,
    scale: float,
    target: Tensor,
    target_scale: float,
    *,
    target_side: Columns | None = None,
    positives: float = 0.0,
) -> Tensor:
    """KL(p || q) of each row, (n,), with gradient to `student` (n, D) alone.

    q = softmax(scale * student b_j^T) over the columns of `side`; p = softmax(target_scale * target c_j^T), c_j the
    columns of `target_side` (default: of `side`), in the same order. positives: share of a second divergence, whose p
    is the same softmax over the row's own columns of `side` only; the rest is the first's.
    """
    target = target.detach().to(student.dtype)
    constant, mixture = student.new_zeros(len(student)), torch.zeros_like(student)
    if positives < 1:
        taught = means(target, target_side or side, target_scale, None if target_side is None else side.rows)
        constant, mixture = (1 - positives) * taught.negative_entropy, (1 - positives) * taught.mixture
    if positives > 0:
        own = side.rows[side.own].to(student.dtype)
        logits = target_scale * (own @ target[:, :, None]).squeeze(2)
        if side.missing is not None:
            logits = logits.masked_fill(side.missing, -torch.inf)
        share = torch.softmax(logits, dim=1)
        constant = constant + positives * torch.special.xlogy(share, share).sum(1)
        mixture = mixture + positives * (share[:, None, :] @ own).squeeze(1)
    log_sum: Tensor = _LogSum.apply(student, side, scale)
    return constant + log_sum - scale * (student * mixture).sum(1)
