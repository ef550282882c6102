"""Embeddings in, named normalised matrices out: what every engine and every term reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipdistill.errors import InputError


@dataclass(frozen=True)
class Embeddings:
    """What one model made of a batch.

    image, text: (N, D), rows need not be normalised. With an ensemble of K teachers the blocks lie side by side,
        (N, D_1 + ... + D_K), and `blocks` = (D_1, ..., D_K).
    logit_scale: the multiplier itself (already exponentiated), a number or 0-dimensional tensor; for an ensemble (K,).
    logit_bias: added to the logits by sigmoid losses; a number or tensor of the shape of logit_scale.
    synthetic_text: (N, D), embeddings of one generated caption per image (MobileCLIP).
    """

    image: Tensor
    text: Tensor
    logit_scale: Tensor | float | Sequence[float]
    logit_bias: Tensor | float | Sequence[float] | None = None
    synthetic_text: Tensor | None = None
    blocks: Sequence[int] | None = None


@dataclass(frozen=True)
class Features:
    """Local rows and scalars by name; see `pairings.py` for the names.

    matrices: (n_local, D), L2-normalised, all of one floating type (float32 or float64).
    scales: 0-dimensional tensors of the same type: multipliers and biases.
    """

    matrices: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]


def check(who: str, embeddings: Embeddings, width: int) -> int:
    """The number of rows, or an InputError that names what does not fit together."""
    rows = embeddings.image.shape[0]
    for part in ("image", "text", "synthetic_text"):
        matrix = getattr(embeddings, part)
        if matrix is None:
            continue
        if matrix.ndim != 2 or tuple(matrix.shape) != (rows, width):
            raise InputError(
                f"the {who}'s {part} embeddings have shape {tuple(matrix.shape)}, expected ({rows}, {width}): "
                f"{'student_dim' if who == 'student' else 'teacher_dim'} of the objective is {width}"
            )
        if not matrix.is_floating_point():
            raise InputError(f"the {who}'s {part} embeddings are of type {matrix.dtype}, expected floating point")
    if embeddings.blocks is not None and sum(embeddings.blocks) != width:
        raise InputError(f"the {who}'s blocks {tuple(embeddings.blocks)} add up to {sum(embeddings.blocks)}, not {width}")
    return rows


def working_dtype(*embeddings: Embeddings | None) -> torch.dtype:
    """The precision of the similarity arithmetic: float64 if anything given is, float32 otherwise."""
    dtype = torch.float32
    for given in embeddings:
        for matrix in () if given is None else (given.image, given.text):
            dtype = torch.promote_types(dtype, matrix.dtype)
    return dtype


def normalised(matrix: Tensor) -> Tensor:
    """Rows divided by their Euclidean length."""
    return F.normalize(matrix, dim=-1)


def project(layer: torch.nn.Linear, matrix: Tensor) -> Tensor:
    """layer(matrix) in the precision of `matrix`, whatever the layer's own."""
    bias = None if layer.bias is None else layer.bias.to(matrix.dtype)
    return F.linear(matrix, layer.weight.to(matrix.dtype), bias)


def scalars(name: str, value: Tensor | float | Sequence[float], count: int, like: Tensor) -> list[Tensor]:
    """`count` 0-dimensional tensors of the type and place of `like` from a number, tensor or list.

    A single number serves all; any other length is an InputError.
    """
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    flat = tensor.to(device=like.device, dtype=like.dtype).reshape(-1)
    if len(flat) not in (1, count):
        raise InputError(f"{name} has {len(flat)} values for {count} teacher{'s' if count > 1 else ''}: give one, or one each")
    return [flat[k if len(flat) > 1 else 0] for k in range(count)]


def blocks_of(embeddings: Embeddings) -> tuple[int, ...]:
    """Widths of the ensemble's blocks; one block when none are stated."""
    return tuple(embeddings.blocks) if embeddings.blocks else (embeddings.image.shape[1],)
