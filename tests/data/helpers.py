"""Small pictures, sources and models for the tests of the data path."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample, Problems
from clipdistill.data.views import ImageSpec


def picture(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth coloured picture that differs from seed to seed."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image | int = 0, kind: str = "JPEG", **options: Any) -> bytes:
    """The file contents of a picture (or of `picture(number)`)."""
    image = picture(image) if isinstance(image, int) else image
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], **options: Any) -> Path:
    """A tar archive with these members, by the standard library."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample_members(number: int, caption: str | None = None) -> list[tuple[str, bytes]]:
    """The two members of sample `number` of a shard."""
    text = caption if caption is not None else f"caption {number}"
    return [(f"{number:06d}.jpg", encoded(number)), (f"{number:06d}.txt", text.encode())]


class MemoryPairs(PairSource):
    """Pairs held in memory; `bad` maps indices to the reason why their image cannot be used."""

    def __init__(self, count: int, captions: int = 3, bad: Mapping[int, str] | None = None, size: int = 40) -> None:
        self.name = f"memory{count}"
        self.problems = Problems()
        self.bad = dict(bad or {})
        self._count = count
        self._captions = captions
        self._images = [encoded(picture(i, size, size * 3 // 4)) for i in range(count)]

    def __len__(self) -> int:
        return self._count

    def key(self, i: int) -> str:
        return f"sample-{i:04d}"

    def captions(self, i: int) -> tuple[str, ...]:
        return tuple(f"picture {i} told in way {j}" for j in range(self._captions))

    def image_bytes(self, i: int) -> bytes:
        if i in self.bad:
            raise BadSample(self.bad[i])
        return self._images[i]


@dataclass(frozen=True)
class Letters:
    """A tokenizer with one id a character: start 1, end 999."""

    context_length: int = 32

    def __call__(self, captions: Sequence[str]) -> torch.Tensor:
        rows = torch.zeros(len(captions), self.context_length, dtype=torch.int64)
        for row, caption in zip(rows, captions):
            ids = [1, *(2 + ord(c) % 900 for c in caption[: self.context_length - 2]), 999]
            row[: len(ids)] = torch.tensor(ids)
        return rows

    def lengths(self, captions: Sequence[str]) -> list[int]:
        return [len(caption) + 2 for caption in captions]


@dataclass
class FakeModel:
    """What the loader needs of a ClipModel."""

    image: ImageSpec = field(default_factory=lambda: ImageSpec(size=24))
    tokenizer: Letters = field(default_factory=Letters)
