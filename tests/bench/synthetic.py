"""A very small CLIP with the interface of ours, so that benchmark tests take milliseconds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clipdistill.data.views import ImageSpec
from clipdistill.models.clip_model import ClipModel


class Towers(nn.Module):
    """One linear layer a tower, over 8 x 8 images and 6 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual = nn.Linear(3 * 8 * 8, width)
        self.transformer = nn.Linear(6, width)
        self.logit_scale = nn.Parameter(torch.zeros([]))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.visual(images.flatten(1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.transformer(tokens.to(self.transformer.weight.dtype))


class Words:
    """Token ids from word lengths."""

    def __call__(self, texts: list[str]) -> Tensor:
        return torch.tensor([[len(word) for word in (text.split() + [""] * 6)[:6]] for text in texts])

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "lengths"}


def tiny(width: int = 16, name: str = "tiny") -> ClipModel:
    """A model of 3*64*width + 6*width weights, plus biases."""
    torch.manual_seed(width)
    architecture = {"width": width}
    return ClipModel(name, Towers(width), ImageSpec(size=8), Words(), width, 6, architecture)  # type: ignore[arg-type]


class Clock:
    """A clock that only moves when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds
