"""One component of the tiled engine: the pass that sums exponentials, and the pass that turns them into gradients.

Notation: z are the logits of a tile minus a constant shift per matrix; e = exp(z). Since |z| is bounded by the scale
(rows are normalised), one e serves the softmax of the rows and that of the columns:  softmax_ij = e_ij / sum_j e_ij.
Only when the scale is so large that sums did underflow, each row and column gets a shift of its own (`exact`), at the
price of one more pass and a second exponential.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipdistill.objective.engines.tiled_layout import Component, Gradient, Key
from clipdistill.objective.engines.tiled_products import Kept, Products, Range, Shape, Workspace, ranges
from clipdistill.objective.gather import World
from clipdistill.objective.plan import Axis

# Largest exponent after shifting, and the smallest sum of exponentials that is trusted. exp(60) summed over 10^8
# columns and multiplied by a difference of logits is still far from overflow; its reciprocal is far from underflow.
LIMIT = {torch.float32: (60.0, 1e-30), torch.float64: (500.0, 1e-250)}


@dataclass
class Gradients:
    """Where gradients are added up; feature and scale names as in `Features`.

    rows: own rows (n_local, D). columns: everybody's rows (N, D), this rank's contribution; the same tensors as `rows`
    in a single process. scales: 0-dimensional float64. A name that needs no gradient is absent.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Inputs:
    """What every component reads. local: (n_local, D) and whole: (N, D) factors by name (see `Products.factor`)."""

    local: Mapping[str, Tensor]
    whole: Mapping[str, Tensor]
    scales: Mapping[str, float]
    bounds: Mapping[str, float]  # largest row length of each feature matrix
    like: Tensor  # an empty tensor of the working type and device
    world: World
    products: Products
    shape: Shape
    work: Workspace


class Walk:
    """The passes over one component's tiles."""

    def __init__(self, component: Component, inputs: Inputs, gradients: Gradients | None) -> None:
        self.component, self.inputs, self.gradients = component, inputs, gradients
        self.world = inputs.world
        self.local = inputs.world.counts[inputs.world.rank]
        self.total = inputs.world.total
        self.work = inputs.work
        self.place = {name: k for k, name in enumerate(component.pairings)}
        self.limit, self.smallest = LIMIT[inputs.like.dtype]
        # torch has no float64 on Apple's GPU; everywhere else sums over tiles are exact to rounding of the tiles
        self.wide = torch.float32 if inputs.like.device.type == "mps" else torch.float64
        self.exact = False
        self.shift: dict[str, float] = {}
        self.risky = False
        for name, pairing in component.pairings.items():
            scale, bias = self.scale_and_bias(name)
            bound = abs(scale) * inputs.bounds[pairing.rows] * inputs.bounds[pairing.columns] + abs(bias)
            softmax = component.has(name, "rows") or component.has(name, "columns")
            self.shift[name] = bound - self.limit if softmax and bound > self.limit else 0.0
            self.risky |= self.shift[name] > 0
        self.trained = (
            {}
            if gradients is None
            else {name: gradient for name, gradient in component.gradients.items() if self.needs(name)}
        )
        self.column_tiles = ranges(self.total, inputs.shape.columns)
        self.stripes, self.kept = self.plan_memory()
        self.row_sums: dict[str, Tensor] = {}
        self.column_sums: dict[str, Tensor] = {}
        self.row_shift: dict[str, Tensor] = {}
        self.column_shift: dict[str, Tensor] = {}
        self.cross: dict[tuple[str, str, Axis, bool], Tensor] = {}
        self.scalars: dict[Key, Tensor] = {}
        self.own: dict[tuple[str, str, Axis], Tensor] = {}

    def scale_and_bias(self, name: str) -> tuple[float, float]:
        pairing = self.component.pairings[name]
        return self.inputs.scales[pairing.scale], self.inputs.scales[pairing.bias] if pairing.bias else 0.0

    def needs(self, name: str) -> bool:
        """Whether the gradient of the logits `name` reaches anything."""
        assert self.gradients is not None
        pairing = self.component.pairings[name]
        return (
            pairing.rows in self.gradients.rows
            or pairing.columns in self.gradients.columns
            or pairing.scale in self.gradients.scales
            or pairing.bias in self.gradients.scales
        )

    def plan_memory(self) -> tuple[list[Range], Kept | None]:
        """Row stripes, and room for the logits that are wanted twice."""
        shape, matrices = self.inputs.shape, len(self.component.pairings)
        rows, itemsize = shape.rows, self.inputs.like.element_size()
        again = bool(self.trained)
        wanted = min(matrices * self.local * self.total, shape.kept // itemsize)
        if self.striped:
            # a whole stripe is held, so its height shrinks as the batch grows
            rows = max(1, min(rows, max(32, shape.kept // max(1, matrices * self.total * itemsize))))
            wanted = matrices * min(rows, self.local) * self.total
            again = again or self.risky
        return ranges(self.local, rows), Kept(self.work.flat("kept", wanted)) if again else None

    @property
    def striped(self) -> bool:
        """Whether a row stripe's gradient is known as soon as the stripe has been walked."""
        return not self.component.by_columns

    # -- the order of things ------------------------------------------------------------------------------------------

    def run(self) -> dict[Key, Tensor]:
        """Add up the gradients, return this rank's share of the sums (`layout.Key`), float64 and 0-dimensional."""
        if self.striped:
            # the maxima of a stripe that is held cost no product, so there is nothing to gain by hoping
            self.exact = self.risky
            self.start()
            for stripe in self.stripes:
                if self.kept is not None:
                    self.kept.clear()
                if self.exact:
                    self.extremes(stripe)
                self.sums(stripe)
                self.weigh(stripe)
                self.differentiate(stripe)
        else:
            self.start()
            self.sums_of_all()
            if self.risky and not self.healthy():
                self.exact = True
                self.start()
                for stripe in self.stripes:
                    self.extremes(stripe)
                self.reduce(self.column_shift, dist.ReduceOp.MAX)
                self.sums_of_all()
            self.weigh((0, self.local))
            for stripe in self.stripes:
                self.differentiate(stripe)
        return self.values()

    def sums_of_all(self) -> None:
        for stripe in self.stripes:
            self.sums(stripe)
        crosses = {key: sums for key, sums in self.cross.items() if key[2] == "columns"}
        self.reduce({**self.column_sums, **crosses}, dist.ReduceOp.SUM)

    def start(self) -> None:
        """Zero sums. Per row: own rows; per column: all columns."""
        like, component = self.inputs.like, self.component

        def zeros(axis: Axis) -> Tensor:
            return torch.zeros(self.local if axis == "rows" else self.total, dtype=self.wide, device=like.device)

        for name, axis in component.softmaxes:
            (self.row_sums if axis == "rows" else self.column_sums)[name] = zeros(axis)
            if self.exact:
                shifts = self.row_shift if axis == "rows" else self.column_shift
                shifts[name] = torch.full_like(zeros(axis), -math.inf, dtype=like.dtype)
        self.cross = {key: zeros(key[2]) for key in component.crosses}
        if self.exact:
            self.shift = dict.fromkeys(self.shift, 0.0)
            if self.kept is not None:
                self.kept.clear()
        zero = torch.zeros((), dtype=self.wide, device=like.device)
        self.scalars = {("diagonal", name): zero.clone() for name in component.diagonals}
        self.scalars |= {("sigmoid", *key): zero.clone() for key in component.sigmoids}

    def reduce(self, sums: Mapping[Any, Tensor], operation: dist.ReduceOp.RedOpType) -> None:
        """Combine per-column figures over the ranks, in place, in one exchange."""
        if self.world.size == 1 or not sums:
            return
        together = torch.stack(list(sums.values()))
        dist.all_reduce(together, operation)
        for mine, combined in zip(sums.values(), together):
            mine.copy_(combined)

    def healthy(self) -> bool:
        """Whether no sum of exponentials underflowed, on any rank."""
        sums = [s.min() for s in (*self.row_sums.values(), *self.column_sums.values()) if s.numel()]
        lowest = (
            torch.stack(sums).min()
            if sums
            else torch.full((), math.inf, dtype=self.wide, device=self.inputs.like.device)
        )
        if self.world.size > 1:
            dist.all_reduce(lowest, dist.ReduceOp.MIN)
        # written so that NaN counts as healthy: it shall reach the loss, and no second pass would cure it
        return not bool(lowest < self.smallest)

    # -- tiles --------------------------------------------------------------------------------------------------------

    def logits(self, name: str, rows: Range, columns: Range) -> Tensor:
        """The tile z of a matrix: remembered, or computed (and remembered while there is room). Never changed."""
        if self.kept is not None and (name, rows[0], columns[0]) in self.kept.tiles:
            return self.kept.tiles[name, rows[0], columns[0]]
        height, width = rows[1] - rows[0], columns[1] - columns[0]
        out = None if self.kept is None else self.kept.reserve((name, rows[0], columns[0]), height, width)
        if out is None:
            out = self.work.tile(f"z {self.place[name]}", height, width)
        scale, bias = self.scale_and_bias(name)
        return self.multiply(name, rows, columns, scale, bias - self.shift[name], out)

    def multiply(self, name: str, rows: Range, columns: Range, scale: float, offset: float, out: Tensor) -> Tensor:
        pairing = self.component.pairings[name]
        left, right = self.inputs.local[pairing.rows], self.inputs.whole[pairing.columns]
        return self.inputs.products.logits(left[slice(*rows)], right[slice(*columns)], scale, offset, out)

    def exponential(self, name: str, axis: Axis, z: Tensor, rows: Range, columns: Range) -> Tensor:
        """exp(z), which serves both axes unless each row and column has a shift of its own."""
        if not self.exact:
            return torch.exp(z, out=self.work.tile(f"e {self.place[name]}", *z.shape))
        shift = self.row_shift[name][slice(*rows), None] if axis == "rows" else self.column_shift[name][slice(*columns)]
        return torch.sub(z, shift, out=self.work.tile(f"e {self.place[name]} {axis}", *z.shape)).exp_()

    def exponentials(
        self, z: Mapping[str, Tensor], wanted: Mapping[tuple[str, Axis], object], rows: Range, columns: Range
    ) -> dict[tuple[str, Axis], Tensor]:
        """The exponentials of a tile by matrix and axis, each computed once."""
        found: dict[tuple[str, Axis], Tensor] = {}
        for name, axis in wanted:
            other: tuple[str, Axis] = (name, "columns" if axis == "rows" else "rows")
            shared = found.get(other) if not self.exact else None
            found[name, axis] = self.exponential(name, axis, z[name], rows, columns) if shared is None else shared
        return found

    def diagonal(self, tile: Tensor, rows: Range, columns: Range) -> tuple[Tensor, int] | None:
        """The view of a tile's entries on the diagonal of the whole matrix, and the first one's own row; or None."""
        offset = self.world.offset
        low, high = max(rows[0] + offset, columns[0]), min(rows[1] + offset, columns[1])
        if low >= high:
            return None
        first = low - offset - rows[0]
        return tile[first : first + high - low, low - columns[0] : high - columns[0]].diagonal(), low - offset

    # -- first pass ---------------------------------------------------------------------------------------------------

    def extremes(self, rows: Range) -> None:
        """Largest logit of every row and column."""
        for columns in self.column_tiles:
            for name, axis in self.component.softmaxes:
                z = self.logits(name, rows, columns)
                if axis == "rows":
                    part, largest = self.row_shift[name][slice(*rows)], z.amax(1)
                else:
                    part, largest = self.column_shift[name][slice(*columns)], z.amax(0)
                torch.maximum(part, largest, out=part)

    def sums(self, rows: Range) -> None:
        """Walk a row stripe for the sums of exponentials, the cross sums, diagonals and sigmoid values."""
        component = self.component
        for columns in self.column_tiles:
            z = {name: self.logits(name, rows, columns) for name in component.pairings}
            for name in component.diagonals:
                if (found := self.diagonal(z[name], rows, columns)) is not None:
                    self.scalars["diagonal", name] += found[0].sum(dtype=self.wide)
            for logits, targets in component.sigmoids:
                self.scalars["sigmoid", logits, targets] += self.softplus_sum(z, logits, targets, rows, columns)
            self.add_sums(z, rows, columns)

    def add_sums(self, z: Mapping[str, Tensor], rows: Range, columns: Range) -> None:
        """Add a tile to the sums of exponentials and the cross sums."""
        e = self.exponentials(z, dict.fromkeys(self.component.softmaxes), rows, columns)
        for (name, axis), exponential in e.items():
            if axis == "rows":
                self.row_sums[name][slice(*rows)] += exponential.sum(1)
            else:
                self.column_sums[name][slice(*columns)] += exponential.sum(0)
        self.add_crosses(z, e, rows, columns)

    def add_crosses(
        self, z: Mapping[str, Tensor], e: Mapping[tuple[str, Axis], Tensor], rows: Range, columns: Range
    ) -> None:
        """Sums of exp(target) * (target - logits), once for both axes where the exponential serves both."""
        product, made = None, None
        for target, logits, axis, entropy in sorted(self.cross, key=lambda key: (key[0], key[1], key[3], key[2])):
            recipe = (target, logits, entropy, axis if self.exact else None)
            if product is None or made != recipe:
                product, made = self.work.tile("product", *z[logits].shape), recipe
                if entropy:
                    torch.sub(z[target], z[logits], out=product).mul_(e[target, axis])
                else:
                    torch.mul(z[logits], e[target, axis], out=product)
            sums = self.cross[target, logits, axis, entropy]
            if axis == "rows":
                sums[slice(*rows)] += product.sum(1)
            else:
                sums[slice(*columns)] += product.sum(0)

    def values(self) -> dict[Key, Tensor]:
        """This rank's share of every sum a term's value is made of."""
        offset = self.world.offset
        mine = slice(offset, offset + self.local)
        found = dict(self.scalars)
        for name, axis in self.component.softmaxes:
            sums = self.row_sums[name] if axis == "rows" else self.column_sums[name][mine]
            found["lse", name, axis] = sums.log().sum()
            if self.exact:
                shift = self.row_shift[name] if axis == "rows" else self.column_shift[name][mine]
                found["lse", name, axis] += shift.sum(dtype=self.wide)
        for key, cross in self.cross.items():
            target, _, axis, _ = key
            sums = self.row_sums[target] if axis == "rows" else self.column_sums[target][mine]
            found["cross", *key] = ((cross if axis == "rows" else cross[mine]) / sums).sum()
        return found

    # -- second pass --------------------------------------------------------------------------------------------------

    def weigh(self, rows: Range) -> None:
        """Weights of the exponentials in every gradient: term weight / sum of exponentials, for the given rows."""
        for logits, gradient in self.trained.items():
            for name in self.component.pairings:
                for axis, weight in gradient.axes_of(name, logits).items():
                    sums = self.row_sums[name][slice(*rows)] if axis == "rows" else self.column_sums[name]
                    self.own[logits, name, axis] = (weight / sums).to(self.inputs.like.dtype)
        self.weighed_from = rows[0]

    def differentiate(self, rows: Range) -> None:
        """Add what the tiles of a row stripe contribute to the gradients."""
        if not self.trained:
            return
        read = {name for _, name, _ in self.own} | set(self.trained)
        read |= {name for g in self.trained.values() for targets in g.sigmoids for name in targets}
        for columns in self.column_tiles:
            z = {name: self.logits(name, rows, columns) for name in self.component.pairings if name in read}
            self.add_gradients(z, rows, columns)

    def add_gradients(self, z: Mapping[str, Tensor], rows: Range, columns: Range) -> None:
        """Add what a tile contributes to the gradients."""
        e = self.exponentials(z, {(name, axis): None for _, name, axis in self.own}, rows, columns)
        for logits, gradient in self.trained.items():
            tile = self.gradient_of(logits, gradient, z, e, rows, columns)
            self.propagate(logits, tile, z[logits], rows, columns)

    def weights_of(self, logits: str, name: str, rows: Range, columns: Range) -> tuple[Tensor | None, Tensor | None]:
        """Weights, per row and per column of a tile, of the exponential of `name` in the gradient of `logits`."""
        by_row, by_column = self.own.get((logits, name, "rows")), self.own.get((logits, name, "columns"))
        if by_row is not None:
            by_row = by_row[rows[0] - self.weighed_from : rows[1] - self.weighed_from]
        return by_row, None if by_column is None else by_column[slice(*columns)]

    def gradient_of(
        self,
        logits: str,
        gradient: Gradient,
        z: Mapping[str, Tensor],
        e: Mapping[tuple[str, Axis], Tensor],
        rows: Range,
        columns: Range,
    ) -> Tensor:
        """The tile of N * d(loss)/d(logits)."""
        out = self.work.tile("gradient", *z[logits].shape)
        empty = True
        for name in self.component.pairings:
            by_row, by_column = self.weights_of(logits, name, rows, columns)
            by_row = None if by_row is None else by_row[:, None]
            if by_row is not None and by_column is not None and not self.exact:
                both = torch.add(by_row, by_column, out=self.work.tile("product", *out.shape))
                parts = [(e[name, "rows"], both)]
            else:
                parts = [(e[name, "rows"], by_row)] if by_row is not None else []
                parts += [(e[name, "columns"], by_column)] if by_column is not None else []
            for exponential, weight in parts:
                if empty:
                    torch.mul(exponential, weight, out=out)
                else:
                    out.addcmul_(exponential, weight)
                empty = False
        if empty:
            out.zero_()
        if gradient.diagonal != 0.0 and (found := self.diagonal(out, rows, columns)) is not None:
            found[0].sub_(gradient.diagonal)
        for targets, share in gradient.sigmoids.items():
            out.add_(self.sigmoid_gradient(z, logits, targets, rows, columns), alpha=share)
        return out

    def propagate(
        self,
        logits: str,
        tile: Tensor,
        z: Tensor,
        rows: Range,
        columns: Range,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """From a tile of N * d(loss)/d(logits) to features, scale and bias. known: sums of tile and of tile * z."""
        assert self.gradients is not None
        inputs, pairing = self.inputs, self.component.pairings[logits]
        scale, bias = self.scale_and_bias(logits)
        of_scale, of_bias = self.gradients.scales.get(pairing.scale), self.gradients.scales.get(pairing.bias or "")
        into_rows, into_columns = self.gradients.rows.get(pairing.rows), self.gradients.columns.get(pairing.columns)
        constant = self.shift[logits] - bias
        if of_bias is not None or (of_scale is not None and scale != 0.0 and constant != 0.0):
            total = tile.sum() if known is None else known[0]
            if of_bias is not None:
                of_bias.add_(total, alpha=1 / self.total)
            if of_scale is not None and scale != 0.0:
                of_scale.add_(total, alpha=constant / (scale * self.total))
        if of_scale is not None:
            product = self.work.tile("product", *tile.shape)
            if scale == 0.0:
                cosines = self.multiply(logits, rows, columns, 1.0, 0.0, product)
                of_scale.add_(cosines.mul_(tile).sum(), alpha=1 / self.total)
            else:
                weighted = torch.mul(tile, z, out=product).sum() if known is None else known[1]
                of_scale.add_(weighted, alpha=1 / (scale * self.total))
        factor = inputs.products.factor(tile) if into_rows is not None or into_columns is not None else tile
        if into_rows is not None:
            right = inputs.whole[pairing.columns][slice(*columns)]
            inputs.products.accumulate(into_rows[slice(*rows)], factor, right, scale / self.total)
        if into_columns is not None:
            left = inputs.local[pairing.rows][slice(*rows)]
            inputs.products.accumulate(into_columns[slice(*columns)], factor.T, left, scale / self.total)

    # -- sigmoid losses -----------------------------------------------------------------------------------------------

    def labelled(
        self, z: Mapping[str, Tensor], logits: str, targets: tuple[str, ...], rows: Range, columns: Range
    ) -> tuple[Tensor, Tensor | None]:
        """(-y * logits, y) of a tile, in buffers; y is None for the plain loss (+1 on the diagonal, -1 elsewhere)."""
        x = torch.add(z[logits], self.shift[logits], out=self.work.tile("sigmoid", *z[logits].shape))
        if not targets:
            if (found := self.diagonal(x, rows, columns)) is not None:
                found[0].neg_()
            return x, None
        labels = self.work.tile("labels", *x.shape).fill_(-1.0)
        for name in targets:
            probability = torch.add(z[name], self.shift[name], out=self.work.tile("product", *x.shape)).sigmoid_()
            labels.add_(probability, alpha=2 / len(targets))
        return x.mul_(labels).neg_(), labels

    def softplus_sum(
        self, z: Mapping[str, Tensor], logits: str, targets: tuple[str, ...], rows: Range, columns: Range
    ) -> Tensor:
        """Sum over a tile of log(1 + exp(-y * logits))."""
        x, _ = self.labelled(z, logits, targets, rows, columns)
        small = torch.abs(x, out=self.work.tile("product", *x.shape)).neg_().exp_().log1p_().sum()
        return small + x.clamp_(min=0.0).sum()

    def sigmoid_gradient(
        self, z: Mapping[str, Tensor], logits: str, targets: tuple[str, ...], rows: Range, columns: Range
    ) -> Tensor:
        """-y * sigmoid(-y * logits) of a tile."""
        x, labels = self.labelled(z, logits, targets, rows, columns)
        x.sigmoid_()
        if labels is not None:
            return x.mul_(labels).neg_()
        if (found := self.diagonal(x, rows, columns)) is not None:
            found[0].neg_()
        return x
