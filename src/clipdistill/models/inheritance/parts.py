"""What a tower is made of, and cutting the weights of a smaller tower out of a larger one.

A selection (`KeptTransformer`, `KeptResNet`) names the layers, channels, heads and MLP units that stay, as indices
into the larger tower. Every tensor's axes are known by its name ("channels", "units", ...), so one function cuts all of
them; manual inheritance and the pruning of masked models share it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError
from clipdistill.models.known import table
from clipdistill.models.sized import SizedAttention, blocks_of


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of an open_clip transformer tower; `heads` and `units` (of the MLP) per layer."""

    width: int
    head_width: int
    heads: tuple[int, ...]
    units: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.heads)


@dataclass(frozen=True)
class ResNetSizes:
    """Sizes of CLIP's ResNet: stem width, blocks of each stage, heads of the attention pooling."""

    width: int
    layers: tuple[int, ...]
    head_width: int

    @property
    def heads(self) -> int:
        return self.width * 32 // self.head_width


@dataclass(frozen=True)
class KeptTransformer:
    """What stays of a transformer tower: indices, ascending; `heads` and `units` for each kept layer."""

    head_width: int
    channels: Tensor
    layers: tuple[int, ...]
    heads: tuple[Tensor, ...]
    units: tuple[Tensor, ...]


@dataclass(frozen=True)
class KeptBlock:
    """What stays inside one bottleneck of a ResNet: its index in the larger stage, and its two inner widths."""

    source: int
    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class KeptResNet:
    """What stays of a ResNet tower: three stem convolutions, each stage's stream and blocks, heads of the pooling."""

    head_width: int
    stem: tuple[Tensor, Tensor, Tensor]
    streams: tuple[Tensor, ...]
    blocks: tuple[tuple[KeptBlock, ...], ...]
    heads: Tensor


Kept = KeptTransformer | KeptResNet


def transformer_sizes(module: nn.Module, tower: str) -> TransformerSizes:
    """Sizes of a transformer tower of an open_clip model (on any device, meta included).

    Raises InputError for towers with other blocks than open_clip's plain ones.
    """
    from open_clip.transformer import ResidualAttentionBlock

    heads, units, widths = [], [], set()
    width = 0
    for block in blocks_of(module, tower):
        if type(block) is not ResidualAttentionBlock:
            raise InputError(f"the {tower} tower has blocks of the kind {type(block).__name__}, which cannot be cut")
        width = block.ln_1.normalized_shape[0]
        attention = block.attn
        if isinstance(attention, SizedAttention):
            heads.append(attention.heads)
            widths.add(attention.head_width)
        else:
            heads.append(attention.num_heads)
            widths.add(attention.head_dim)
        units.append(block.mlp.c_fc.out_features)
    return TransformerSizes(width, widths.pop(), tuple(heads), tuple(units))


def tower_sizes(
    module: nn.Module, tower: str, architecture: Mapping[str, Any]
) -> TransformerSizes | ResNetSizes | None:
    """Sizes of one tower, or None for a tower that can only be taken whole (timm, Hugging Face, other blocks)."""
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.transformer import VisionTransformer

    visual: Any = getattr(module, "visual", None)
    if "vision_cfg" not in architecture:
        return None
    if tower == "image" and isinstance(visual, ModifiedResNet):
        vision = architecture["vision_cfg"]
        return ResNetSizes(vision.get("width", 768), tuple(vision["layers"]), vision.get("head_width", 64))
    if tower == "image" and (not isinstance(visual, VisionTransformer) or visual.attn_pool is not None):
        return None
    text: Any = getattr(module, "text", module)
    if tower == "text" and (not hasattr(text, "token_embedding") or getattr(text, "cls_emb", None) is not None):
        return None
    try:
        return transformer_sizes(module, tower)
    except InputError:
        return None


_AXES = table("axes")
"""What the axes of every tensor are, by its name: in a block, else in a transformer tower, in a ResNet's pooling."""
_BLOCK = re.compile(r"^((?:visual\.|text\.)?transformer\.resblocks\.)(\d+)\.(.+)$")
_BOTTLENECK = re.compile(r"^visual\.layer([1-4])\.(\d+)\.(conv|bn)([123])\.(\w+)$")
_DOWNSAMPLE = re.compile(r"^visual\.layer([1-4])\.(\d+)\.downsample\.([01])\.(\w+)$")
_STEM = re.compile(r"^visual\.(conv|bn)([123])\.(\w+)$")


def cut(
    larger: Mapping[str, Tensor],
    smaller_names: Iterator[str] | list[str],
    image: Kept | None,
    text: KeptTransformer | None,
    embedding: Tensor,
) -> dict[str, Tensor]:
    """The tensors called `smaller_names` of the smaller model, cut out of the state dictionary of the larger one.

    `image` or `text` None: that tower is taken whole. `embedding` holds the kept dimensions of the joint embedding.
    """
    result = {}
    for name in smaller_names:
        kept = image if name.startswith("visual.") else text
        axes: tuple[Tensor | None, ...]
        if name in ("logit_scale", "logit_bias") or kept is None:
            source, axes = name, ()
        elif isinstance(kept, KeptTransformer):
            source, axes = _transformer_axes(name, kept, larger, embedding)
        else:
            source, axes = _resnet_axes(name, kept, embedding)
        tensor = larger[source]
        for axis, index in enumerate(axes):
            if index is not None:
                tensor = tensor.index_select(axis, index.to(tensor.device))
        result[name] = tensor.detach().clone()
    return result


Axes = tuple[Tensor | None, ...]


def _transformer_axes(
    name: str, kept: KeptTransformer, larger: Mapping[str, Tensor], embedding: Tensor
) -> tuple[str, Axes]:
    """(name in the larger model, kept indices along each axis) of a tensor of the smaller model."""
    block = _BLOCK.match(name)
    if block is None:
        axes = _AXES["transformer"][name.removeprefix("text.")]
        source, index = name, {"channels": kept.channels, "embedding": embedding}
    else:
        prefix, number, rest = block[1], int(block[2]), block[3]
        axes = _AXES["block"][rest]
        source = f"{prefix}{kept.layers[number]}.{rest}"
        rows = head_rows(kept.heads[number], kept.head_width)
        inner = larger[f"{prefix}{kept.layers[number]}.attn.out_proj.weight"].shape[1]
        index = {
            "channels": kept.channels,
            "units": kept.units[number],
            "heads": rows,
            "qkv": torch.cat([rows, rows + inner, rows + 2 * inner]),
        }
    return source, tuple(None if axis is None else index[axis] for axis in axes)


def head_rows(heads: Tensor, head_width: int) -> Tensor:
    """Rows of the concatenated heads that belong to `heads`: (n,) -> (n * head_width,)."""
    return (heads[:, None] * head_width + torch.arange(head_width)).reshape(-1)


def _resnet_axes(name: str, kept: KeptResNet, embedding: Tensor) -> tuple[str, Axes]:
    """(name in the larger model, kept indices along each axis) of a tensor of the smaller ResNet."""
    if name.endswith("num_batches_tracked") and not _BOTTLENECK.match(name) and not _DOWNSAMPLE.match(name):
        return name, ()
    stem = _STEM.match(name)
    if stem is not None:
        number = int(stem[2]) - 1
        before = None if number == 0 else kept.stem[number - 1]
        return name, _convolution(stem[1], kept.stem[number], before)
    bottleneck = _BOTTLENECK.match(name) or _DOWNSAMPLE.match(name)
    if bottleneck is None:
        index = {"input": kept.streams[-1], "heads": head_rows(kept.heads, kept.head_width), "embedding": embedding}
        axes = _AXES["resnet"][name.removeprefix("visual.")]
        return name, tuple(None if axis is None else index[axis] for axis in axes)
    stage, number = int(bottleneck[1]) - 1, int(bottleneck[2])
    block = kept.blocks[stage][number]
    source = name.replace(f"layer{stage + 1}.{number}.", f"layer{stage + 1}.{block.source}.", 1)
    if name.endswith("num_batches_tracked"):
        return source, ()
    stream = kept.streams[stage]
    entering = stream if number else (kept.streams[stage - 1] if stage else kept.stem[2])
    if ".downsample." in name:
        return source, _convolution("conv" if bottleneck[3] == "0" else "bn", stream, entering)
    layer = int(bottleneck[4])
    inputs, outputs = ((entering, block.first), (block.first, block.second), (block.second, stream))[layer - 1]
    return source, _convolution(bottleneck[3], outputs, inputs)


def _convolution(kind: str, outputs: Tensor, inputs: Tensor | None) -> Axes:
    """Axes of a convolution's weight, or of a vector of the batch normalisation after it."""
    return (outputs, inputs) if kind == "conv" else (outputs,)
