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

from clipdistill.objective.engines import EngineOptions, EngineResult
from clipdistill.objective.engines.tiled_fused import FusedWalk, wanted
from clipdistill.objective.engines.tiled_layout import Key, components, value_keys
from clipdistill.objective.engines.tiled_products import Products, Shape, Workspace
from clipdistill.objective.engines.tiled_walk import Gradients, Inputs, Walk
from clipdistill.objective.features import Features
from clipdistill.objective.gather import World, all_rows, sum_own_rows
from clipdistill.objective.plan import Plan


def tiled(features: Features, plan: Plan, world: World, options: EngineOptions) -> EngineResult:
    """The engine of `engines.Engine` that never holds a logit matrix."""
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
    """Total, terms and the gradient of every tensor that needs one, in the convention of `engines.Engine`."""
    world, like = job.world, tensors[0].new_empty(0)
    products = Products(like.device, like.dtype, job.options.products == "bfloat16")
    local = [products.factor(matrix.contiguous()) for matrix in tensors[: job.matrices]]
    whole = _everybodys_rows({k: local[k] for k in sorted({job.place[name] for name in job.column_names})}, world)
    scales, bounds = _numbers(job, tensors)
    inputs = Inputs(
        local={name: local[job.place[name]] for name in job.row_names},
        whole={name: whole[job.place[name]] for name in job.column_names},
        scales=scales,
        bounds=bounds,
        like=like,
        world=world,
        products=products,
        shape=Shape.choose(like.device, job.options),
        work=Workspace(like),
    )
    buffers = _Buffers(job, tensors, needed)
    passes = FusedWalk if wanted(like.device, job.options) else Walk
    sums: dict[tuple[int, Key], Tensor] = {}
    with products.context():
        for index, component in enumerate(job.components):
            walk = passes(component, inputs, buffers.by_name(job) if any(needed) else None)
            sums |= {(index, key): value for key, value in walk.run().items()}
    terms = _terms(job, sums)
    weights = terms.new_tensor([job.plan.weights[term] for term in job.plan.primitives])
    own = buffers.own(world)
    return ((terms @ weights).to(like.dtype), terms.to(like.dtype), [own.get(place) for place in range(len(tensors))])


class _Buffers:
    """Gradients being added up, by place: of own rows, of everybody's rows (this rank's contribution), of scales."""

    def __init__(self, job: _Job, tensors: Sequence[Tensor], needed: Sequence[bool]) -> None:
        like, world = tensors[0], job.world
        places = sorted({job.place[name] for name in job.column_names if needed[job.place[name]]})
        scales = sorted({job.place["scale " + name] for name in job.scale_names if needed[job.place["scale " + name]]})
        self.rows = {
            job.place[name]: torch.zeros_like(tensors[job.place[name]], memory_format=torch.contiguous_format)
            for name in job.row_names
            if needed[job.place[name]]
        }
        self.together: Tensor | None = None
        if world.size == 1:
            # own rows are everybody's rows: both roles of a matrix add to the same gradient
            self.columns = {place: self.rows.get(place, torch.zeros_like(tensors[place])) for place in places}
        else:
            # beside each other, so that one exchange serves all
            widths = [tensors[place].shape[1] for place in places]
            self.together = like.new_zeros((world.total, sum(widths)))
            self.columns = dict(zip(places, self.together.split(widths, dim=1) if widths else ()))
        self.scales = {place: torch.zeros((), dtype=_wide(like), device=like.device) for place in scales}
        self.dtype = like.dtype

    def by_name(self, job: _Job) -> Gradients:
        """The buffers under the names of the features."""
        scales = {name: job.place["scale " + name] for name in job.scale_names}
        return Gradients(
            rows={name: self.rows[job.place[name]] for name in job.row_names if job.place[name] in self.rows},
            columns={
                name: self.columns[job.place[name]] for name in job.column_names if job.place[name] in self.columns
            },
            scales={name: self.scales[place] for name, place in scales.items() if place in self.scales},
        )

    def own(self, world: World) -> dict[int, Tensor]:
        """The gradient of every place, in the convention of `engines.Engine`; exchanges the columns' once."""
        scales = {place: (gradient * world.size).to(self.dtype) for place, gradient in self.scales.items()}
        if self.together is None:
            return self.rows | self.columns | scales
        own = dict(self.rows)
        if self.columns:
            widths = [part.shape[1] for part in self.columns.values()]
            for place, part in zip(self.columns, sum_own_rows(self.together, world).split(widths, dim=1)):
                own[place] = own[place] + part if place in own else part
        return {place: gradient * world.size for place, gradient in own.items()} | scales


def _wide(like: Tensor) -> torch.dtype:
    """The type of sums over tiles; torch has no float64 on Apple's GPU."""
    return torch.float32 if like.device.type == "mps" else torch.float64


def _numbers(job: _Job, tensors: Sequence[Tensor]) -> tuple[dict[str, float], dict[str, float]]:
    """Scales and biases, and the largest length of a row of each matrix on any rank, in one transfer to the host."""
    lengths = torch.stack(
        [torch.linalg.vector_norm(m, dim=1).amax() if m.shape[0] else m.new_zeros(()) for m in tensors[: job.matrices]]
    )
    if job.world.size > 1:
        dist.all_reduce(lengths, dist.ReduceOp.MAX)
    wide = _wide(tensors[0])
    scales = [tensors[job.place["scale " + name]].to(wide) for name in job.scale_names]
    numbers = torch.cat([torch.stack(scales), lengths.to(wide)]).tolist()
    bounds = numbers[len(scales) :]
    return (
        dict(zip(job.scale_names, numbers)),
        {name: bounds[job.place[name]] for name in (*job.row_names, *job.column_names)},
    )


def _everybodys_rows(local: dict[int, Tensor], world: World) -> dict[int, Tensor]:
    """(n_local, D) -> (N, D) for every matrix, in one exchange."""
    if world.size == 1:
        return local
    together = all_rows(torch.cat(list(local.values()), dim=1), world)
    return dict(zip(local, together.split([matrix.shape[1] for matrix in local.values()], dim=1)))


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
    shares = together.new_tensor(coefficients)
    # not a product of matrices: a sum that is not a number must not reach terms that do not contain it
    return torch.where(shares == 0, 0.0, shares * together).sum(1)
