"""From masks to a smaller model: fold the masks into the weights, then cut out what they close."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor

from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.inheritance.cut import write_sizes
from clipdistill.models.inheritance.gates import TowerGates
from clipdistill.models.inheritance.masks import Masks
from clipdistill.models.inheritance.parts import KeptTransformer, TransformerSizes, cut


def prune(model: ClipModel, masks: Masks) -> ClipModel:
    """The model without its closed channels, heads and MLP units; on the CPU.

    Its outputs equal those of `model` under `masks.acting(sampled=False)` up to float32 rounding. An ordinary model:
    save_model and load_model take it, with per-layer sizes in its architecture where layers differ.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in model.module.state_dict().items()}
    architecture = copy.deepcopy(model.architecture)
    kept: dict[str, KeptTransformer] = {}
    for tower in masks.towers:
        sizes = masks.tower(tower).sizes
        gates = _filled(masks.tower(tower).at_inference(), sizes)
        _fold(state, tower, sizes, *gates)
        kept[tower] = _open_parts(sizes, *gates)
        smaller = TransformerSizes(
            len(kept[tower].channels),
            sizes.head_width,
            tuple(len(heads) for heads in kept[tower].heads),
            tuple(len(units) for units in kept[tower].units),
        )
        write_sizes(architecture, tower, smaller)
    architecture = check_architecture(architecture, f"{model.name}, pruned")
    module = build_module(architecture)
    embedding = torch.arange(model.embed_dim)
    module.load_state_dict(cut(state, list(module.state_dict()), kept.get("image"), kept.get("text"), embedding))
    module.train(model.module.training)
    return dataclasses.replace(model, module=module, architecture=architecture)


Filled = tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]


def _filled(gates: TowerGates, sizes: TransformerSizes) -> Filled:
    """(width, heads, units) on the CPU, ones for parts without a mask."""
    width = torch.ones(sizes.width) if gates.width is None else gates.width.cpu()
    heads = tuple(torch.ones(n) for n in sizes.heads) if gates.heads is None else tuple(g.cpu() for g in gates.heads)
    units = tuple(torch.ones(n) for n in sizes.units) if gates.units is None else tuple(g.cpu() for g in gates.units)
    return width, heads, units


def _open_parts(
    sizes: TransformerSizes, width: Tensor, heads: tuple[Tensor, ...], units: tuple[Tensor, ...]
) -> KeptTransformer:
    return KeptTransformer(
        head_width=sizes.head_width,
        channels=width.nonzero().flatten(),
        layers=tuple(range(sizes.layers)),
        heads=tuple(gate.nonzero().flatten() for gate in heads),
        units=tuple(gate.nonzero().flatten() for gate in units),
    )


def _fold(
    state: dict[str, Tensor],
    tower: str,
    sizes: TransformerSizes,
    width: Tensor,
    heads: tuple[Tensor, ...],
    units: tuple[Tensor, ...],
) -> None:
    """Multiply the masks into the weights that write what they act on."""
    prefix = "visual." if tower == "image" else ("text." if "text.token_embedding.weight" in state else "")
    for layer in range(sizes.layers):
        block = f"{prefix}transformer.resblocks.{layer}."
        state[f"{block}attn.out_proj.weight"] *= heads[layer].repeat_interleave(sizes.head_width)
        state[f"{block}mlp.c_proj.weight"] *= units[layer]
        for name in ("attn.out_proj", "mlp.c_proj"):
            state[f"{block}{name}.weight"] *= width[:, None]
            state[f"{block}{name}.bias"] *= width
    if tower == "text":
        beginnings = ("token_embedding.weight", "positional_embedding")
    elif "visual.ln_pre.weight" in state:
        beginnings = ("ln_pre.weight", "ln_pre.bias")
    else:
        state["visual.conv1.weight"] *= width[:, None, None, None]
        beginnings = ("class_embedding", "positional_embedding")
    for name in beginnings:
        state[f"{prefix}{name}"] *= width
