"""Where masks act in a model: gates on everything that writes to a tower's stream, and norms over what is left.

The stream's channel c is multiplied by z_c wherever something is written to it (the embeddings at its start, each
attention and each MLP), so a closed channel is zero throughout; layer norms take mean and variance over open channels.
A model with open gates, or none, computes what it always did.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.inheritance.parts import TransformerSizes, tower_sizes
from clipdistill.models.known import BLOCK_SIZES
from clipdistill.models.sized import SizedAttention, SizedMlp, blocks_of


class OpenLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels that `gate` (width,) leaves open; closed ones come out as 0. None: all are open.

    Computed with the closed channels masked instead of removed: shapes stay the same whatever the mask is.
    """

    gate: Tensor | None = None

    def forward(self, stream: Tensor) -> Tensor:
        """(..., width) -> (..., width), in the format of the input."""
        if self.gate is None:
            return nn.functional.layer_norm(stream, self.normalized_shape, self.weight, self.bias, self.eps).to(stream)
        is_open = (self.gate != 0).float()
        count = is_open.sum()
        values = stream.float()
        centred = (values - (values * is_open).sum(-1, keepdim=True) / count) * is_open
        variance = centred.square().sum(-1, keepdim=True) / count
        normal = centred * torch.rsqrt(variance + self.eps)
        return (normal * self.weight + self.bias * is_open).to(stream.dtype)


class StreamGate:
    """A hook on a tower's transformer that multiplies the stream where it begins."""

    def __init__(self) -> None:
        self.gate: Tensor | None = None

    def __call__(self, transformer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.gate is None:
            return None
        stream, *rest = arguments
        return (stream * self.gate.to(stream.dtype), *rest)


@dataclasses.dataclass(frozen=True)
class TowerGates:
    """Values of all gates of one tower: (width,), and (heads,), (units,) for each layer; None: open."""

    width: Tensor | None
    heads: tuple[Tensor, ...] | None
    units: tuple[Tensor, ...] | None


class GatedTower:
    """The places in one tower of a model that gates act on."""

    def __init__(self, module: nn.Module, tower: str) -> None:
        owner: Any = module.visual if tower == "image" else getattr(module, "text", module)
        self.stream = StreamGate()
        owner.transformer.register_forward_pre_hook(self.stream)
        outer = ("ln_pre", "ln_post") if tower == "image" else ("ln_final",)
        self.norms = [_open_norm(owner, name) for name in outer if isinstance(getattr(owner, name), nn.LayerNorm)]
        self.attention: list[SizedAttention] = []
        self.mlp: list[SizedMlp] = []
        for block in blocks_of(module, tower):
            self.norms += [_open_norm(block, "ln_1"), _open_norm(block, "ln_2")]
            self.attention.append(block.attn)
            self.mlp.append(block.mlp)

    def set(self, gates: TowerGates | None) -> None:
        """Put gates in place; None removes them."""
        width = None if gates is None else gates.width
        self.stream.gate = width
        for norm in self.norms:
            norm.gate = width
        heads = None if gates is None else gates.heads
        units = None if gates is None else gates.units
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            attention.output_gate = mlp.output_gate = width
            attention.head_gate = None if heads is None else heads[layer]
            mlp.unit_gate = None if units is None else units[layer]

    @contextmanager
    def holding(self, gates: TowerGates) -> Iterator[None]:
        """Gates in place inside the context. What was computed there keeps its gradient to them."""
        self.set(gates)
        try:
            yield
        finally:
            self.set(None)


def _open_norm(owner: Any, name: str) -> OpenLayerNorm:
    """Replace a norm by one with a gate that shares its parameters."""
    norm = getattr(owner, name)
    with torch.device("meta"):
        replaced = OpenLayerNorm(norm.normalized_shape, eps=norm.eps)
    replaced.weight, replaced.bias = norm.weight, norm.bias
    replaced.train(norm.training)
    setattr(owner, name, replaced)
    return replaced


def gateable_copy(model: ClipModel, towers: tuple[str, ...]) -> ClipModel:
    """`model` with the same weights and blocks that gates can act on, on the CPU; its outputs are equal up to rounding.

    Raises InputError for towers that are not open_clip's plain transformers.
    """
    architecture = copy.deepcopy(model.architecture)
    blocks = architecture.setdefault(BLOCK_SIZES, {})
    for tower in towers:
        sizes = tower_sizes(model.module, tower, model.architecture)
        if not isinstance(sizes, TransformerSizes):
            raise InputError(
                f"train.masks: the {tower} tower of {model.name} is no plain open_clip transformer, so masks cannot "
                "act on it; leave it out with train.masks.towers"
            )
        blocks[tower] = {"head_width": sizes.head_width, "heads": list(sizes.heads), "mlp": list(sizes.units)}
    architecture = check_architecture(architecture, f"{model.name} with masks")
    module = build_module(architecture)
    module.load_state_dict(model.module.state_dict())
    module.train(model.module.training)
    return dataclasses.replace(model, module=module, architecture=architecture)
