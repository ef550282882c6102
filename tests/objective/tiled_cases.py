"""Random features and plans, and a naive reference written from the definitions in plan.py, for tests of `tiled`."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor

from clipdistill.objective.features import Features
from clipdistill.objective.plan import (
    CrossEntropy,
    Divergence,
    Plan,
    Primitive,
    Sigmoid,
    named_logits,
    published_pairings,
)

DIMS = {"student": 6, "teacher": 5, "fused": 4, "k": 3}
TEACHERS = 2
TRAINED = ("student_image", "student_text", "student_synthetic_text", "projected_image", "projected_text")
PAIRINGS = {**published_pairings(TEACHERS), **published_pairings()}
SCALES = {
    "student": 14.0,
    "student_bias": -4.0,
    "teacher": 60.0,
    "teacher_bias": -8.0,
    "image": 2.66,
    "text": 3.1,
    "cross": 2.2,
    "fusion": 5.0,
    **{f"teacher_{k}": 20.0 + 30 * k for k in range(TEACHERS)},
    **{f"teacher_bias_{k}": -5.0 - k for k in range(TEACHERS)},
}


def width(name: str) -> int:
    """Columns of a feature matrix: the student's, the teacher's (also of projected rows), or an ensemble block's."""
    if name[-1].isdigit():
        return DIMS["k"]
    if name.startswith("fused"):
        return DIMS["fused"]
    return DIMS["student"] if name.startswith("student") else DIMS["teacher"]


def make_features(
    n: int,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    dims: Mapping[str, int] | None = None,
    noise: float = 1.0,
) -> Features:
    """Leaf tensors under every name a pairing uses: student and fused rows, and all scales, want a gradient."""
    generator = torch.Generator().manual_seed(seed)
    names = sorted({name for pairing in PAIRINGS.values() for name in (pairing.rows, pairing.columns)})
    matrices = {}
    for name in names:
        columns = width(name) if dims is None else dims.get(name.split("_")[0], width(name))
        common = torch.randn(n, columns, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        rows = common + noise * torch.randn(n, columns, generator=generator, dtype=torch.float64)
        rows = torch.nn.functional.normalize(rows, dim=1).to(dtype)
        matrices[name] = rows.requires_grad_(name in TRAINED or name.startswith("fused"))
    scales = {
        name: torch.tensor(value, dtype=dtype).requires_grad_(not name.startswith("teacher"))
        for name, value in SCALES.items()
    }
    return Features(matrices, scales)


def random_plan(seed: int, count: int = 6) -> Plan:
    """Up to `count` primitives over random pairings in random terms."""
    chooser = random.Random(seed)
    trained = [name for name, pairing in PAIRINGS.items() if pairing.trained]
    terms: dict[str, list[Primitive]] = {}
    for index in range(chooser.randint(1, count)):
        logits = chooser.choice(trained)
        target = chooser.choice([name for name in PAIRINGS if name != logits])
        weight = chooser.uniform(0.2, 2.0)
        axis = chooser.choice(["rows", "columns"])
        kind = chooser.randrange(5)
        made: Primitive
        if kind == 0:
            made = CrossEntropy(logits, axis, weight)
        elif kind in (1, 2):
            made = Divergence(target, logits, axis, weight, entropy=kind == 1)
        else:
            targets = tuple(chooser.sample(sorted(set(PAIRINGS) - {logits}), chooser.randint(1, 3)))
            made = Sigmoid(logits, weight, targets if kind == 3 else ())
        terms.setdefault(f"term{index // 2}", []).append(made)
    return plan_of({name: tuple(group) for name, group in terms.items()}, seed)


def plan_of(primitives: Mapping[str, tuple[Primitive, ...]], seed: int = 0) -> Plan:
    """A plan with random term weights and just the pairings it names."""
    chooser = random.Random(seed)
    names = {name for group in primitives.values() for primitive in group for name in named_logits(primitive)}
    weights = {term: chooser.uniform(0.3, 3.0) for term in primitives}
    return Plan({name: PAIRINGS[name] for name in PAIRINGS if name in names}, primitives, weights)


CLIP_RD: dict[str, tuple[Primitive, ...]] = {
    "task": tuple(CrossEntropy("student", axis, 0.5) for axis in ("rows", "columns")),
    "crd": tuple(Divergence("teacher", "student", axis, 0.5) for axis in ("rows", "columns")),
    "icl": (CrossEntropy("text_image", "columns", 0.5), CrossEntropy("image_text", "columns", 0.5)),
    "vrd_kl": tuple(Divergence("text", "image", axis, 0.5) for axis in ("rows", "columns")),
    "vrd_ce": tuple(CrossEntropy(name, axis, 0.5) for name in ("image", "text") for axis in ("rows", "columns")),
    "xrd": tuple(
        Divergence(target, logits, axis, 0.25)
        for axis in ("rows", "columns")
        for target, logits in (("image_text", "text_image"), ("text_image", "image_text"))
    ),
}


def reference(features: Features, plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    """Total and terms from the definitions, on whole matrices, by loops over primitives and autograd."""

    def matrix(name: str) -> Tensor:
        pairing = plan.pairings[name]
        z = features.scales[pairing.scale] * (features.matrices[pairing.rows] @ features.matrices[pairing.columns].T)
        return z if pairing.bias is None else z + features.scales[pairing.bias]

    def value(primitive: Primitive) -> Tensor:
        z = matrix(primitive.logits)
        n = len(z)
        if isinstance(primitive, Sigmoid):
            y = 2 * torch.eye(n, dtype=z.dtype) - 1
            if primitive.targets:
                y = (
                    2 * sum(torch.sigmoid(matrix(name).detach()) for name in primitive.targets) / len(primitive.targets)
                    - 1
                )
            return torch.logaddexp(-y * z, torch.zeros_like(z)).sum() / n
        if primitive.axis == "columns":
            z = z.T
        q = z - z.logsumexp(1, keepdim=True)
        if isinstance(primitive, CrossEntropy):
            return -q.diagonal().sum() / n
        t = matrix(primitive.target).detach()
        t = t.T if primitive.axis == "columns" else t
        p = t - t.logsumexp(1, keepdim=True)
        return (p.exp() * ((p if primitive.entropy else 0) - q)).sum() / n

    terms = {term: sum(p.weight * value(p) for p in group) for term, group in plan.primitives.items()}
    return sum(plan.weights[term] * terms[term] for term in terms), terms


def leaves(features: Features) -> dict[str, Tensor]:
    """Everything that wants a gradient, by name."""
    every = {**features.matrices, **{"scale " + name: scale for name, scale in features.scales.items()}}
    return {name: tensor for name, tensor in every.items() if tensor.requires_grad}


def gradients(features: Features, total: Tensor) -> dict[str, Tensor]:
    """d(total) / d(leaf), zero where there is none."""
    named = leaves(features)
    found = torch.autograd.grad(total, list(named.values()), allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in zip(named.items(), found)}


def relative(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Largest deviation relative to the largest expected magnitude (or to `floor`, if that is larger)."""
    if expected.numel() == 0:
        return 0.0
    size = max(float(expected.detach().abs().max()), floor)
    difference = float((value.detach().double() - expected.detach().double()).abs().max())
    return 0.0 if difference == 0.0 else difference / size if size else math.inf
