"""How the tiled engine reads a plan: which matrices must be walked together, and what must be summed along the way.

Matrices joined by a `Divergence` or a distilled `Sigmoid` need each other's entries tile by tile; they form a
*component*. Components are independent, so only one component's tiles are in work at a time (two matrices for CLIP-RD).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from clipdistill.objective.plan import Axis, CrossEntropy, Divergence, Pairing, Plan, Primitive, Sigmoid, named_logits

# A number the values are made of: ("lse", matrix, axis), ("diagonal", matrix), ("sigmoid", logits, targets) or
# ("cross", target, logits, axis, entropy). Each is a sum over rows or entries, not yet divided by N.
Key = tuple[object, ...]


@dataclass(frozen=True)
class Component:
    """Matrices that are walked together.

    pairings: by name, in the order in which their tiles are computed.
    softmaxes: (matrix, axis) whose exponentials are summed. crosses: (target, logits, axis, entropy) sums of
    exp(target) * (target - logits), or of exp(target) * logits without entropy. diagonals: matrices whose diagonal is
    summed. sigmoids: (logits, targets). gradients: what the gradient of each trained matrix is made of. transposed:
    rows and columns of every matrix were exchanged with respect to the plan.
    """

    pairings: dict[str, Pairing]
    softmaxes: tuple[tuple[str, Axis], ...]
    crosses: tuple[tuple[str, str, Axis, bool], ...]
    diagonals: tuple[str, ...]
    sigmoids: tuple[tuple[str, tuple[str, ...]], ...]
    gradients: dict[str, Gradient]
    transposed: bool = False

    @property
    def by_columns(self) -> bool:
        """Whether a column must be complete before any gradient is known; if not, one row stripe at a time will do."""
        return any(axis == "columns" for _, axis in self.softmaxes)

    def has(self, name: str, axis: Axis) -> bool:
        """Whether the softmax of the matrix along the axis is needed."""
        return (name, axis) in self.softmaxes


@dataclass
class Gradient:
    """The gradient with respect to one matrix of logits, times N, as weights of its parts.

    own: softmax of the matrix itself, per axis. targets: (matrix, axis) -> weight of its softmax, subtracted.
    diagonal: subtracted from the diagonal. sigmoids: targets -> weight.
    """

    own: dict[Axis, float] = field(default_factory=dict)
    targets: dict[tuple[str, Axis], float] = field(default_factory=dict)
    diagonal: float = 0.0
    sigmoids: dict[tuple[str, ...], float] = field(default_factory=dict)

    def add(self, primitive: Primitive, weight: float) -> None:
        """Count in weight * d(primitive) / d(its logits)."""
        if isinstance(primitive, Sigmoid):
            self.sigmoids[primitive.targets] = self.sigmoids.get(primitive.targets, 0.0) + weight
            return
        self.own[primitive.axis] = self.own.get(primitive.axis, 0.0) + weight
        if isinstance(primitive, CrossEntropy):
            self.diagonal += weight
        else:
            key = (primitive.target, primitive.axis)
            self.targets[key] = self.targets.get(key, 0.0) + weight

    def axes_of(self, name: str, logits: str) -> dict[Axis, float]:
        """Signed weights of the exponentials of matrix `name` in the gradient of matrix `logits`, per axis."""
        found: dict[Axis, float] = dict(self.own) if name == logits else {}
        for (target, axis), weight in self.targets.items():
            if target == name:
                found[axis] = found.get(axis, 0.0) - weight
        return {axis: weight for axis, weight in found.items() if weight != 0.0}


def components(plan: Plan) -> list[Component]:
    """The plan's matrices, grouped by what must be walked together."""
    primitives = [primitive for group in plan.primitives.values() for primitive in group]
    weighted = [
        (primitive, plan.weights[term] * primitive.weight)
        for term, group in plan.primitives.items()
        for primitive in group
    ]
    found = []
    for names in _connected(primitives):
        members = [(p, weight) for p, weight in weighted if p.logits in names]
        columns_only = all(getattr(p, "axis", "rows") == "columns" for p, _ in members)
        if columns_only:
            # transposed, every softmax runs along rows: one pass over the tiles then gives the gradient as well
            members = [(p if isinstance(p, Sigmoid) else replace(p, axis="rows"), weight) for p, weight in members]
        found.append(_component(plan.pairings, names, members, columns_only))
    return found


def _connected(primitives: Iterable[Primitive]) -> list[list[str]]:
    """Names of matrices, grouped by the primitives that read several of them; order of first appearance."""
    groups: list[list[str]] = []
    for primitive in primitives:
        names = list(named_logits(primitive))
        touched = [group for group in groups if any(name in group for name in names)]
        merged = list(dict.fromkeys(name for group in [*touched, names] for name in group))
        position = groups.index(touched[0]) if touched else len(groups)
        groups = [group for group in groups if not any(group is other for other in touched)]
        groups.insert(position, merged)
    return groups


def _component(
    pairings: Mapping[str, Pairing], names: list[str], members: list[tuple[Primitive, float]], transposed: bool
) -> Component:
    softmaxes: dict[tuple[str, Axis], None] = {}
    crosses: dict[tuple[str, str, Axis, bool], None] = {}
    diagonals: dict[str, None] = {}
    sigmoids: dict[tuple[str, tuple[str, ...]], None] = {}
    gradients: dict[str, Gradient] = {}
    for primitive, weight in members:
        gradients.setdefault(primitive.logits, Gradient()).add(primitive, weight)
        if isinstance(primitive, Sigmoid):
            sigmoids[primitive.logits, primitive.targets] = None
            continue
        softmaxes[primitive.logits, primitive.axis] = None
        if isinstance(primitive, CrossEntropy):
            diagonals[primitive.logits] = None
        else:
            softmaxes[primitive.target, primitive.axis] = None
            crosses[primitive.target, primitive.logits, primitive.axis, primitive.entropy] = None
    own = {name: pairings[name] for name in names}
    if transposed:
        own = {name: replace(p, rows=p.columns, columns=p.rows) for name, p in own.items()}
    return Component(own, tuple(softmaxes), tuple(crosses), tuple(diagonals), tuple(sigmoids), gradients, transposed)


def value_keys(primitive: Primitive, transposed: bool) -> list[tuple[Key, float]]:
    """The sums whose signed total, divided by N, is the value of the primitive with weight 1."""
    if isinstance(primitive, Sigmoid):
        return [(("sigmoid", primitive.logits, primitive.targets), 1.0)]
    axis: Axis = "rows" if transposed else primitive.axis
    normaliser: tuple[Key, float] = (("lse", primitive.logits, axis), 1.0)
    if isinstance(primitive, CrossEntropy):
        return [normaliser, (("diagonal", primitive.logits), -1.0)]
    cross: Key = ("cross", primitive.target, primitive.logits, axis, primitive.entropy)
    if not isinstance(primitive, Divergence) or not primitive.entropy:
        return [normaliser, (cross, -1.0)]
    return [normaliser, (cross, 1.0), (("lse", primitive.target, axis), -1.0)]
