"""Number formats of stored embeddings: fp16, bf16, or int8 with one scale for every 64 elements of a row.

int8 is symmetric: scale = max |x| of the group / 127, stored value = round(x / scale), so each element is off by at
most half its group's scale. Groups, because CLIP embeddings have a few elements many times larger than the rest: with
one scale a row those take the whole range (docs/performance/cache.md). fp16 rounds each element to 11 significant bits,
bf16 to 8.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.names import Dtype

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
COSINE_FLOOR = {"fp16": 0.9999, "bf16": 0.9995, "int8": 0.999}
"""Least cosine between a stored row and the same row computed again, by number format."""


GROUP = 64
"""Elements that share an int8 scale; the last group of a row may be shorter."""


def groups(dim: int) -> int:
    """Number of int8 scales of a row."""
    return -(-dim // GROUP)


def row_bytes(dtype: Dtype, dim: int) -> int:
    """Bytes one stored row takes, its scales included."""
    return dim + 2 * groups(dim) if dtype == "int8" else 2 * dim


def pack(rows: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor | None]:
    """Float rows (..., D) -> stored values (..., D) and, for int8, float16 scales (..., groups)."""
    rows = rows.float().cpu()
    if dtype != "int8":
        return rows.to(TORCH_DTYPE[dtype]), None
    dim = rows.shape[-1]
    padded = torch.nn.functional.pad(rows, (0, groups(dim) * GROUP - dim)).unflatten(-1, (groups(dim), GROUP))
    scale = (padded.abs().amax(-1) / 127).half()
    # divided by the scale as it is stored; a group too small for any scale is stored as zeros
    values = (rows / _spread(scale, dim).clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(-127, 127)
    return (values * (_spread(scale, dim) > 0)).to(torch.int8), scale


def unpack(values: np.ndarray, scale: np.ndarray | None, dtype: Dtype) -> Tensor:
    """Stored values (..., D) as read from a block (bf16 as uint16) -> float32 (..., D)."""
    values = np.ascontiguousarray(values)
    if dtype == "bf16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    rows = torch.from_numpy(values).float()
    return rows if scale is None else scaled(rows, torch.from_numpy(np.ascontiguousarray(scale)))


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Float values (..., D) times the scales (..., groups) of their groups."""
    return values * _spread(scale, values.shape[-1])


def _spread(scale: Tensor, dim: int) -> Tensor:
    """The scale of each element."""
    return scale.float().repeat_interleave(GROUP, -1)[..., :dim]
