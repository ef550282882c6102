"""Which channels, heads and units of a teacher matter most, judged by its weights alone.

A part's importance is the size of what can pass through it:

* a head: Frobenius norm of its value projection times that of its output projection;
* an MLP unit: norm of its input weights, times the gain of the norm before them, times that of its output weights;
* a channel of a transformer's stream: over all layers, the squared weights that write the channel (attention output,
  MLP output) and those that read it (attention input, MLP input, with the norm's gain), each of the four families
  divided by its mean over the channels, so that none outweighs the others;
* a dimension of the joint embedding: norm of its column in the image projection times that in the text projection;
* a channel of a ResNet: absolute gain of the batch normalisation after it, summed over all that write the same channel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clipdistill.models.inheritance.parts import ResNetSizes, TransformerSizes

Weights = Mapping[str, Tensor]


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; of equal scores the earlier index stays."""
    return torch.argsort(scores.double(), descending=True, stable=True)[:count].sort().values.cpu()


def channel_scores(weights: Weights, prefix: str, sizes: TransformerSizes) -> Tensor:
    """(width,) importance of a transformer's channels; `prefix` ends before 'resblocks'."""
    total = torch.zeros(sizes.width, dtype=torch.float64)
    families = [torch.zeros_like(total) for _ in range(4)]
    for layer in range(sizes.layers):
        block = f"{prefix}resblocks.{layer}."
        gains = [weights[f"{block}{norm}.weight"].double().cpu() for norm in ("ln_1", "ln_2")]
        families[0] += _squares(weights[f"{block}attn.out_proj.weight"], 1)
        families[1] += _squares(weights[f"{block}mlp.c_proj.weight"], 1)
        families[2] += _squares(weights[f"{block}attn.in_proj_weight"], 0) * gains[0].square()
        families[3] += _squares(weights[f"{block}mlp.c_fc.weight"], 0) * gains[1].square()
    for family in families:
        total += family / family.mean().clamp_min(1e-30)
    return total


def head_scores(weights: Weights, prefix: str, layer: int, sizes: TransformerSizes) -> Tensor:
    """(heads,) importance of the heads of one layer."""
    heads, inner = sizes.heads[layer], sizes.heads[layer] * sizes.head_width
    block = f"{prefix}resblocks.{layer}.attn."
    values = weights[f"{block}in_proj_weight"][2 * inner :].double().cpu()
    outputs = weights[f"{block}out_proj.weight"].double().cpu()
    value_norm = values.reshape(heads, sizes.head_width, -1).square().sum((1, 2))
    output_norm = outputs.T.reshape(heads, sizes.head_width, -1).square().sum((1, 2))
    return (value_norm * output_norm).sqrt()


def unit_scores(weights: Weights, prefix: str, layer: int) -> Tensor:
    """(units,) importance of the MLP units of one layer."""
    block = f"{prefix}resblocks.{layer}."
    gain = weights[f"{block}ln_2.weight"].double().cpu()
    inputs = (weights[f"{block}mlp.c_fc.weight"].double().cpu() * gain).square().sum(1)
    return (inputs * _squares(weights[f"{block}mlp.c_proj.weight"], 0)).sqrt()


def embedding_scores(image: Tensor, text: Tensor) -> Tensor:
    """(embedding,) from the two projections, (inputs, embedding) each."""
    return (_squares(image, 0) * _squares(text, 0)).sqrt()


def gains(weights: Weights, *names: str) -> Tensor:
    """Summed absolute gains of batch normalisations over the same channels."""
    return torch.stack([weights[f"{name}.weight"].double().cpu().abs() for name in names]).sum(0)


def stream_scores(weights: Weights, stage: int, sizes: ResNetSizes) -> Tensor:
    """(channels,) importance of the stream of one ResNet stage (0 to 3)."""
    names = [f"visual.layer{stage + 1}.{block}.bn3" for block in range(sizes.layers[stage])]
    return gains(weights, f"visual.layer{stage + 1}.0.downsample.1", *names)


def pooling_head_scores(weights: Weights, sizes: ResNetSizes) -> Tensor:
    """(heads,) importance of the heads of a ResNet's attention pooling."""
    shape = (sizes.heads, sizes.head_width, -1)
    values = weights["visual.attnpool.v_proj.weight"].double().cpu().reshape(shape).square().sum((1, 2))
    outputs = weights["visual.attnpool.c_proj.weight"].double().cpu().T.reshape(shape).square().sum((1, 2))
    return (values * outputs).sqrt()


def _squares(weight: Tensor, axis: int) -> Tensor:
    return weight.double().cpu().square().sum(axis)
