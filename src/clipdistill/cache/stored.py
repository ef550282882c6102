"""Stored embeddings as the training loader sees them, whatever file they lie in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from clipdistill.data.loader import Choice
from clipdistill.data.pairs import BadSample
from clipdistill.data.views import EVALUATION_VIEW, View
from clipdistill.errors import InputError

Views = Literal["fixed", "stored"]


class StoredEmbeddings(Protocol):
    """Random access to embeddings by data index: a CacheStore, a table of vectors, or tars beside data tars."""

    def __len__(self) -> int: ...

    @property
    def view_count(self) -> int:
        """Stored views beside the evaluation view."""
        ...

    @property
    def dims(self) -> tuple[int, ...]:
        """Width of each teacher's embedding."""
        ...

    @property
    def has_synthetic(self) -> bool: ...

    def fingerprint(self) -> str:
        """sha256 that changes with the embeddings served, their teachers and data, and not with their place."""
        ...

    def valid(self, index: int) -> bool: ...

    def view(self, index: int, number: int) -> View: ...

    def synthetic(self, index: int) -> tuple[str, ...]: ...

    def read(
        self, teacher: int, indices: Sequence[int], captions: Sequence[int], views: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...

    def read_synthetic(self, teacher: int, indices: Sequence[int], captions: Sequence[int]) -> Tensor: ...


class StoredRows:
    """Chooses views and reads rows for the loader (data.loader.StoredTeacher); runs in its workers.

    views: "fixed" is the evaluation view for teacher and student; "stored" one of the k stored views, each equally
    often. teachers: which of the stored ones, in order.
    """

    def __init__(self, embeddings: StoredEmbeddings, views: Views, teachers: Sequence[int]) -> None:
        self.embeddings = embeddings
        self.views = views
        self.teachers = tuple(teachers)

    def choose(self, index: int, rng: np.random.Generator) -> Choice:
        """See StoredTeacher. Draws nothing that is not needed."""
        stored = self.embeddings
        if not stored.valid(index):
            raise BadSample("no stored embedding: the image could not be read when the cache was filled")
        number = 1 + int(rng.integers(stored.view_count)) if self.views == "stored" else 0
        view = EVALUATION_VIEW if number == 0 else stored.view(index, number)
        if not stored.has_synthetic:
            return Choice(index, number, view)
        captions = stored.synthetic(index)
        chosen = int(rng.integers(len(captions)))
        return Choice(index, number, view, chosen, captions[chosen])

    def read(self, choices: Sequence[Choice], captions: Sequence[int]) -> dict[str, Tensor]:
        """image, text and (with added captions) synthetic_text: float32 (B, D_1 + ... + D_K), unit blocks."""
        indices = [choice.index for choice in choices]
        views = [choice.view_number for choice in choices]
        rows: dict[str, list[Tensor]] = {"image": [], "text": []}
        for teacher in self.teachers:
            image, text = self.embeddings.read(teacher, indices, captions, views)
            rows["image"].append(image)
            rows["text"].append(text)
            if self.embeddings.has_synthetic:
                numbers = [choice.synthetic_number for choice in choices]
                rows.setdefault("synthetic_text", []).append(self.embeddings.read_synthetic(teacher, indices, numbers))
        # rounding has changed the lengths a little
        return {n: torch.cat([torch.nn.functional.normalize(p, dim=-1) for p in parts], 1) for n, parts in rows.items()}


def pick_views(
    wanted: Literal["auto", "live", "fixed", "stored"], stored: int, random_policy: bool
) -> tuple[Views, str | None]:
    """What a stored teacher can do of the declared policy, and a sentence where that is not what the recipe draws.

    Raises InputError for a policy that is not stored.
    """
    if wanted == "live":
        raise InputError(
            "train.views=live: views drawn anew need a live teacher; a cache has 'fixed' or 'stored' views"
        )
    if wanted == "stored" and stored == 0:
        raise InputError(
            "train.views=stored: the cache holds the evaluation view only: fill one with --views, or train.views=fixed"
        )
    if wanted == "fixed" or stored == 0:
        note = None
        if wanted == "auto" and random_policy:
            note = "views: the cache holds the evaluation view only, so the recipe's random views are not drawn"
        return "fixed", note
    return "stored", f"views: one of {stored} stored views an image and step, the same for teacher and student"
