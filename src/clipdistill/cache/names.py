"""How a cache is named where a teacher is expected; apart, so that reading a configuration loads little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from clipdistill.errors import InputError

PREFIX = "cache:"
Dtype = Literal["fp16", "bf16", "int8"]
"""Number formats of stored embeddings (see rows.py)."""


def is_cached(names: Sequence[str]) -> bool:
    """Whether a teacher is named as `cache:PATH`; it cannot stand beside other teachers."""
    cached = [name for name in names if name.startswith(PREFIX)]
    if cached and len(names) > 1:
        raise InputError(f"teacher '{cached[0]}': a cache stands alone; an ensemble is filled into one cache")
    return bool(cached)
