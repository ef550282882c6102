"""Number formats of stored embeddings: fp16, bf16, or int8 with one scale a row.

int8 is symmetric: scale = max |x| of the row / 127, stored value = round(x / scale), so each element is off by at most
half a scale. For unit rows of a few hundred dimensions that is a cosine of about 0.99997 (docs/cache.md has what was
measured). fp16 rounds each element to 11 significant bits, bf16 to 8.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Dtype = Literal["fp16", "bf16", "int8"]

TORCH_DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}
COSINE_FLOOR = {"fp16": 0.9999, "bf16": 0.9995, "int8": 0.999}
"""Least cosine between a stored row and the same row computed again, by number format."""


def row_bytes(dtype: Dtype, dim: int) -> int:
    """Bytes one stored row takes, its scale included."""
    return dim + 4 if dtype == "int8" else 2 * dim


def pack(rows: Tensor, dtype: Dtype) -> tuple[Tensor, Tensor | None]:
    """Float rows (..., D) -> stored values (..., D) and, for int8, float32 scales (...)."""
    rows = rows.float().cpu()
    if dtype != "int8":
        return rows.to(TORCH_DTYPE[dtype]), None
    scale = rows.abs().amax(-1) / 127
    values = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).round().clamp(-127, 127)
    return values.to(torch.int8), scale


def unpack(values: np.ndarray, scale: np.ndarray | None, dtype: Dtype) -> Tensor:
    """Stored values (..., D) as read from a block (bf16 as uint16) -> float32 (..., D)."""
    values = np.ascontiguousarray(values)
    if dtype == "bf16":
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).float()
    rows = torch.from_numpy(values).float()
    if scale is not None:
        rows *= torch.from_numpy(np.ascontiguousarray(scale)).unsqueeze(-1)
    return rows
