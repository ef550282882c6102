"""Fused element-wise work of the tiled engine: a whole tile's sums, or gradients, in one compiled function.

The eager path makes about ten passes over a tile for the sums and ten for the gradients. On a CPU the tile is in cache
and the products take most of the time, so fusing gains little; on a GPU every pass costs memory bandwidth, and with
bfloat16 products more time than the products themselves. Functions are compiled once per structure (CLIP-RD has three,
one for each pair of matrices) and serve any tile size. When compiling fails, for want of a compiler or for any other
reason, the engine goes on without and says so once.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipdistill.objective.engines import EngineOptions
from clipdistill.objective.engines.tiled_products import Range
from clipdistill.objective.engines.tiled_walk import Walk
from clipdistill.objective.plan import Axis

VARIABLE = "CLIPDISTILL_COMPILE"


@dataclass(frozen=True)
class SumsOf:
    """Structure of a component's sums; matrices by position. crosses: (target, logits, axis, entropy)."""

    softmaxes: tuple[tuple[int, Axis], ...]
    crosses: tuple[tuple[int, int, Axis, bool], ...]

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        """tiles -> sums of exponentials in the order of `softmaxes`, then the cross sums."""

        def sums(*z: Tensor) -> tuple[Tensor, ...]:
            e = {k: z[k].exp() for k, _ in self.softmaxes}
            found = [e[k].sum(1 if axis == "rows" else 0) for k, axis in self.softmaxes]
            for target, logits, axis, entropy in self.crosses:
                weighted = e[target] * ((z[target] - z[logits]) if entropy else z[logits])
                found.append(weighted.sum(1 if axis == "rows" else 0))
            return tuple(found)

        return sums


@dataclass(frozen=True)
class GradientsOf:
    """Structure of a component's gradients; matrices by position.

    parts: per trained matrix its position and, for each exponential in its gradient, (position, has weights per row,
    has weights per column). narrow: the gradients leave as bfloat16.
    """

    parts: tuple[tuple[int, tuple[tuple[int, bool, bool], ...]], ...]
    narrow: bool

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        """(tiles, weights, column of the diagonal in the first row) -> each trained matrix' gradient, followed by the
        sums of gradient and of gradient * tile, (2, rows).

        weights: in the order of parts; for each exponential per row, then per column; then the one on the diagonal.
        """

        def gradients(z: Sequence[Tensor], weights: Sequence[Tensor], start: Tensor) -> tuple[Tensor, ...]:
            height, width = z[0].shape
            row, column = torch.arange(height, device=start.device), torch.arange(width, device=start.device)
            diagonal = column[None, :] == row[:, None] + start
            found: list[Tensor] = []
            following = iter(weights)
            for logits, exponentials in self.parts:
                gradient = torch.zeros_like(z[logits])
                for k, by_row, by_column in exponentials:
                    factor: Any = 0.0
                    if by_row:
                        factor = factor + next(following)[:, None]
                    if by_column:
                        factor = factor + next(following)[None, :]
                    gradient = gradient + z[k].exp() * factor
                gradient = gradient - torch.where(diagonal, next(following), 0.0)
                found.append(gradient.to(torch.bfloat16) if self.narrow else gradient)
                # row by row: one long sum in float32 would lose digits
                found.append(torch.stack([gradient.sum(1), (gradient * z[logits]).sum(1)]))
            return tuple(found)

        return gradients


class FusedWalk(Walk):
    """A walk whose element-wise work is compiled, wherever it can be."""

    @property
    def fused(self) -> bool:
        """Not where rows have shifts of their own, nor for sigmoid losses."""
        return not self.exact and not self.component.sigmoids

    def add_sums(self, z: Mapping[str, Tensor], rows: Range, columns: Range) -> None:
        """See `Walk`."""
        places = {name: k for k, name in enumerate(z)}
        structure = SumsOf(
            tuple((places[name], axis) for name, axis in self.component.softmaxes),
            tuple((places[target], places[logits], axis, entropy) for target, logits, axis, entropy in self.cross),
        )
        found = call(structure, *z.values()) if self.fused else None
        if found is None:
            super().add_sums(z, rows, columns)
            return
        sums = [self.row_sums[n] if axis == "rows" else self.column_sums[n] for n, axis in self.component.softmaxes]
        axes = [axis for _, axis in self.component.softmaxes] + [key[2] for key in self.cross]
        for into, axis, part in zip([*sums, *self.cross.values()], axes, found):
            into[slice(*(rows if axis == "rows" else columns))] += part

    def add_gradients(self, z: Mapping[str, Tensor], rows: Range, columns: Range) -> None:
        """See `Walk`."""
        places = {name: k for k, name in enumerate(z)}
        parts, weights = [], []
        for logits, gradient in self.trained.items():
            exponentials = []
            for name in z:
                by_row, by_column = self.weights_of(logits, name, rows, columns)
                if by_row is not None or by_column is not None:
                    exponentials.append((places[name], by_row is not None, by_column is not None))
                    weights += [weight for weight in (by_row, by_column) if weight is not None]
            parts.append((places[logits], tuple(exponentials)))
            weights.append(self.inputs.like.new_full((), gradient.diagonal))
        structure = GradientsOf(tuple(parts), self.inputs.products.narrow)
        start = torch.full((), rows[0] + self.world.offset - columns[0], device=self.inputs.like.device)
        found = call(structure, tuple(z.values()), tuple(weights), start) if self.fused else None
        if found is None:
            super().add_gradients(z, rows, columns)
            return
        for logits, tile, by_rows in zip(self.trained, found[::2], found[1::2]):
            total, weighted = by_rows.sum(1, dtype=self.wide)
            self.propagate(logits, tile, z[logits], rows, columns, (total, weighted))


_compiled: dict[SumsOf | GradientsOf, Callable[..., tuple[Tensor, ...]]] = {}
_broken = False


def wanted(device: torch.device, options: EngineOptions) -> bool:
    """Whether to compile: as the options say, else as CLIPDISTILL_COMPILE says (1 or 0), else on a GPU only."""
    if _broken:
        return False
    if options.compile is not None:
        return options.compile
    variable = os.environ.get(VARIABLE, "")
    return variable == "1" if variable else device.type == "cuda"


def call(structure: SumsOf | GradientsOf, *arguments: Any) -> tuple[Tensor, ...] | None:
    """The compiled function's result, or None when nothing can be compiled here (then, and for ever after)."""
    global _broken
    if _broken:
        return None
    known = _compiled.get(structure)
    try:
        function = known or torch.compile(structure.function(), dynamic=True, fullgraph=True)
        result: tuple[Tensor, ...] = function(*arguments)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _broken = True
        reason = str(error).strip().splitlines() or [""]
        warnings.warn(
            f"the tiled objective runs without torch.compile, which failed: {type(error).__name__}: {reason[0][:200]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    _compiled[structure] = function
    return result
