"""A part of a pair source, chosen the same way every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import Problems
from clipdistill.errors import InputError


class Subset(PairSource):
    """`count` samples of `source`, evenly spread over it (every n-th, not the first), or the samples `indices`."""

    def __init__(self, source: PairSource, count: int | None = None, *, indices: Sequence[int] | None = None) -> None:
        if (count is None) == (indices is None):
            raise InputError("a subset needs either a number of samples or the samples' indices")
        if indices is None:
            assert count is not None
            if count < 1:
                raise InputError(f"a subset needs at least one sample, got {count}")
            count = min(count, len(source))
            chosen = np.arange(count, dtype=np.int64) * len(source) // count
        else:
            chosen = np.asarray(indices, dtype=np.int64)
            if chosen.size and not 0 <= chosen.min() <= chosen.max() < len(source):
                raise InputError(f"the subset's indices leave the {len(source)} samples of {source.name}")
        self.source = source
        self.indices = chosen
        self.name = f"{source.name}[{len(chosen)} of {len(source)}]"
        self.problems = Problems()
        self.max_pixels = source.max_pixels

    def __len__(self) -> int:
        return len(self.indices)

    def key(self, i: int) -> str:
        return self.source.key(int(self.indices[i]))

    def captions(self, i: int) -> tuple[str, ...]:
        return self.source.captions(int(self.indices[i]))

    def image_bytes(self, i: int) -> bytes:
        return self.source.image_bytes(int(self.indices[i]))

    def image(self, i: int, at_least: int | None = None) -> Image.Image:
        return self.source.image(int(self.indices[i]), at_least)

    def shard_of(self, key: str) -> str | None:
        return self.source.shard_of(key)
