"""The plain engine: holds the logit matrices, leaves the gradient to autograd. The reference for the tiled one.

In one process every matrix is N x N and each is multiplied once. With W ranks a rank holds only blocks of N/W x N: its
own rows of a matrix for row-wise primitives, its own columns (as rows of the transpose) for column-wise ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.objective.engines import EngineOptions, EngineResult
from clipdistill.objective.features import Features
from clipdistill.objective.gather import World, gather_rows, sum_over_ranks
from clipdistill.objective.plan import Axis, CrossEntropy, Divergence, Plan, Primitive, Sigmoid, named_logits


class _Matrices:
    """Logit matrices and their log-softmaxes, each computed once and only when asked for."""

    def __init__(self, features: Features, whole: Mapping[str, Tensor], plan: Plan, world: World) -> None:
        self.features, self.whole, self.plan, self.world = features, whole, plan, world
        self.products: dict[tuple[str, str], Tensor] = {}
        self.logits: dict[tuple[str, str], Tensor] = {}
        self.softmaxes: dict[tuple[str, str], Tensor] = {}

    def product(self, rows: str, columns: str) -> Tensor:
        """Own rows of the one matrix times all rows of the other, transposed: (n_local, N)."""
        if (rows, columns) not in self.products:
            if self.world.size == 1 and (columns, rows) in self.products:
                return self.products[columns, rows].T
            self.products[rows, columns] = self.features.matrices[rows] @ self.whole[columns].T
        return self.products[rows, columns]

    def oriented(self, name: str, axis: Axis) -> tuple[Tensor, int]:
        """The logits and the dimension along which `axis` runs; one matrix serves both axes in a single process."""
        across = axis == "columns" and self.world.size > 1
        key = (name, "columns" if across else "rows")
        if key not in self.logits:
            pairing = self.plan.pairings[name]
            rows, columns = (pairing.columns, pairing.rows) if across else (pairing.rows, pairing.columns)
            logits = self.features.scales[pairing.scale] * self.product(rows, columns)
            self.logits[key] = logits if pairing.bias is None else logits + self.features.scales[pairing.bias]
        return self.logits[key], 0 if axis == "columns" and not across else 1

    def log_softmax(self, name: str, axis: Axis) -> Tensor:
        if (name, axis) not in self.softmaxes:
            logits, dimension = self.oriented(name, axis)
            self.softmaxes[name, axis] = F.log_softmax(logits, dim=dimension)
        return self.softmaxes[name, axis]

    def value(self, primitive: Primitive) -> Tensor:
        """This rank's share of the primitive's value, times N."""
        if isinstance(primitive, CrossEntropy):
            return -torch.diagonal(self.log_softmax(primitive.logits, primitive.axis), self.world.offset).sum()
        if isinstance(primitive, Divergence):
            target = self.log_softmax(primitive.target, primitive.axis).detach()
            trained = self.log_softmax(primitive.logits, primitive.axis)
            return (target.exp() * (target - trained if primitive.entropy else -trained)).sum()
        logits, _ = self.oriented(primitive.logits, "rows")
        # softplus(-x) as -logsigmoid(x): torch's softplus turns linear above 20 and loses 2e-9 there
        return -F.logsigmoid(self.labels(primitive, logits) * logits).sum()

    def labels(self, primitive: Sigmoid, logits: Tensor) -> Tensor:
        """y of the sigmoid loss, (n_local, N): +-1, or from the teachers' probabilities."""
        if primitive.targets:
            teachers = [self.oriented(name, "rows")[0].detach().sigmoid() for name in primitive.targets]
            return 2 * torch.stack(teachers).mean(dim=0) - 1
        labels = torch.full_like(logits, -1.0, requires_grad=False)
        torch.diagonal(labels, self.world.offset).fill_(1.0)
        return labels


def dense(
    features: Features, plan: Plan, world: World, options: EngineOptions, whole: Mapping[str, Tensor] | None = None
) -> EngineResult:
    """The engine of `engines.Engine` that holds its matrices. `options` do not apply: products are always exact.

    whole: the matrices of `gathered_names` with the rows of all ranks, when the caller has exchanged them already.
    """
    if whole is None:
        names = gathered_names(plan, world)
        whole = dict(zip(names, gather_rows([features.matrices[name] for name in names], world)))
    matrices = _Matrices(features, whole, plan, world)
    partial = torch.stack(
        [
            torch.stack([primitive.weight * matrices.value(primitive) for primitive in primitives]).sum()
            for primitives in plan.primitives.values()
        ]
    ) / max(world.total, 1)
    values = sum_over_ranks(partial, world)
    weights = values.new_tensor([plan.weights[term] for term in plan.primitives])
    detached = values.detach()
    return EngineResult(values @ weights, {term: detached[i] for i, term in enumerate(plan.primitives)})


def gathered_names(plan: Plan, world: World) -> list[str]:
    """Feature matrices of which a rank needs everybody's rows, in a fixed order."""
    needed: dict[str, None] = {}
    for primitives in plan.primitives.values():
        for primitive in primitives:
            for name in named_logits(primitive):
                pairing = plan.pairings[name]
                across = getattr(primitive, "axis", "rows") == "columns" and world.size > 1
                needed[pairing.rows if across else pairing.columns] = None
    return list(needed)
