"""The shape of one model's embedding space on held-out pairs: similarities of matched and unmatched pairs, neighbours,
modality gap. Definitions as in docs/protocols.md; teacher against student is in alignment.py.

    geometry(encoded)             # a JSON-able dictionary, from EncodedPairs
    geometry(student, teacher)    # the same of both, and "alignment"

Everything is summed tile by tile; the largest array is one stripe of a similarity matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipdistill.embed.encode import EncodedPairs
from clipdistill.errors import InputError

BINS = 200
"""Histogram bins over cosines from -1 to 1."""
MOST_TEXTS = 6000
"""Texts compared with each other at most (evenly spread over the set): the text-text matrix grows quadratically."""
_STRIPE = 512
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


def geometry(
    student: EncodedPairs, teacher: EncodedPairs | None = None, *, rows: int = 2000, k: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Any]:
    """Geometry of one model, or of student and teacher with their alignment (rows, k: see `alignment`).

    Returns {"student": {...}} and, with a teacher, {"teacher": {...}, "alignment": {...}}. Each model's entry:
    counts; positive and negative (mean, std, quantiles, histogram of image-text cosines); gap = positive mean -
    negative mean; hard_negative (mean over images, over texts, of the closest unmatched one); image_image and
    text_text (mean over unmatched pairs, mean of nearest neighbours); same_image_texts (mean over captions of one
    image); modality_gap (distance and cosine of the mean image and the mean text).
    Raises InputError when there is no unmatched pair, or the two models saw different samples.
    """
    result: dict[str, Any] = {"student": _one_model(student)}
    if teacher is not None:
        from clipdistill.evaluate.alignment import alignment

        result["teacher"] = _one_model(teacher)
        result["alignment"] = alignment(student, teacher, rows=rows, k=k)
    return result


@dataclass
class _Distribution:
    """Sums over a stream of cosines: count, mean, deviation, histogram."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    bins: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, values: Tensor) -> None:
        values = values.double().clamp(-1, 1)
        self.count += values.numel()
        self.total += float(values.sum())
        self.squares += float(values.square().sum())
        place = ((values + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
        self.bins += torch.bincount(place.flatten(), minlength=BINS).cpu().numpy()

    @property
    def mean(self) -> float:
        return self.total / self.count

    def describe(self) -> dict[str, Any]:
        """JSON-able: quantiles are read from the histogram, to half a bin."""
        edges = np.linspace(-1, 1, BINS + 1)
        share = np.cumsum(self.bins) / self.count
        used = np.flatnonzero(self.bins)
        first, last = int(used[0]), int(used[-1]) + 1
        centre = (edges[:-1] + edges[1:]) / 2
        return {
            "count": self.count,
            "mean": self.mean,
            "std": max(0.0, self.squares / self.count - self.mean**2) ** 0.5,
            "quantiles": {str(q): float(centre[int(np.searchsorted(share, q))]) for q in _QUANTILES},
            "histogram": {"edges": edges[first : last + 1].tolist(), "counts": self.bins[first:last].tolist()},
        }


def _one_model(encoded: EncodedPairs) -> dict[str, Any]:
    image, text, owner = encoded.image, encoded.text, encoded.text_to_image
    if len(image) < 2:
        raise InputError(f"geometry compares matched with unmatched pairs and needs two images, got {len(image)}")
    positive, negative = _Distribution(), _Distribution()
    image_hardest, text_hardest = torch.empty(len(image)), torch.full((len(text),), -2.0)
    for start, scores in _stripes(image, text):
        rows = torch.arange(start, start + len(scores), device=owner.device)
        matched = owner[None, :] == rows[:, None]
        positive.add(scores[matched])
        negative.add(scores[~matched])
        unmatched = scores.masked_fill(matched, -2.0)
        image_hardest[start : start + len(scores)] = unmatched.amax(dim=1)
        text_hardest = torch.maximum(text_hardest, unmatched.amax(dim=0))
    chosen = torch.arange(min(len(text), MOST_TEXTS)) * len(text) // min(len(text), MOST_TEXTS)
    texts, text_owner = text[chosen], owner[chosen]
    images_alone, image_neighbour, _ = _within(image, torch.arange(len(image)))
    texts_alone, text_neighbour, siblings = _within(texts, text_owner)
    mean_image, mean_text = image.double().mean(dim=0), text.double().mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(mean_image, mean_text, dim=0)
    return {
        "images": len(image),
        "texts": len(text),
        "texts_compared": len(texts),
        "positive": positive.describe(),
        "negative": negative.describe(),
        "gap": positive.mean - negative.mean,
        "hard_negative": {"image": float(image_hardest.mean()), "text": float(text_hardest.mean())},
        "image_image": {**images_alone.describe(), "nearest": image_neighbour},
        "text_text": {**texts_alone.describe(), "nearest": text_neighbour},
        "same_image_texts": siblings.mean if siblings.count else None,
        "modality_gap": {"distance": float((mean_image - mean_text).norm()), "cosine": float(cosine)},
    }


def _within(rows: Tensor, owner: Tensor) -> tuple[_Distribution, float, _Distribution]:
    """Cosines among rows of different owners, the mean of the nearest such neighbour, and cosines within an owner."""
    apart, together = _Distribution(), _Distribution()
    nearest = torch.empty(len(rows))
    for start, scores in _stripes(rows, rows):
        index = torch.arange(start, start + len(scores))
        same = owner[None, :] == owner[index][:, None]
        itself = index[:, None] == torch.arange(len(rows))[None, :]
        apart.add(scores[~same])
        if (same & ~itself).any():
            together.add(scores[same & ~itself])
        nearest[index] = scores.masked_fill(same, -2.0).amax(dim=1)
    return apart, float(nearest.mean()), together


def _stripes(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows[start:start + n] @ columns.T), stripe by stripe."""
    for start in range(0, len(rows), _STRIPE):
        yield start, rows[start : start + _STRIPE] @ columns.T
