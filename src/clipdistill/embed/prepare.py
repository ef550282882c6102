"""What the workers of the encoder and of a fill do: read an image, draw or repeat its views, render them, tokenise."""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from clipdistill.data.files import read_ahead
from clipdistill.data.loader import truncated
from clipdistill.data.problems import BadSample
from clipdistill.data.views import EVALUATION_VIEW, ImageSpec, View, ViewPolicy, render_pixels, sample_view
from clipdistill.models import Tokenizer

DIGEST_BYTES = 16
T = TypeVar("T")
_END = object()


class Pictures(Protocol):
    """What images are read from: a PairSource or a LabelledSource."""

    name: str

    def __len__(self) -> int: ...

    def key(self, i: int) -> str: ...

    def image(self, i: int) -> Any: ...


@dataclass(frozen=True)
class Item:
    """One sample to prepare. views: known ones to repeat, None to draw them; images: whether pixels are wanted at all;
    texts: its stored captions (empty when they are not wanted); synthetic: its added captions (likewise)."""

    index: int
    views: tuple[View, ...] | None = None
    images: bool = True
    texts: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()


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


@dataclass
class Preparation(torch.utils.data.Dataset):
    """Prepares lists of items; sent to worker processes once. specs: one for each image geometry; views: how many are
    drawn by `policy` beside the evaluation view."""

    source: Pictures
    specs: Sequence[ImageSpec]
    tokenizers: Sequence[Tokenizer] = ()
    policy: ViewPolicy | None = None
    views: int = 0
    view_seed: int = 0

    def __getitem__(self, items: list[Item]) -> Prepared:
        problems: list[str | None] = []
        views: list[list[View]] = []
        rows = len(items) * (1 + self.views) if any(item.images for item in items) else 0
        pixels = [np.zeros((rows, s.size, s.size, 3), dtype=np.uint8) for s in self.specs]
        read_ahead(self.source, [item.index for item in items if item.images])
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
            truncated=truncated(self.tokenizers[0], texts + synthetic) if self.tokenizers else 0,
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


def sample_digest(key: str, captions: Sequence[str]) -> bytes:
    """BLAKE2b (16 bytes) of the key and the captions, each preceded by its length in UTF-8 bytes (8, little-endian)."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for text in (key, *captions):
        encoded = text.encode("utf-8")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()


def draw_views(policy: ViewPolicy, count: int, seed: int, key: bytes, width: int, height: int) -> list[View]:
    """The views 1..count of one image: a function of (policy, seed, digest of the sample, image size) alone."""
    entropy = [seed, int.from_bytes(key[:8], "little")]
    return [sample_view(policy, width, height, np.random.default_rng([*entropy, n])) for n in range(1, count + 1)]


def ahead(items: Iterator[T], meanwhile: Iterator[Any], depth: int = 2) -> Iterator[T]:
    """`items`, made by a thread up to `depth` ahead; while the next is not there, steps of `meanwhile` are taken."""
    made: queue.Queue[Any] = queue.Queue(depth)
    ended = threading.Event()

    def make() -> None:
        try:
            for item in items:
                made.put(item)
                if ended.is_set():
                    return
            made.put(_END)
        except BaseException as error:
            made.put(error)

    thread = threading.Thread(target=make, daemon=True, name="pictures ahead")
    thread.start()
    try:
        while True:
            try:
                item = made.get_nowait()
            except queue.Empty:
                if next(meanwhile, _END) is not _END:
                    continue
                item = made.get()
            if item is _END:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        ended.set()
        while thread.is_alive():  # it may be waiting for a place
            try:
                made.get(timeout=0.05)
            except queue.Empty:
                continue
