"""How large a store becomes, before anything is computed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from clipdistill.cache.names import Dtype
from clipdistill.cache.rows import row_bytes
from clipdistill.errors import StorageError
from clipdistill.runtime.console import file_size

VIEW_BYTES = 4 * 4 + 1 + 2 * 9
"""One stored view with two colour operations: box, flip, and a name and magnitude for each operation."""
INDEX_BYTES = 64
"""Key, digest and counters of one sample in the table of samples (keys of about 30 characters)."""


def sample_bytes(dims: Sequence[int], dtype: Dtype, views: int, captions: float) -> float:
    """Bytes one image takes: 1 + `views` image rows and `captions` text rows for each teacher, and the views.

    dims: embedding width of each teacher; captions: texts an image, real and synthetic.
    """
    rows = 1 + views + captions
    return sum(rows * row_bytes(dtype, dim) for dim in dims) + views * VIEW_BYTES + INDEX_BYTES


def check_space(folder: Path, needed: int, merged: Path | None = None) -> None:
    """Raises StorageError when `needed` bytes (and a reserve of 2 %) do not fit on the disk of `folder`.

    merged: the name that a merged store gets in the end.
    """
    free = shutil.disk_usage(folder).free
    wanted = needed * 1.02 + 1_000_000
    if free < wanted:
        less = "" if merged else ", or store less (--dtype int8 halves it; fewer --views; --captions first)"
        raise StorageError(
            f"{merged or folder}: the cache needs {file_size(wanted)} more, with a reserve, and {file_size(free)} are "
            f"free: make room, or choose another disk{less}"
        )
