"""Transformer blocks with a size of their own: any number of heads and MLP units in each layer.

open_clip gives all layers of a tower one width, and ties heads to it. A pruned tower has neither property, so the
attention and the MLP of its blocks are replaced by the two modules here; everything else, names of parameters included,
stays open_clip's. `gate` attributes let masks multiply what flows through (clipdistill.inheritance); a model that is
used or saved has none.

An architecture says so under the key `block_sizes`:

    {"image": {"head_width": 64, "heads": [12, 9, 0, ...], "mlp": [3072, 1800, 0, ...]}, "text": {...}}

with one entry per layer; a tower that is not named is open_clip's own. Zero heads (or units) leave the layer's output
bias alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.errors import InputError, nearest
from clipdistill.models.blocks import mixed_values
from clipdistill.models.known import BLOCK_SIZES, TOWERS

_FIELDS = ("head_width", "heads", "mlp")
_OTHER_BLOCKS = (
    "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc",
    "embed_cls"
)  # fmt: skip
_LARGEST = 1 << 18  # heads times head width, and MLP units: far above any published model


class SizedAttention(nn.Module):
    """Multi-head self-attention with `heads` heads of `head_width` over a stream of `width` channels.

    Parameters are named and laid out as in torch.nn.MultiheadAttention, which it equals up to rounding where heads *
    head_width is width. `head_gate` (heads,) multiplies each head's output, `output_gate` (width,) the result.
    """

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.width, self.heads, self.head_width = width, heads, head_width
        inner = heads * head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * inner, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner))
        self.out_proj = _linear(inner, width)
        nn.init.zeros_(self.out_proj.bias)
        if inner:
            nn.init.xavier_uniform_(self.in_proj_weight)
        self.head_gate: Tensor | None = None
        self.output_gate: Tensor | None = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """query (B, Q, width), key and value one tensor (B, K, width), as open_clip's blocks give them; `attn_mask`
        (Q, K) or (B x heads, Q, K) is added to the scores."""
        if self.heads == 0:
            # (B, Q, 0), computed all the same: its parameters stay a part of the graph
            context = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias)
        else:
            mixed = mixed_values(query, key, self.in_proj_weight, self.in_proj_bias, self.heads, attn_mask)
            if self.head_gate is not None:
                mixed = mixed * self.head_gate.to(mixed.dtype).view(-1, 1, 1)
            context = mixed.transpose(1, 2).flatten(2)
        output = self.out_proj(context)
        return (output if self.output_gate is None else output * self.output_gate.to(output.dtype)), None


class SizedMlp(nn.Module):
    """open_clip's MLP with `units` hidden units. `unit_gate` (units,) multiplies them, `output_gate` the result."""

    def __init__(self, width: int, units: int, activation: nn.Module) -> None:
        super().__init__()
        self.c_fc = _linear(width, units)
        self.gelu = activation
        self.c_proj = _linear(units, width)
        self.unit_gate: Tensor | None = None
        self.output_gate: Tensor | None = None

    def forward(self, stream: Tensor) -> Tensor:
        """(B, L, width) -> (B, L, width)."""
        hidden = self.gelu(self.c_fc(stream))
        if self.unit_gate is not None:
            hidden = hidden * self.unit_gate.to(hidden.dtype)
        output = self.c_proj(hidden)
        return output if self.output_gate is None else output * self.output_gate.to(output.dtype)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """nn.Linear, without its warning that a layer of no weights needs no initial ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return nn.Linear(inputs, outputs)


def check_block_sizes(values: Any, vision: Mapping[str, Any], text: Mapping[str, Any], where: str) -> None:
    """Raise InputError unless `values` is a valid entry `block_sizes` of an architecture with these towers."""
    if not isinstance(values, dict) or not values:
        raise InputError(f"{where}: '{BLOCK_SIZES}' must be a mapping with 'image' or 'text', got {values!r:.200}")
    for tower, sizes in values.items():
        if tower not in TOWERS:
            raise InputError(f"{where}: {BLOCK_SIZES}: unknown key '{tower}'{nearest(str(tower), TOWERS)}")
        config = vision if tower == "image" else text
        if not isinstance(sizes, dict) or set(sizes) != set(_FIELDS):
            raise InputError(
                f"{where}: {BLOCK_SIZES}: {tower} must have exactly the keys {', '.join(_FIELDS)}, got {sizes!r:.200}"
            )
        foreign = config.get("timm_model_name") or config.get("hf_model_name")
        if foreign or not isinstance(config.get("layers", 12), int):
            raise InputError(
                f"{where}: {BLOCK_SIZES}: the {tower} tower is no open_clip transformer, so it has no such blocks"
            )
        other = next((key for key in _OTHER_BLOCKS if config.get(key) not in (None, False, "default")), None)
        if other is not None:
            raise InputError(
                f"{where}: {BLOCK_SIZES}: the {tower} tower's '{other}' cannot be combined with sizes per block"
            )
        width = sizes["head_width"]
        if not _whole(width) or not 0 < width <= 16_384:
            raise InputError(
                f"{where}: {BLOCK_SIZES}: {tower}.head_width must be a number from 1 to 16384, got {width!r:.200}"
            )
        layers = config.get("layers", 12)
        for field, factor in (("heads", width), ("mlp", 1)):
            entries = sizes[field]
            if not isinstance(entries, list) or len(entries) != layers:
                raise InputError(
                    f"{where}: {BLOCK_SIZES}: {tower}.{field} must list one number for each of {layers} layers"
                )
            if not all(_whole(n) and 0 <= n * factor <= _LARGEST for n in entries):
                raise InputError(
                    f"{where}: {BLOCK_SIZES}: {tower}.{field} holds an impossible number: {entries!r:.200}"
                )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def split_block_sizes(architecture: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture that open_clip can build, block sizes) of an architecture; the sizes are empty where it has none.

    open_clip is asked for one head as wide as the stream and the smallest MLP, because it cannot build the real ones.
    """
    plain = copy.deepcopy(dict(architecture))
    sizes = plain.pop(BLOCK_SIZES, {})
    for tower in sizes:
        config = plain["vision_cfg" if tower == "image" else "text_cfg"]
        width = config.get("width", 768 if tower == "image" else 512)
        if tower == "image":
            config["head_width"] = width
        else:
            config["heads"] = 1
        config["mlp_ratio"] = 1.0
    return plain, sizes


def size_blocks(module: nn.Module, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the blocks of a module that open_clip built from `split_block_sizes` their own attention and MLP."""
    for tower, values in sizes.items():
        for block, heads, units in zip(blocks_of(module, tower), values["heads"], values["mlp"], strict=True):
            width = block.ln_1.normalized_shape[0]
            block.attn = SizedAttention(width, heads, values["head_width"])
            block.mlp = SizedMlp(width, units, block.mlp.gelu)


def blocks_of(module: nn.Module, tower: str) -> Iterator[Any]:
    """The transformer blocks of one tower of an open_clip model, in order."""
    owner: Any = module.visual if tower == "image" else getattr(module, "text", module)
    yield from owner.transformer.resblocks
