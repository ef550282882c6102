"""The page's pixels are those of the evaluation transform: at most two levels of 255 apart.

Pillow 13 resizes the longer reduction first, as the page does; older versions always across first.
"""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch
from PIL import Image

from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, normalise, render_pixels

CODE = """
import { normalised, square } from "./picture.js";
const main = (cases) => cases.map(({ pixels, width, height, spec }) => {
  const rgb = square(new Uint8Array(Buffer.from(pixels, "base64")), width, height, spec);
  return [Buffer.from(rgb).toString("base64"), Buffer.from(normalised(rgb, spec).buffer).toString("base64")];
});
"""
SIZES = [(50, 40), (40, 50), (32, 32), (31, 33), (7, 300), (300, 7), (1, 1), (2, 5), (333, 500), (640, 427), (33, 32)]


def picture(width: int, height: int) -> Image.Image:
    """Edges, slopes and noise."""
    rng = np.random.default_rng(width * 1000 + height)
    values = rng.integers(0, 256, (height, width, 3))
    values[: height // 2] = 255 * (np.arange(width)[None, :, None] // 3 % 2)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pixels(node, mode, interpolation):
    spec = ImageSpec(size=32, resize_mode=mode, interpolation=interpolation)
    # of narrow strips that are squashed, the order decides what is cut off between the two passes
    pictures = [picture(w, h) for w, h in SIZES if mode != "squash" or max(w, h) < 10 * min(w, h)]
    cases = [
        {
            "pixels": base64.b64encode(p.convert("RGBA").tobytes()).decode(),
            "width": p.width,
            "height": p.height,
            "spec": spec.model_dump(),
        }
        for p in pictures
    ]
    for one, (pixels, values) in zip(pictures, node(CODE, cases), strict=True):
        found = np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(32, 32, 3)
        differences = np.abs(found.astype(int) - render_pixels(one, EVALUATION_VIEW, spec).astype(int))
        assert differences.mean() < 0.4, one.size
        assert np.quantile(differences, 0.99) <= 2, one.size
        numbers = np.frombuffer(base64.b64decode(values), np.float32).reshape(3, 32, 32)
        assert np.array_equal(numbers, normalise(torch.tensor(found), spec).numpy())
