"""Stored embeddings as the training loader sees them, whatever file they lie in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clipdistill.cache.manifest import Manifest
from clipdistill.data.loader import Choice
from clipdistill.data.pairs import BadSample
from clipdistill.data.views import EVALUATION_VIEW, View
from clipdistill.errors import InputError
from clipdistill.runtime.files import digest_of

Views = Literal["fixed", "stored"]


class StoredEmbeddings(ABC):
    """Random access to embeddings by data index: a CacheStore, a table of vectors, or tars beside data tars.

    dims: width of each teacher's embedding; view_count: stored views beside the evaluation view. The defaults are those
    of embeddings without stored views and added captions.
    """

    dims: tuple[int, ...]
    view_count: int = 0
    has_synthetic: bool = False

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 that changes with the embeddings served, their teachers and data, and not with their place."""

    @abstractmethod
    def read(
        self, teacher: int, indices: Sequence[int], captions: Sequence[int], views: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Image rows of the given views and text rows of the given captions: float32 (B, D) each."""

    def read_synthetic(self, teacher: int, indices: Sequence[int], captions: Sequence[int]) -> Tensor:
        """Text rows of the given added captions: float32 (B, D)."""
        raise InputError("these embeddings have no added captions")

    def valid(self, index: int) -> bool:
        """Whether the sample's image could be read when its embedding was made."""
        return True

    def view(self, index: int, number: int) -> View:
        """The stored view 1..k of a sample; number 0 is the evaluation view."""
        return EVALUATION_VIEW

    def synthetic(self, index: int) -> tuple[str, ...]:
        """The added captions of a sample."""
        return ()


class DescribedEmbeddings(StoredEmbeddings):
    """Embeddings with a manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.dims = tuple(teacher.dim for teacher in manifest.teachers)
        self.view_count = manifest.views
        self.has_synthetic = manifest.synthetic is not None

    def fingerprint(self) -> str:
        return digest_of({"manifest": self.manifest.fingerprint(), "files": self.contents()})

    @abstractmethod
    def contents(self) -> list[Any]:
        """What tells the content of the files apart without reading all of it, in a fixed order."""


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
