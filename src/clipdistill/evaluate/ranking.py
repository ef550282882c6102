"""Counts how many items outrank each positive pair, exactly, without ever holding the score matrix.

A rank is a count: the caption's image is at rank 1 + (images scoring above it). So one pass over tiles of the score
matrix, with comparisons instead of sorting, gives the ranks of both directions of retrieval from a single product.

Exactness. Tiles are float32 products, whose rounding depends on the tile's shape, the thread count and the machine.
A comparison is trusted only when the two scores differ by more than the rigorous bound of that rounding; the few
pairs inside the bound are scored again in float64, where scores closer than TIE_TOLERANCE are a tie. The counts
therefore depend on the embeddings alone: not on tile size, number of threads, device or number of ranks.

This module counts; `retrieval.py` turns counts into metrics and says how ties are resolved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed

from clipdistill.errors import InputError
from clipdistill.evaluate.tiles import TIE_TOLERANCE, GpuCounter, TileCounter
from clipdistill.evaluate.tiles_cpu import CpuCounter

LEAST_WORK = 2**33
"""Multiply-adds below which a float32 product takes less than a tenth of a second: not worth trying bfloat16 too."""


@dataclass(frozen=True)
class PositiveCounts:
    """Where each positive pair (text j, its image) stands in both directions; all arrays have shape (M,), int64.

    image_greater: images scoring above the pair, for text j as the query.
    image_equal: images tied with the pair, its own image included (>= 1).
    text_greater: texts scoring above the pair, for the pair's image as the query.
    text_equal: texts tied with the pair, text j included (>= 1).
    positive_greater, positive_equal: the same among the image's own texts only.
    text_to_image: the image of each text.
    score: cosine of the pair, float64.
    """

    image_greater: np.ndarray
    image_equal: np.ndarray
    text_greater: np.ndarray
    text_equal: np.ndarray
    positive_greater: np.ndarray
    positive_equal: np.ndarray
    text_to_image: np.ndarray
    score: np.ndarray
    images: int


def cpu_counter(images: int, texts: int, dimensions: int) -> type[TileCounter]:
    """What counts a ranking of this size fastest on this processor."""
    if images * texts * dimensions < LEAST_WORK:
        return CpuCounter
    from clipdistill.evaluate.tiles_sift import SiftCounter, sifting_pays

    return SiftCounter if sifting_pays(dimensions) else CpuCounter


def count_positives(
    image_embeddings: Any,
    text_embeddings: Any,
    text_to_image: Any,
    *,
    depth: int | None = None,
    distributed: bool = False,
) -> PositiveCounts:
    """Counts of `PositiveCounts` for images (N, D) against texts (M, D), tensors or arrays, any floating dtype.

    text_to_image: (M,) integers, the image of each text; every image needs at least one text.
    depth: ranks beyond it interest only for an image's best text: where another of its texts has `depth` texts above
    it, the count stops and is given as `depth`, or one more than the best text's where that is larger, and text_equal
    as positive_equal. A third of the time. None: all counts to the end.
    distributed: the ranks of torch.distributed share the images between them and every rank gets the whole result;
    all ranks must call with the same embeddings.
    Raises InputError on empty, mis-shaped or non-finite embeddings and on a text_to_image that does not fit.
    """
    images, texts = _matrix(image_embeddings, "image"), _matrix(text_embeddings, "text")
    if images.shape[1] != texts.shape[1]:
        raise InputError(f"image embeddings have {images.shape[1]} dimensions and text embeddings {texts.shape[1]}")
    owner = _owners(text_to_image, len(images), len(texts))
    texts = texts.to(images.device)
    with torch.no_grad(), _full_precision(images.device.type):
        return _count(images, texts, owner, depth, distributed)


def _count(
    images: torch.Tensor, texts: torch.Tensor, owner: np.ndarray, depth: int | None, distributed: bool
) -> PositiveCounts:
    device = images.device
    captions = np.bincount(owner, minlength=len(images))
    # images with many captions first: then the images that have a g-th caption are always the first rows of a block
    image_order = np.argsort(-captions, kind="stable")
    position = np.empty_like(image_order)
    position[image_order] = np.arange(len(images))
    row_of_text = torch.from_numpy(position[owner]).to(device)

    kind: type[TileCounter] = GpuCounter
    if device.type == "cpu":
        kind = cpu_counter(len(images), *texts.shape)
    as_given = bool((image_order[1:] > image_order[:-1]).all())
    counter = kind(images, None if as_given else torch.from_numpy(image_order), texts, row_of_text)
    score = counter.threshold.cpu().numpy()
    greater, equal = _among_own(owner, score, captions)
    counter.depth, counter.own_above = depth, torch.from_numpy(greater).to(device)
    # texts grouped by row, the lowest score first
    pair_order = torch.from_numpy(np.lexsort((score, position[owner]))).to(device)
    row_captions = torch.from_numpy(captions[image_order]).to(device)
    first_pair = torch.cumsum(row_captions, 0) - row_captions
    rank, world = 0, 1
    if distributed and torch.distributed.is_available() and torch.distributed.is_initialized():
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    height, width = counter.tile_shape
    height = min(height, -(-len(images) // world))
    for start in range(rank * height, len(images), world * height):
        stop = min(start + height, len(images))
        count = row_captions[start:stop]
        g = torch.arange(int(count[0]), device=device)
        # (rows, g): the g-th caption of each image of the block; -1 where it has fewer
        pairs = torch.where(
            g < count[:, None],
            pair_order[(first_pair[start:stop, None] + g).clamp(max=len(texts) - 1)],
            torch.full((), -1, device=device, dtype=torch.int64),
        )
        for left in range(0, len(texts), width):
            counter.add_tile(start, stop, left, min(left + width, len(texts)), pairs)
    counts = counter.counts
    if world > 1:
        counts = _sum_over_ranks(counts)
    table = counts.cpu().numpy()
    text_greater, text_equal = table[2] + greater, table[3] + equal
    if depth is not None:
        best = np.full(len(images), len(texts))
        np.minimum.at(best, owner[greater == 0], text_greater[greater == 0])
        beyond = (greater > 0) & (text_greater >= depth)
        text_greater = np.where(beyond, np.maximum(depth, best[owner] + 1), text_greater)
        text_equal = np.where(beyond, equal, text_equal)
    return PositiveCounts(
        image_greater=table[0],
        image_equal=table[1] + 1,
        text_greater=text_greater,
        text_equal=text_equal,
        positive_greater=greater,
        positive_equal=equal,
        text_to_image=owner,
        score=score,
        images=len(images),
    )


def _among_own(owner: np.ndarray, score: np.ndarray, captions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each text: how many texts of its own image score above it, and how many tie with it (itself included)."""
    order = np.lexsort((-score, owner))
    sorted_owner, sorted_score = owner[order], score[order]
    index = np.arange(len(order))
    start_of_image = (np.cumsum(captions) - captions)[sorted_owner]
    new_group = np.ones(len(order), dtype=bool)
    new_group[1:] = (sorted_owner[1:] != sorted_owner[:-1]) | (sorted_score[:-1] - sorted_score[1:] > TIE_TOLERANCE)
    group = np.cumsum(new_group) - 1
    start_of_group = index[new_group]
    size = np.diff(np.append(start_of_group, len(order)))
    greater, equal = np.empty(len(order), dtype=np.int64), np.empty(len(order), dtype=np.int64)
    greater[order] = start_of_group[group] - start_of_image
    equal[order] = size[group]
    return greater, equal


def _sum_over_ranks(counts: torch.Tensor) -> torch.Tensor:
    device = counts.device
    if torch.distributed.get_backend() == "nccl" and device.type != "cuda":
        counts = counts.cuda()
    torch.distributed.all_reduce(counts)
    return counts.to(device)


def _matrix(values: Any, name: str) -> torch.Tensor:
    """`values` as a floating (n, D) tensor, shared where possible."""
    if not isinstance(values, torch.Tensor):
        try:
            array = np.ascontiguousarray(values)
        except ValueError:  # rows of different lengths
            array = np.empty(0, object)
        if array.dtype == object or array.dtype.kind not in "fiu":
            raise InputError(f"the {name} embeddings must be numbers, got an array of {array.dtype}")
        values = torch.from_numpy(array if array.flags.writeable else array.copy())
    if values.ndim != 2 or 0 in values.shape:
        raise InputError(f"the {name} embeddings must have shape (number, dimensions), got {tuple(values.shape)}")
    if values.dtype.is_complex or values.dtype == torch.bool:
        raise InputError(f"the {name} embeddings must be numbers, got {values.dtype}")
    values = values.detach()
    if not values.dtype.is_floating_point:
        values = values.double()
    return values.cpu() if values.device.type == "mps" else values  # MPS has no float64


def _owners(text_to_image: Any, images: int, texts: int) -> np.ndarray:
    """text_to_image as (M,) int64, or an InputError that names the first text or image that does not fit."""
    if isinstance(text_to_image, torch.Tensor):
        text_to_image = text_to_image.detach().cpu().numpy()
    owner = np.asarray(text_to_image)
    if owner.shape != (texts,):
        raise InputError(
            f"text_to_image must give one image for each of the {texts} texts, got an array of shape {owner.shape}"
        )
    if owner.dtype.kind not in "iu":
        raise InputError(f"text_to_image must hold integers (the image index of each text), got {owner.dtype}")
    owner = owner.astype(np.int64)
    outside = np.flatnonzero((owner < 0) | (owner >= images))
    if len(outside):
        row = outside[0]
        raise InputError(f"text_to_image[{row}] is {owner[row]}, but the images are numbered 0 to {images - 1}")
    missing = np.flatnonzero(np.bincount(owner, minlength=images) == 0)
    if len(missing):
        raise InputError(
            f"image {missing[0]} has no text ({len(missing)} of {images} images have none):"
            " leave out images without captions before scoring"
        )
    return owner


@contextlib.contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Float32 products in float32: no autocast, no TF32 or bfloat16 shortcut; the caller's settings come back."""
    backends = [b.matmul for b in (torch.backends.cuda, torch.backends.mkldnn) if hasattr(b, "matmul")]
    backends = [b for b in backends if hasattr(b, "fp32_precision")]
    with torch.autocast(device, enabled=False):
        if not backends:  # torch before 2.9
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
            return
        saved = [b.fp32_precision for b in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, value in zip(backends, saved, strict=True):
                backend.fp32_precision = value
