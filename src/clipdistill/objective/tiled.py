"""The tiled engine: the same numbers as `dense`, with memory linear in the batch.

The logit matrices exist only as tiles. A first pass sums exponentials along rows and columns, which gives every value;
a second one turns the tiles into gradients, which are computed together with the value and handed out by `backward`.
For CLIP-RD that is six products to sum, six to recompute and six for the gradients: 18 N^2 D multiply-adds. See
`tiled_layout` (what is walked together), `tiled_walk` (the passes), `tiled_products` (precision, memory) and
docs/performance.md (figures).

Under torch.distributed each rank walks its own rows of every matrix against everybody's columns: features are exchanged
once, column sums once per component, feature gradients once. No rank holds more than tiles of N x N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipdistill.objective.engine import EngineOptions, EngineResult, Plan
from clipdistill.objective.features import Features
from clipdistill.objective.gather import World, all_rows, sum_own_rows
from clipdistill.objective.tiled_layout import Key, components, value_keys
from clipdistill.objective.tiled_products import Products, Shape
from clipdistill.objective.tiled_walk import Gradients, Inputs, Walk


def tiled(features: Features, plan: Plan, world: World, options: EngineOptions) -> EngineResult:
    """The engine of `engine.Engine` that never holds a logit matrix."""
    job = _Job(features, plan, world, options)
    total, terms = _Tiled.apply(job, *job.tensors)
    return EngineResult(total, dict(zip(plan.primitives, terms.unbind())))


class _Job:
    """What `_Tiled` computes, and which of its tensor arguments each name of the features means."""

    def __init__(self, features: Features, plan: Plan, world: World, options: EngineOptions) -> None:
        self.plan, self.world, self.options = plan, world, options
        self.components = components(plan)
        pairings = [pairing for component in self.components for pairing in component.pairings.values()]
        self.row_names = list(dict.fromkeys(pairing.rows for pairing in pairings))
        self.column_names = list(dict.fromkeys(pairing.columns for pairing in pairings))
        scales = [name for pairing in pairings for name in (pairing.scale, pairing.bias) if name is not None]
        self.scale_names = list(dict.fromkeys(scales))
        self.place: dict[str, int] = {}
        self.tensors: list[Tensor] = []
        # one tensor may stand under two names: it is one argument, exchanged once, with one gradient
        known: dict[int, int] = {}
        for name in [*self.row_names, *self.column_names]:
            self._add(name, features.matrices[name], known)
        self.matrices = len(self.tensors)
        for name in self.scale_names:
            self._add("scale " + name, features.scales[name], known)
        self.differentiable = torch.is_grad_enabled()

    def _add(self, name: str, tensor: Tensor, known: dict[int, int]) -> None:
        if id(tensor) not in known:
            known[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        self.place[name] = known[id(tensor)]


class _Tiled(torch.autograd.Function):
    """Total and terms of a job; the gradients are computed with them, since they need the same tiles."""

    @staticmethod
    def forward(ctx: Any, job: _Job, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        needed = [job.differentiable and need for need in ctx.needs_input_grad[1:]]
        device = job.tensors[0].device
        with torch.autocast(device.type, enabled=False):
            total, terms, gradients = _compute(job, tensors, needed)
        ctx.save_for_backward(*(gradient for gradient in gradients if gradient is not None))
        ctx.present = [gradient is not None for gradient in gradients]
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return None, *(next(saved) * incoming[0] if present else None for present in ctx.present)


def _compute(
    job: _Job, tensors: Sequence[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """Total, terms and the gradient of every tensor that needs one, in the convention of `engine.Engine`."""
    world, like = job.world, tensors[0].new_empty(0)
    wide = torch.float32 if like.device.type == "mps" else torch.float64
    products = Products(like.device, like.dtype, job.options.products == "bfloat16")
    local = [products.factor(matrix.contiguous()) for matrix in tensors[: job.matrices]]
    column_places = sorted({job.place[name] for name in job.column_names})
    whole = {place: local[place] if world.size == 1 else all_rows(local[place], world) for place in column_places}

    of_rows = {job.place[n]: torch.zeros_like(tensors[job.place[n]]) for n in job.row_names if needed[job.place[n]]}
    of_columns = {}
    for place in (place for place in column_places if needed[place]):
        # in a single process own rows are everybody's rows: both sides of a product add to one matrix
        shared = of_rows.get(place) if world.size == 1 else None
        of_columns[place] = torch.zeros_like(whole[place], dtype=like.dtype) if shared is None else shared
    scale_places = [job.place["scale " + name] for name in job.scale_names]
    of_scales = {place: torch.zeros((), dtype=wide, device=like.device) for place in scale_places if needed[place]}

    lengths = _row_lengths(tensors[: job.matrices], world)
    numbers = torch.cat([torch.stack([tensors[place].to(wide) for place in scale_places]), lengths.to(wide)]).tolist()
    scales, bounds = numbers[: len(scale_places)], numbers[len(scale_places) :]
    inputs = Inputs(
        local={name: local[job.place[name]] for name in job.row_names},
        whole={name: whole[job.place[name]] for name in job.column_names},
        scales=dict(zip(job.scale_names, scales)),
        bounds={name: bounds[job.place[name]] for name in (*job.row_names, *job.column_names)},
        like=like,
        world=world,
        products=products,
        shape=Shape.choose(like.device, job.options),
    )
    gradients = Gradients(
        rows={name: of_rows[job.place[name]] for name in job.row_names if needed[job.place[name]]},
        columns={name: of_columns[job.place[name]] for name in job.column_names if needed[job.place[name]]},
        scales={name: of_scales[place] for name, place in zip(job.scale_names, scale_places) if needed[place]},
    )
    sums: dict[tuple[int, Key], Tensor] = {}
    with products.context():
        for index, component in enumerate(job.components):
            walk = Walk(component, inputs, gradients if any(needed) else None)
            sums |= {(index, key): value for key, value in walk.run().items()}
    terms = _terms(job, sums)
    weights = terms.new_tensor([job.plan.weights[term] for term in job.plan.primitives])
    collected: list[Tensor | None] = [None] * len(tensors)
    for place in (place for place, need in enumerate(needed) if need):
        if place < job.matrices:
            collected[place] = _own_gradient(of_rows.get(place), of_columns.get(place), world)
        else:
            collected[place] = (of_scales[place] * world.size).to(like.dtype)
    return (terms @ weights).to(like.dtype), terms.to(like.dtype), collected


def _row_lengths(matrices: Sequence[Tensor], world: World) -> Tensor:
    """Largest Euclidean length of a row of each matrix, over all ranks."""
    lengths = torch.stack(
        [torch.linalg.vector_norm(m, dim=1).amax() if m.shape[0] else m.new_zeros(()) for m in matrices]
    )
    if world.size > 1:
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
    return lengths


def _terms(job: _Job, sums: dict[tuple[int, Key], Tensor]) -> Tensor:
    """The unweighted value of each term, over all ranks."""
    where = {name: index for index, component in enumerate(job.components) for name in component.pairings}
    position = {key: k for k, key in enumerate(sums)}
    coefficients = [[0.0] * len(sums) for _ in job.plan.primitives]
    for row, primitives in zip(coefficients, job.plan.primitives.values()):
        for primitive in primitives:
            index = where[primitive.logits]
            for key, sign in value_keys(primitive, job.components[index].transposed):
                row[position[index, key]] += primitive.weight * sign / max(job.world.total, 1)
    together = torch.stack(list(sums.values()))
    if job.world.size > 1:
        dist.all_reduce(together)
    return together.new_tensor(coefficients) @ together


def _own_gradient(rows: Tensor | None, columns: Tensor | None, world: World) -> Tensor | None:
    """The gradient of a matrix of own rows from its two roles: as rows of products, and as columns on every rank."""
    if world.size == 1:
        return columns if rows is None else rows
    own = [] if rows is None else [rows]
    own += [] if columns is None else [sum_own_rows(columns, world)]
    return torch.stack(own).sum(0) * world.size
