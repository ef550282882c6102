"""The exchange of rows between ranks: differentiable, for row counts that differ, one collective a step.

Convention: each rank computes its partial sum of the loss from its own rows and everybody's columns; `sum_over_ranks`
adds the partial sums and, backward, multiplies by the number of ranks. The encoder's gradient on a rank is then W times
the gradient of its own rows, and the mean taken by DistributedDataParallel is the gradient of one process with the
whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """The ranks and the rows each of them holds in this step."""

    counts: tuple[int, ...]
    rank: int = 0

    @property
    def size(self) -> int:
        """Number of ranks, W."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """Rows of the whole batch, N."""
        return sum(self.counts)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Index in the whole batch of each rank's first row."""
        return tuple(sum(self.counts[:rank]) for rank in range(self.size))

    @property
    def offset(self) -> int:
        """Index in the whole batch of this rank's first row."""
        return sum(self.counts[: self.rank])


def current_world(rows: int, device: torch.device) -> World:
    """The ranks of this step, when this one holds `rows` rows; one small exchange when there are several ranks."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return World((rows,))
    counts = torch.empty(dist.get_world_size(), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], dtype=torch.int64, device=device))
    return World(tuple(int(count) for count in counts.tolist()), dist.get_rank())


def all_rows(local: Tensor, world: World) -> Tensor:
    """(n_local, D) on each rank -> (N, D) on every rank, in rank order. Not differentiable."""
    most = max(world.counts)
    if len(set(world.counts)) == 1:
        padded = local.contiguous()
    else:
        padded = local.new_zeros((most, local.shape[1]))
        padded[: local.shape[0]] = local
    everybody = local.new_empty((world.size * most, local.shape[1]))
    dist.all_gather_into_tensor(everybody, padded)
    if len(set(world.counts)) == 1:
        return everybody
    return torch.cat([everybody[rank * most : rank * most + count] for rank, count in enumerate(world.counts)])


def sum_own_rows(whole: Tensor, world: World) -> Tensor:
    """(N, D) on each rank -> the sum over ranks of this rank's rows, (n_local, D). Not differentiable."""
    # gloo has no reduce-scatter in every supported version; an all-reduce gives the same rows
    summed = whole.clone(memory_format=torch.contiguous_format)
    if dist.get_backend() == "nccl" and len(set(world.counts)) == 1:
        own = summed.new_empty((world.counts[world.rank], summed.shape[1]))
        dist.reduce_scatter_tensor(own, summed)
        return own
    dist.all_reduce(summed)
    return summed[world.offset : world.offset + world.counts[world.rank]]


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks of several local matrices, exchanged together, in the order given."""

    @staticmethod
    def forward(ctx: Any, world: World, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.world = world
        whole = all_rows(torch.cat(matrices, dim=1), world)
        pieces = [piece.contiguous() for piece in whole.split([matrix.shape[1] for matrix in matrices], dim=1)]
        ctx.mark_non_differentiable(*[p for p, m in zip(pieces, matrices) if not m.requires_grad])
        return tuple(pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        own = sum_own_rows(torch.cat([gradients[i] for i in wanted], dim=1), ctx.world)
        found: list[Tensor | None] = [None] * len(gradients)
        for i, piece in zip(wanted, own.split([gradients[i].shape[1] for i in wanted], dim=1)):
            found[i] = piece
        return None, *found


def gather_rows(local: Sequence[Tensor], world: World) -> list[Tensor]:
    """Each local matrix (n_local, D_k) as rows of all ranks (N, D_k), differentiable, in one exchange.

    A tensor given twice is sent once. Backward sums the gradients over ranks and keeps the own rows; every rank must
    have given the same matrices in the same order, and the same ones with a gradient. With one rank the input itself is
    returned.
    """
    if world.size == 1 or not local:
        return list(local)
    distinct = list({id(matrix): matrix for matrix in local}.values())
    pieces = dict(zip(map(id, distinct), _GatherRows.apply(world, *distinct)))
    return [pieces[id(matrix)] for matrix in local]


class _SumOwnRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, world: World) -> Tensor:
        ctx.world = world
        return sum_own_rows(whole, world)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return all_rows(gradients[0], ctx.world), None


def reduce_rows(whole: Tensor, world: World) -> Tensor:
    """Differentiable: the sum over ranks of (N, D) partial matrices, own rows only (n_local, D)."""
    return whole if world.size == 1 else _SumOwnRows.apply(whole, world)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, size: int) -> Tensor:
        ctx.size = size
        total = partial.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.size, None


def sum_over_ranks(partial: Tensor, world: World) -> Tensor:
    """The sum of every rank's `partial`, equal on all ranks; backward multiplies by the number of ranks (see above)."""
    return partial if world.size == 1 else _SumOverRanks.apply(partial, world.size)
