"""A cached teacher that knows its whole training set: it brings a bank, and may serve cleaned targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from clipdistill.bank.rows import BankOfSet, Cleaning, SetRows, Targets
from clipdistill.cache.teacher import CachedTeacher
from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource
from clipdistill.errors import InputError
from clipdistill.objective import Embeddings


class BankTeacher(CachedTeacher):
    """`teacher`, with targets that are `width` wide after "pca" and "whitened", and with a bank where one is asked for.

    captions: those that a step may draw; samples: pictures in a step's bank (None: all), drawn by (seed, step).
    Raises InputError for several teachers, and for what `Cleaning.fit` and `BankOfSet` refuse.
    """

    def __init__(
        self,
        teacher: CachedTeacher,
        source: PairSource,
        *,
        captions: Literal["random", "first"],
        targets: Targets,
        width: int,
        bank: bool,
        samples: int | None,
        seed: int,
    ) -> None:
        self.__dict__.update(vars(teacher))
        if len(self.stored.teachers) > 1:
            raise InputError(
                f"a bank and train.teacher_targets are those of one teacher, {self.name} are "
                f"{len(self.stored.teachers)}: take one, teacher=cache:DIR?teacher=0"
            )
        rows = SetRows(self.embeddings, self.stored.teachers[0], source, captions)
        self._cleaning = None if targets == "raw" else Cleaning.fit(rows, targets, width)
        self._bank = BankOfSet(rows, self._cleaning, samples, seed, self.device) if bank else None
        known = [f"targets {targets}: {self._cleaning.sentence()}"] if self._cleaning else []
        self.notes = [*teacher.notes, *known, *([self._bank.sentence()] if self._bank else [])]

    @property
    def blocks(self) -> tuple[int, ...]:
        axes = None if self._cleaning is None else self._cleaning.axes
        return super().blocks if axes is None else (axes.shape[1],)

    def __call__(self, batch: Batch) -> Embeddings:
        """The stored rows of this batch, cleaned, and the bank."""
        found = super().__call__(batch)
        if self._cleaning is not None:
            clean, extra = self._cleaning, found.synthetic_text
            found = replace(
                found,
                image=clean(found.image, "image"),
                text=clean(found.text, "text"),
                synthetic_text=None if extra is None else clean(extra, "text"),
            )
        return found if self._bank is None else replace(found, bank=self._bank(batch))
