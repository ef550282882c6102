"""Distillation on batches that are chosen: `train.curation` (worth learning) and `train.neighbours` (hard to tell)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from clipdistill.bank.rows import SetRows
from clipdistill.cache.stored import StoredRows
from clipdistill.curation.neighbours import LISTED, Grouped, nearest
from clipdistill.curation.select import select
from clipdistill.data.loader import Batch
from clipdistill.errors import InputError
from clipdistill.models.parameters import evaluation_mode
from clipdistill.runtime.distributed import rank, world_size
from clipdistill.train.config import RunConfig
from clipdistill.train.distil import Distillation
from clipdistill.train.sources import Sources
from clipdistill.train.step import autocast, inputs_of
from clipdistill.train.task import Say

_STREAM = 7  # of random numbers, beside those of data/sampler.py


class CuratedDistillation(Distillation):
    """As `Distillation`, on batches of neighbours, or drawn from super-batches by what is worth learning, or both.

    A super-batch holds batch_size / (1 - train.curation) pairs in the sampler's order; each rank draws its share of
    the batch from its share of it. What is drawn is a function of the weights, the seed and the step, so a resumed run
    draws the same. Steps and epochs are counted in pairs that are trained on.
    """

    def __init__(self, config: RunConfig, device: torch.device, sources: Sources | None = None, say: Say = print):
        super().__init__(config, device, sources, say)
        setup, train = self.setup, config.train
        teacher = setup.teacher
        if teacher is None or len(teacher.blocks) != 1:
            raise InputError("train.curation and train.neighbours: the pairs are weighed by one teacher: name one")
        if getattr(setup.source, "sets", None) or not (setup.source.captioned and setup.source.pictured):
            raise InputError("train.curation and train.neighbours: for one set of pictures with captions")
        if train.neighbours is not None:
            if not isinstance(teacher.stored, StoredRows):
                raise InputError("train.neighbours: neighbours are found in a cache: fill one, --teacher cache:DIR")
            self.setup.source = self.source = Grouped(setup.source, self._nearest(teacher.stored), train.neighbours)
            say(f"batches of the teacher's neighbours: groups of {train.neighbours}")
        whole = min(round(train.batch_size / (1 - train.curation)), len(setup.source))
        self.super_batch = max(whole, train.batch_size)
        if train.curation:
            say(f"active curation: {train.batch_size:,} of {self.super_batch:,} pairs at each step")

    def _nearest(self, stored: StoredRows) -> np.ndarray:
        """Neighbours by picture and captions together, each half of the cosine; a sample without rows has nobody's."""
        rows = SetRows(stored.embeddings, stored.teachers[0], self.source, self.config.train.caption)
        image, text = rows.rows()
        owners = torch.repeat_interleave(torch.arange(len(image)), torch.from_numpy(rows.counts))
        mean = normalize(torch.zeros_like(image).index_add_(0, owners, text), dim=-1)
        assert self.config.train.neighbours is not None
        found = nearest(torch.cat([image, mean], dim=1) * 0.5**0.5, LISTED * self.config.train.neighbours)
        near = np.tile(np.arange(len(self.source))[:, None], (1, found.shape[1]))  # itself: never free when asked
        near[rows.samples] = rows.samples[found]
        return near

    def loader(self, start_step: int, steps: int | None = None) -> Iterable[Batch]:
        if not self.config.train.curation:
            return super().loader(start_step, steps)
        larger = self.config.train.model_copy(update={"batch_size": self.super_batch})
        setup = replace(self.setup, config=self.config.model_copy(update={"train": larger}))
        return (self._drawn(batch) for batch in setup.loader(start_step, steps))

    def _drawn(self, batch: Batch) -> Batch:
        train = self.config.train
        share = [place * train.batch_size // world_size() for place in (rank(), rank() + 1)]
        count = min(share[1] - share[0], len(batch.keys))
        rng = np.random.Generator(np.random.Philox(key=[train.seed, batch.step], counter=[0, 0, rank(), _STREAM]))
        return part_of(batch, select(*self._logits(batch), count, rng))

    def _logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(N, N) of student and teacher over a super-batch."""
        module, train = self.setup.student.module, self.config.train
        images, tokens = inputs_of(replace(batch, synthetic_tokens=None), self.device)
        with evaluation_mode(module), torch.no_grad(), autocast(self.device, train.precision):
            own = [
                normalize(rows.float(), dim=-1) for rows in (module.encode_image(images), module.encode_text(tokens))
            ]
        assert self.setup.teacher is not None
        known = self.setup.teacher(batch)
        theirs = [normalize(rows.float(), dim=-1) for rows in (known.image, known.text)]
        scale = train.fixed_logit_scale or module.logit_scale.detach().float().exp()
        return scale * own[0] @ own[1].T, torch.as_tensor(known.logit_scale) * theirs[0] @ theirs[1].T

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "super_batch": self.super_batch}


def part_of(batch: Batch, rows: Tensor) -> Batch:
    """The batch of these rows alone; what is counted over the whole (bad samples, cut captions) stays counted."""
    chosen = rows.tolist()
    changed: dict[str, Any] = {}
    for name in (field.name for field in fields(batch)):
        value = getattr(batch, name)
        if isinstance(value, Tensor):
            changed[name] = value[rows.to(value.device)]
        elif name == "stored" and value is not None:
            changed[name] = {key: kept[rows.to(kept.device)] for key, kept in value.items()}
        elif name in ("keys", "captions", "views"):
            changed[name] = [value[row] for row in chosen] if value else value
    return replace(batch, **changed)
