"""End to end: from a stored picture to its embedding, in one process, as a search index would be filled."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, render
from clipdistill.errors import InputError
from clipdistill.runtime.machine import wait_for


class Pipeline:
    """One call reads, decodes and transforms the next `batch` pictures of a source and runs the image tower.

    Pictures are taken in order and from the start again at the end; those that cannot be decoded were left out when
    the pipeline was made. The parts are timed separately, `parts` gives milliseconds per picture.
    """

    def __init__(
        self,
        source: PairSource,
        spec: ImageSpec,
        encode: Callable[[Tensor], object],
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        limit: int = 256,
    ) -> None:
        self.source, self.spec, self.encode = source, spec, encode
        self.batch, self.device, self.dtype = batch, device, dtype
        self.indices = _readable(source, min(limit, len(source)))
        self.next = 0
        self.seconds = {"decode": 0.0, "transform": 0.0, "tower": 0.0}
        self.pictures = 0

    def __call__(self) -> object:
        """One batch."""
        start = time.perf_counter()
        chosen = [self.indices[(self.next + i) % len(self.indices)] for i in range(self.batch)]
        self.next = (self.next + self.batch) % len(self.indices)
        pictures = [self.source.image(i) for i in chosen]
        decoded = time.perf_counter()
        images = torch.stack([render(picture, EVALUATION_VIEW, self.spec) for picture in pictures])
        images = images.to(device=self.device, dtype=self.dtype)
        transformed = time.perf_counter()
        result = self.encode(images)
        wait_for(self.device)
        end = time.perf_counter()
        self.seconds["decode"] += decoded - start
        self.seconds["transform"] += transformed - decoded
        self.seconds["tower"] += end - transformed
        self.pictures += self.batch
        return result

    def clear(self) -> None:
        """Forget the times of earlier calls."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.pictures = 0

    def parts(self) -> dict[str, float]:
        """Milliseconds per picture in reading and decoding, in the transform and in the tower."""
        return {name: 1000 * seconds / max(1, self.pictures) for name, seconds in self.seconds.items()}


def _readable(source: PairSource, wanted: int) -> list[int]:
    """Indices of the first `wanted` samples, without those that cannot be decoded."""
    found = []
    for index in range(wanted):
        try:
            source.image(index)
        except BadSample:
            continue
        found.append(index)
    if not found:
        raise InputError(f"{source.name}: none of the first {wanted} pictures can be decoded, so nothing can be timed")
    return found
