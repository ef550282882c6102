"""Small models and data sets of the evaluation tests."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from clipdistill.data.labelled import LabelledSource
from clipdistill.data.pairs import PairSource
from clipdistill.data.problems import BadSample, Problems
from clipdistill.data.views import ImageSpec
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.tokenizers import WordsTokenizer

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (128, 128, 128), "white": (255,) * 3}
WORDS = (*COLOURS, "a", "photo", "of", "square", "dark", "the")


class ColourModule(nn.Module):
    """Sees the mean colour of an image and the colour words of a text: a model whose answers are known."""

    def __init__(self, noise: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.zeros(len(WORDS) + 4, 4))
        self.mix = nn.Parameter(torch.eye(4) + noise * torch.randn(4, 4, generator=generator))
        with torch.no_grad():
            for i, colour in enumerate(COLOURS.values()):
                self.table[WordsTokenizer.FIRST_WORD + i] = torch.tensor([*(c / 255 - 0.3 for c in colour), 0.1])
        self.passes = 0

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        colour = images.mean(dim=(2, 3)) - 0.3
        return 3 * torch.cat([colour, torch.full_like(colour[:, :1], 0.1)], dim=1) @ self.mix

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        return self.table[tokens].sum(dim=1) + 1e-4


def colour_model(noise: float = 0.0, seed: int = 0) -> ClipModel:
    """A ClipModel around ColourModule: 8 pixels, colours from 0 to 1, at most 9 tokens."""
    return ClipModel(
        name="colours",
        module=ColourModule(noise, seed),
        image=ImageSpec(size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
        tokenizer=WordsTokenizer(WORDS, 9),
        embed_dim=4,
        context_length=9,
        architecture={"colours": True},
    )


def picture(colour: Sequence[int], shade: int = 0) -> Image.Image:
    return Image.new("RGB", (12, 10), tuple(max(0, c - shade) for c in colour))


class ColourPairs(PairSource):
    """Pictures of one colour, `per_colour` shades each, with two captions; samples in `bad` cannot be read."""

    def __init__(self, name: str = "colours/val", per_colour: int = 2, bad: Sequence[int] = ()) -> None:
        self.name = name
        self.problems = Problems()
        self.bad = tuple(bad)
        self.items = [(word, shade) for word in COLOURS for shade in range(per_colour)]

    def __len__(self) -> int:
        return len(self.items)

    def key(self, i: int) -> str:
        return f"{self.items[i][0]}-{self.items[i][1]}"

    def captions(self, i: int) -> tuple[str, ...]:
        word, shade = self.items[i]
        long = f"a {word} square of the dark photo of a square"
        return (f"a {word} square", long) if shade else (f"{word}", f"the {word} square")

    def image_bytes(self, i: int) -> bytes:
        if i in self.bad:
            raise BadSample("truncated image: 3 of 9 bytes", self.key(i))
        data = io.BytesIO()
        picture(COLOURS[self.items[i][0]], 5 * self.items[i][1]).save(data, "PNG")
        return data.getvalue()


class ColourClasses(LabelledSource):
    """Labelled pictures of one colour; `wrong` of them carry the next class's label."""

    def __init__(self, counts: Sequence[int] = (4, 4, 4, 4, 4), wrong: Sequence[int] = ()) -> None:
        self.colours = [word for word, count in zip(COLOURS, counts, strict=True) for _ in range(count)]
        names = list(COLOURS)
        labels = [(names.index(word) + (i in wrong)) % len(names) for i, word in enumerate(self.colours)]
        super().__init__("colour classes", [f"{i:03d}" for i in range(len(labels))], labels, names)
        self.templates = "plain"

    def _bytes(self, i: int) -> bytes:
        data = io.BytesIO()
        picture(COLOURS[self.colours[i]]).save(data, "PNG")
        return data.getvalue()


@pytest.fixture
def model() -> ClipModel:
    return colour_model()


def as_arrays(encoded: Any) -> tuple[np.ndarray, np.ndarray]:
    return encoded.image.numpy(), encoded.text.numpy()
