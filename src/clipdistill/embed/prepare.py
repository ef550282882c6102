"""What the workers of a fill do: read an image, draw or repeat its views, render them for each teacher, tokenise."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.samples import sample_digest
from clipdistill.cache.stored_views import draw_views
from clipdistill.data.pairs import BadSample, PairSource
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, View, ViewPolicy, render_pixels
from clipdistill.models import Tokenizer


@dataclass(frozen=True)
class Item:
    """One sample to prepare. views: known ones to repeat, None to draw them; images: whether pixels are wanted at all;
    texts: its stored captions (empty when they are not wanted); synthetic: its added captions (likewise)."""

    index: int
    views: tuple[View, ...] | None
    images: bool
    texts: tuple[str, ...]
    synthetic: tuple[str, ...]


@dataclass
class Prepared:
    """A batch of samples.

    pixels: for each image geometry uint8 (samples x (1 + views), H, W, 3); tokens, synthetic: for each tokenizer
    (texts, L), sample after sample; problems: None where the image is good; truncated: texts that were cut.
    """

    items: list[Item]
    problems: list[str | None]
    views: list[list[View]]
    pixels: list[Tensor]
    tokens: list[Tensor]
    synthetic: list[Tensor]
    truncated: int


def geometry(spec: ImageSpec) -> tuple[Any, ...]:
    """What of an image specification the pixels depend on; the normalisation comes later, on the device."""
    return spec.size, spec.interpolation, spec.resize_mode


class Preparation(torch.utils.data.Dataset):
    """Prepares lists of items; sent to worker processes once."""

    def __init__(
        self,
        source: PairSource,
        specs: Sequence[ImageSpec],
        tokenizers: Sequence[Tokenizer],
        policy: ViewPolicy | None,
        views: int,
        view_seed: int,
    ) -> None:
        self.source = source
        self.specs = list(specs)
        self.tokenizers = list(tokenizers)
        self.policy = policy
        self.views = views
        self.view_seed = view_seed

    def __getitem__(self, items: list[Item]) -> Prepared:
        problems: list[str | None] = []
        views: list[list[View]] = []
        rows = len(items) * (1 + self.views) if any(item.images for item in items) else 0
        pixels = [np.zeros((rows, s.size, s.size, 3), dtype=np.uint8) for s in self.specs]
        for number, item in enumerate(items):
            problem, drawn = None, list(item.views or ())
            if item.images:
                try:
                    drawn = self._render(item, pixels, number * (1 + self.views))
                except BadSample as error:
                    problem = error.reason
            problems.append(problem)
            views.append(drawn)
        texts = [text for item in items for text in item.texts]
        synthetic = [text for item in items for text in item.synthetic]
        return Prepared(
            items=items,
            problems=problems,
            views=views,
            pixels=[torch.from_numpy(p) for p in pixels],
            tokens=[t(texts) for t in self.tokenizers] if texts else [],
            synthetic=[t(synthetic) for t in self.tokenizers] if synthetic else [],
            truncated=self._truncated(texts + synthetic),
        )

    def _render(self, item: Item, pixels: list[np.ndarray], row: int) -> list[View]:
        """Fill this sample's rows of `pixels`; returns the views 1..k."""
        image = self.source.image(item.index)
        drawn = list(item.views or ())
        if self.views and item.views is None:
            assert self.policy is not None
            digest = sample_digest(self.source.key(item.index), ())
            drawn = draw_views(self.policy, self.views, self.view_seed, digest, image.width, image.height)
        for offset, view in enumerate([EVALUATION_VIEW, *drawn]):
            for spec, target in zip(self.specs, pixels):
                target[row + offset] = render_pixels(image, view, spec)
        return drawn

    def _truncated(self, texts: list[str]) -> int:
        if not texts or not self.tokenizers:
            return 0
        tokenizer = self.tokenizers[0]
        return sum(length > tokenizer.context_length for length in tokenizer.lengths(texts))


def init_worker(_: int) -> None:
    """Workers leave signals to the parent and do not compete for its cores."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
