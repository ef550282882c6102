"""Views as arrays of a block: box, flip and colour operations, restored to exactly what was drawn."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.blocks import Block
from clipdistill.data.views import View

_NO_BOX = (-1, -1, -1, -1)
_NO_OPERATION = 255


def pack_views(samples: Sequence[Sequence[View]], count: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a block of views; a sample with no views (it could not be read) gets evaluation views.

    box int32 (n, k, 4): top, left, height, width in source pixels, -1 for the evaluation view; flip uint8 (n, k);
    operation uint8 (n, k, m): index into the list `operations` of the metadata, 255 for none; magnitude float64.
    """
    filled = [list(views) or [View()] * count for views in samples]
    names = sorted({name for views in filled for view in views for name, _ in view.operations})
    most = max((len(view.operations) for views in filled for view in views), default=0)
    shape = (len(filled), count)
    box = np.full((*shape, 4), _NO_BOX, dtype=np.int32)
    flip = np.zeros(shape, dtype=np.uint8)
    operation = np.full((*shape, most), _NO_OPERATION, dtype=np.uint8)
    magnitude = np.zeros((*shape, most), dtype=np.float64)
    for i, views in enumerate(filled):
        for j, view in enumerate(views):
            box[i, j] = view.box or _NO_BOX
            flip[i, j] = view.flip
            for m, (name, value) in enumerate(view.operations):
                operation[i, j, m] = names.index(name)
                magnitude[i, j, m] = value
    arrays = {"box": box, "flip": flip, "operation": operation, "magnitude": magnitude}
    return {k: torch.from_numpy(v) for k, v in arrays.items()}, {"operations": json.dumps(names)}


def read_view(block: Block, sample: int, view: int) -> View:
    """View number `view` (from 1) of the block's sample `sample`."""
    arrays: Mapping[str, np.ndarray] = block.arrays
    box = tuple(int(v) for v in arrays["box"][sample, view - 1])
    names = json.loads(block.metadata["operations"])
    chosen = arrays["operation"][sample, view - 1].tolist()
    values = arrays["magnitude"][sample, view - 1].tolist()
    operations = tuple((names[i], value) for i, value in zip(chosen, values) if i != _NO_OPERATION)
    flip = bool(arrays["flip"][sample, view - 1])
    return View(None if box[0] < 0 else (box[0], box[1], box[2], box[3]), flip, operations)
