"""Trained masks over a model's parts, the constraint that makes them close some of it, and how a run starts with them.

Formulas: TinyCLIP's released code (CoFi's hard-concrete masks), written out in docs/tinyclip.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.inheritance import hard_concrete
from clipdistill.models.inheritance.gates import GatedTower, TowerGates, gateable_copy
from clipdistill.models.inheritance.parts import TransformerSizes, tower_sizes, transformer_sizes
from clipdistill.models.mask_config import MaskConfig


def prunable(sizes: TransformerSizes) -> int:
    """The number of weights that masks can remove: attention and MLP matrices, without biases, norms and embeddings."""
    return sizes.width * (4 * sizes.head_width * sum(sizes.heads) + 2 * sum(sizes.units))


class TowerMasks(nn.Module):
    """log alpha of one tower: "width" (width,) for all layers, "heads" and "mlp" of all layers one after the other."""

    def __init__(self, sizes: TransformerSizes, initial: float, parts: Sequence[str]) -> None:
        super().__init__()
        self.sizes = sizes
        lengths = {"width": sizes.width, "heads": sum(sizes.heads), "mlp": sum(sizes.units)}
        self.log_alpha = nn.ParameterDict({part: nn.Parameter(torch.full((lengths[part],), initial)) for part in parts})
        self.noise: dict[str, Tensor] = {}

    def draw(self, generator: torch.Generator) -> None:
        """New noise for the samples until the next call."""
        for part, values in self.log_alpha.items():
            self.noise[part] = hard_concrete.draw_noise(len(values), generator).to(values.device)

    def sampled(self) -> TowerGates:
        """Gates from the noise last drawn, with a gradient to log alpha."""
        return self._gates({p: hard_concrete.sample(v, self.noise[p]) for p, v in self.log_alpha.items()})

    def at_inference(self) -> TowerGates:
        """Gates without noise, without a gradient; one channel at least stays."""
        values = {part: value.detach() for part, value in self.log_alpha.items()}
        gates = {}
        for part, value in values.items():
            lengths = self._layer_lengths(part)
            layers = value.split(lengths)
            gates[part] = torch.cat(
                [hard_concrete.inference_mask(layer, keep=int(part == "width")) for layer in layers]
            )
        return self._gates(gates)

    def expected_size(self) -> Tensor:
        """Expected number of prunable weights that stay, with a gradient."""
        expected = {p: hard_concrete.probability_open(v).sum() for p, v in self.log_alpha.items()}
        width = expected.get("width", float(self.sizes.width))
        heads = expected.get("heads", float(sum(self.sizes.heads)))
        units = expected.get("mlp", float(sum(self.sizes.units)))
        # the sum over an outer product of two vectors is the product of their sums
        size = width * (4 * self.sizes.head_width * heads + 2 * units)
        return size if isinstance(size, Tensor) else torch.tensor(size)

    def _layer_lengths(self, part: str) -> list[int]:
        if part == "width":
            return [self.sizes.width]
        return list(self.sizes.heads if part == "heads" else self.sizes.units)

    def _gates(self, values: dict[str, Tensor]) -> TowerGates:
        heads, units = values.get("heads"), values.get("mlp")
        return TowerGates(
            width=values.get("width"),
            heads=None if heads is None else heads.split(self._layer_lengths("heads")),
            units=None if units is None else units.split(self._layer_lengths("mlp")),
        )


class Masks(nn.Module):
    """The masks of a model's towers and the places where they act."""

    def __init__(self, module: nn.Module, config: MaskConfig) -> None:
        """`module` must be one of `gateable_copy`."""
        super().__init__()
        self.towers = nn.ModuleDict(
            {
                tower: TowerMasks(transformer_sizes(module, tower), config.initial_log_alpha, config.parts)
                for tower in config.towers
            }
        )
        self._places = {tower: GatedTower(module, tower) for tower in config.towers}
        self.draw(0, 0)

    def tower(self, name: str) -> TowerMasks:
        """The masks of one tower."""
        masks = self.towers[name]
        assert isinstance(masks, TowerMasks)
        return masks

    def draw(self, seed: int, step: int) -> None:
        """New noise, a function of (seed, step) alone: the same on every rank and in every micro-batch of a step."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 8191 + 17)
        for name in self.towers:
            self.tower(name).draw(generator)

    @contextmanager
    def acting(self, sampled: bool) -> Iterator[None]:
        """Inside the context the model computes with masks: sampled ones, or those of inference."""
        with ExitStack() as stack:
            for name, place in self._places.items():
                masks = self.tower(name)
                stack.enter_context(place.holding(masks.sampled() if sampled else masks.at_inference()))
            yield

    @torch.no_grad()
    def clamp(self) -> None:
        """Keep every log alpha in [ln 0.01, ln 100]; called after each step."""
        for parameter in self.parameters():
            parameter.clamp_(hard_concrete.LOWEST, hard_concrete.HIGHEST)


class Constraint(nn.Module):
    """One-sided sparsity constraint: lambda1 max(0, t - e) + lambda2 max(0, t - e)^2, multipliers learned upwards.

    e is the expected sparsity, over both towers together (`joint`, the multipliers' mean counts) or for each its own; t
    rises linearly from `start` to the target. `reference` counts the prunable weights of each tower that are 100 %.
    """

    def __init__(self, masks: Masks, config: MaskConfig, reference: dict[str, int] | None = None) -> None:
        super().__init__()
        self.config = config
        sizes = {name: prunable(masks.tower(name).sizes) for name in masks.towers}
        self.reference = {name: (reference or sizes)[name] for name in sizes}
        self.multipliers = nn.ParameterDict(
            {name: nn.Parameter(torch.full((2,), config.initial_multiplier)) for name in sizes}
        )
        total = sum(self.reference.values())
        present = {name: 1 - sizes[name] / self.reference[name] for name in sizes}
        self.present = {"joint": 1 - sum(sizes.values()) / total} if config.joint else present
        for name, value in self.present.items():
            if self._final(name) <= value:
                raise InputError(
                    f"train.masks.sparsity={self._final(name)}: the student already lacks {value:.1%} of the "
                    "reference, so there is nothing to prune"
                )

    def _final(self, name: str) -> float:
        own = self.config.text_sparsity if name == "text" else None
        return self.config.sparsity if own is None else own

    def target(self, step: int, name: str = "joint") -> float:
        """t at an optimiser step (0-based), of one budget ("joint", or a tower's name)."""
        start = self.present[name] if self.config.start is None else self.config.start
        share = min(1.0, step / self.config.warmup_steps) if self.config.warmup_steps else 1.0
        return start + (self._final(name) - start) * share

    def expected(self, masks: Masks) -> dict[str, Tensor]:
        """Expected sparsity of each budget, with a gradient."""
        sizes = {name: masks.tower(name).expected_size() for name in masks.towers}
        if self.config.joint:
            return {"joint": 1 - torch.stack(list(sizes.values())).sum() / sum(self.reference.values())}
        return {name: 1 - size / self.reference[name] for name, size in sizes.items()}

    def penalty(self, masks: Masks, step: int) -> Tensor:
        """The constraint's term, a scalar with gradients to log alpha and the multipliers."""
        total: Any = 0.0
        for name, expected in self.expected(masks).items():
            every = torch.stack(list(self.multipliers.values()))
            multipliers = every.mean(0) if name == "joint" else self.multipliers[name]
            missing = (self.target(step, name) - expected).clamp_min(0)
            total = total + multipliers[0] * missing + multipliers[1] * missing.square()
        assert isinstance(total, Tensor)
        return total

    def add_gradients(self, masks: Masks, step: int) -> None:
        """Add the penalty's gradients to those of masks and multipliers.

        Outside the backward pass of the objective: the penalty is the same on every rank, and must not be averaged or
        counted once for each micro-batch.
        """
        parameters = [*masks.parameters(), *self.parameters()]
        gradients = torch.autograd.grad(self.penalty(masks, step), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def reference_counts(module: nn.Module, architecture: dict[str, Any], towers: Sequence[str]) -> dict[str, int]:
    """The prunable weights of each tower of the model that counts as 100 %."""
    counts = {}
    for tower in towers:
        sizes = tower_sizes(module, tower, architecture)
        if not isinstance(sizes, TransformerSizes):
            raise InputError(
                f"train.masks: the reference's {tower} tower is no plain open_clip transformer; name the model the "
                "student was inherited from as train.masks.reference"
            )
        counts[tower] = prunable(sizes)
    return counts


@dataclass
class Masking:
    """The masks of a run and their constraint. `masks` belong to the towers' forward pass, `constraint` does not."""

    config: MaskConfig
    masks: Masks
    constraint: Constraint

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for AdamW: masks, and multipliers that go uphill; neither decayed, scheduled nor clipped."""
        common = {"weight_decay": 0.0, "lr": self.config.learning_rate, "scheduled": False, "clipped": False}
        return [
            {"name": "masks", "params": list(self.masks.parameters()), **common},
            {"name": "multipliers", "params": list(self.constraint.parameters()), "maximize": True, **common},
        ]

    def state(self) -> nn.ModuleDict:
        """What a checkpoint stores of the masks."""
        return nn.ModuleDict({"masks": self.masks, "constraint": self.constraint})

    @torch.no_grad()
    def log(self, step: int) -> dict[str, float]:
        """Expected and wanted sparsity after `step` steps, and the multipliers, for the log."""
        values: dict[str, float] = {}
        for name, expected in self.constraint.expected(self.masks).items():
            values |= {f"{name}/expected": float(expected), f"{name}/target": self.constraint.target(step, name)}
        for name, multipliers in self.constraint.multipliers.items():
            values |= {f"{name}/lambda1": float(multipliers[0]), f"{name}/lambda2": float(multipliers[1])}
        return values


def start_masking(
    student: ClipModel, config: MaskConfig, reference: ClipModel | None, device: torch.device
) -> tuple[ClipModel, Masking]:
    """(the student with blocks that masks act on, its masks), both on `device`.

    `reference` is the model that is 100 %; None: the student as given. Raises InputError for towers without such blocks
    and a target that is reached already.
    """
    student = gateable_copy(student, config.towers)
    student.module.to(device)
    masks = Masks(student.module, config).to(device)
    counts = None
    if reference is not None:
        counts = reference_counts(reference.module, reference.architecture, config.towers)
    return student, Masking(config, masks, Constraint(masks, config, counts).to(device))
