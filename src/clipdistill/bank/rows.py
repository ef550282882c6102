"""What a cache knows of the whole training set: a bank to compare with, and targets cleaned of what all rows share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipdistill.bank.divergence import Bank
from clipdistill.cache.stored import StoredEmbeddings
from clipdistill.data.loader import Batch
from clipdistill.data.pairs import PairSource, one_or_several
from clipdistill.data.sampler import step_sample
from clipdistill.errors import InputError
from clipdistill.runtime.console import file_size

LARGEST = 4 << 30
"""Bytes of rows that are kept in memory; of a larger set a sample is read at each step."""
FITTED = 1 << 16
"""Pictures that means and axes are computed from, at most."""
_PART = 4096

Targets = Literal["raw", "centred", "pca", "whitened"]


class SetRows:
    """A teacher's rows of all pictures and captions of a training set: unit length, float32, by sample.

    captions: which of them a step may draw. Samples whose picture could not be read have no rows.
    """

    def __init__(
        self, embeddings: StoredEmbeddings, teacher: int, source: PairSource, captions: Literal["random", "first"]
    ) -> None:
        self.embeddings, self.teacher = embeddings, teacher
        samples = range(len(source))
        self.samples = np.asarray([index for index in samples if embeddings.valid(index)], dtype=np.int64)
        every = [1 if captions == "first" else len(one_or_several(source.captions(i))) for i in self.samples.tolist()]
        self.counts = np.asarray(every, dtype=np.int64)
        self.first = np.cumsum(self.counts) - self.counts
        self.bytes = 4 * embeddings.dims[teacher] * (len(self.samples) + int(self.counts.sum()))
        self._kept: tuple[Tensor, Tensor] | None = None
        if self.bytes <= LARGEST:
            self._kept = self._read(np.arange(len(self.samples)))

    @property
    def in_memory(self) -> bool:
        return self._kept is not None

    def rows(self, pictures: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
        """Rows of the pictures (P, D) with these numbers among those that have any, and of their captions (T, D)."""
        if self._kept is None:
            return self._read(np.arange(len(self.samples)) if pictures is None else pictures)
        if pictures is None:
            return self._kept
        counts = self.counts[pictures]
        texts = np.repeat(self.first[pictures] - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        return self._kept[0][torch.from_numpy(pictures)], self._kept[1][torch.from_numpy(texts)]

    def _read(self, pictures: np.ndarray) -> tuple[Tensor, Tensor]:
        images, texts = [], []
        for start in range(0, len(pictures), _PART):
            part = pictures[start : start + _PART]
            counts = self.counts[part]
            numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            indices = np.repeat(self.samples[part], counts)
            image, text = self.embeddings.read(
                self.teacher, indices.tolist(), numbers.tolist(), np.zeros_like(indices).tolist()
            )
            images.append(normalize(image[torch.from_numpy(numbers == 0)], dim=-1))
            texts.append(normalize(text, dim=-1))
        return torch.cat(images), torch.cat(texts)


@dataclass(frozen=True)
class Cleaning:
    """A fixed view of a teacher's rows: its modality's mean taken away, then turned to the axes, then of length 1.

    axes: (D, K), the same for both modalities, so that products between them keep their meaning; None: no turn.
    kept: share of the variance within both modalities that the axes hold.
    """

    image: Tensor
    text: Tensor
    axes: Tensor | None
    kept: float

    @classmethod
    def fit(cls, rows: SetRows, targets: Targets, width: int) -> Cleaning:
        """Means, and for "pca" and "whitened" the `width` axes of largest variance; whitened: of variance 1 along them.

        Raises InputError for a width that the teacher does not have.
        """
        count = len(rows.samples)
        chosen = None if count <= FITTED else np.linspace(0, count - 1, FITTED).astype(np.int64)
        both = [part.double() for part in rows.rows(chosen)]
        centres = [part.mean(0) for part in both]
        if targets == "centred":
            return cls(centres[0].float(), centres[1].float(), None, 1.0)
        own = both[0].shape[1]
        if width > own:
            raise InputError(
                f"train.teacher_targets={targets}: the student's embeddings are {width} wide, the teacher's {own}: "
                "axes can only be left out, so take a narrower student or train.teacher_targets=centred"
            )
        spread = torch.stack([torch.cov(part.T, correction=0) for part in both]).mean(0)
        variances, axes = torch.linalg.eigh(spread)
        variances, axes = variances.flip(0).clamp(min=0), axes.flip(1)
        # the sign of an axis is free: the same on every machine
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        kept = float(variances[:width].sum() / variances.sum())
        axes = axes[:, :width]
        if targets == "whitened":
            # axes without variance would be scaled up to noise
            axes = axes / (variances[:width] + 1e-4 * variances[0]).sqrt()
        return cls(centres[0].float(), centres[1].float(), axes.float(), kept)

    def sentence(self) -> str:
        """What it does, for the terminal."""
        axes = "" if self.axes is None else f", {self.axes.shape[1]} axes with {self.kept:.1%} of the variance"
        return f"each modality's mean removed{axes}"

    def __call__(self, rows: Tensor, modality: str) -> Tensor:
        """(n, D) -> (n, K), of length 1."""
        centred = rows - (self.image if modality == "image" else self.text).to(rows)
        return normalize(centred if self.axes is None else centred @ self.axes.to(rows), dim=-1)


class BankOfSet:
    """Gives each step its bank: all rows, or a sample of the pictures that depends on (seed, step) alone."""

    def __init__(
        self, rows: SetRows, cleaning: Cleaning | None, samples: int | None, seed: int, device: torch.device
    ) -> None:
        """samples: pictures in a step's bank. Raises InputError for a set too large to compare with as a whole."""
        count = len(rows.samples)
        if not rows.in_memory and (samples is None or samples >= count):
            raise InputError(
                f"the teacher's embeddings of all {count:,} pictures and their captions take {file_size(rows.bytes)}: "
                f"set train.bank_samples, for example  train.bank_samples=65536, to compare with a sample at each step"
            )
        self._rows, self._cleaning, self._seed, self._device = rows, cleaning, seed, device
        self._samples = None if samples is None or samples >= count else samples
        self._place = {sample: place for place, sample in enumerate(rows.samples.tolist())}
        self._whole: Bank | None = None
        if self._samples is None:
            image, text = self._clean(*rows.rows())
            nobody = torch.zeros(0, dtype=torch.int64, device=device)
            self._whole = Bank(image, text, torch.from_numpy(rows.counts).to(device), nobody)

    def sentence(self) -> str:
        """What terms compare with, for the terminal."""
        rows = self._rows
        known = f"{len(rows.samples):,} pictures and {int(rows.counts.sum()):,} captions"
        held = f"in memory, {file_size(rows.bytes)}" if rows.in_memory else f"on disk, {file_size(rows.bytes)}"
        step = "" if self._samples is None else f"; {self._samples:,} pictures and their captions at each step"
        return f"bank of the teacher's embeddings: {known} ({held}){step}"

    def __call__(self, batch: Batch) -> Bank:
        """The bank of a step, with the places of this rank's rows."""
        places = np.asarray([self._place[index] for index in batch.indices.tolist()], dtype=np.int64)
        if self._whole is not None:
            place = torch.from_numpy(places).to(self._device)
            return Bank(self._whole.image, self._whole.text, self._whole.counts, place)
        assert self._samples is not None
        shared = step_sample(len(self._rows.samples), self._samples, self._seed, batch.step)
        chosen = np.concatenate([shared, np.setdiff1d(places, shared)])
        order = np.argsort(chosen, kind="stable")
        found = order[np.searchsorted(chosen, places, sorter=order)]
        image, text = self._clean(*self._rows.rows(chosen))
        counts, place = (torch.from_numpy(x).to(self._device) for x in (self._rows.counts[chosen], found))
        return Bank(image, text, counts, place, len(shared))

    def _clean(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        if self._cleaning is not None:
            image, text = self._cleaning(image, "image"), self._cleaning(text, "text")
        return image.to(self._device), text.to(self._device)
