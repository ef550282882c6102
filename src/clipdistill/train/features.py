"""Features of locked towers, computed once: only heads are left to train, at the speed of matrix products.

A locked tower of joined ones (models/towers) is a fixed function of its picture or caption. Where the views are fixed
too, its features are computed before the first step and kept in memory, and the batches hold them in the place of
pictures and ids; the towers' encoders take either.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clipdistill.data.loader import Batch, prepared, truncated
from clipdistill.data.pairs import PairSource, one_or_several
from clipdistill.data.sampler import StepSampler, sample_generator
from clipdistill.data.views import EVALUATION_VIEW, ViewPolicy, normalise
from clipdistill.embed.prepare import Item, Preparation
from clipdistill.models import ClipModel
from clipdistill.models.parameters import evaluation_mode, is_joined
from clipdistill.models.text_length import by_length
from clipdistill.runtime.distributed import rank, world_size
from clipdistill.train.config import RunConfig

LARGEST = 4 << 30
"""Bytes of features that are kept; a larger set is encoded step by step, as without locks."""
_PART = 64


@dataclass
class LockedFeatures:
    """Rows by sample: image (N, F); text (captions of all samples, F), those of sample i from first[i] on, or None."""

    image: Tensor
    text: Tensor | None
    first: list[int]
    problems: dict[int, str]
    seconds: float

    def sentence(self) -> str:
        """What was computed, for the terminal."""
        size = sum(part.numel() * 4 for part in (self.image, self.text) if part is not None)
        towers = "image tower" if self.text is None else "image and text towers"
        return f"features of the locked {towers} computed once: {size / 1e6:.0f} MB in {self.seconds:.0f} s"


def can_keep(student: ClipModel, config: RunConfig, source: PairSource) -> bool:
    """Whether what the student's image tower makes of each picture stays the same through the run, and fits."""
    train, module = config.train, student.module
    view = ViewPolicy() if train.views == "fixed" else train.view
    fixed = not config.objective.needs_teacher and train.mask_ratio is None and not view.random
    if not is_joined(module) or not module.visual.locked or not fixed:
        return False
    rows = len(source) * sum(module.visual.head.widths)
    if module.text.locked:
        rows += sum(len(one_or_several(source.captions(i))) for i in range(len(source))) * sum(module.text.head.widths)
    return 4 * rows <= LARGEST


def locked_features(student: ClipModel, source: PairSource, workers: int, device: torch.device) -> LockedFeatures:
    """Features of every picture, and of every caption where the text tower is locked too, in float32 on the CPU."""
    start = time.perf_counter()
    module, count = student.module, len(source)
    image = torch.zeros(count, sum(module.visual.head.widths))
    problems: dict[int, str] = {}
    tasks = [[Item(i) for i in range(begin, min(begin + _PART, count))] for begin in range(0, count, _PART)]
    first: list[int] = []
    texts: list[str] = []
    for i in range(count):
        first.append(len(texts))
        texts += one_or_several(source.captions(i))
    text = None
    with evaluation_mode(module), torch.no_grad():
        for chunk in prepared(Preparation(source, [student.image]), tasks, workers, ahead=4):
            good = [row for row, problem in enumerate(chunk.problems) if problem is None]
            rows = [item.index for item in chunk.items]
            problems |= {rows[row]: why for row, why in enumerate(chunk.problems) if why is not None}
            if good:
                pixels = normalise(chunk.pixels[0][good].to(device), student.image)
                image[[rows[row] for row in good]] = module.visual.features(pixels).float().cpu()
        if module.text.locked:
            text = torch.zeros(len(texts), sum(module.text.head.widths))
            for begin in range(0, len(texts), 64 * _PART):
                tokens = student.tokenizer(texts[begin : begin + 64 * _PART])
                for group in by_length(tokens) if student.reads_only_text else [torch.arange(len(tokens))]:
                    for part in group.split(4 * _PART):
                        (cut,) = student.shorten(tokens[part])
                        text[begin + part] = module.text.features(cut.to(device)).float().cpu()
    return LockedFeatures(image, text, first, problems, time.perf_counter() - start)


class FeatureLoader:
    """The batches of data.loader.PairLoader, the same samples and captions, with features in the pictures' place."""

    def __init__(
        self,
        features: LockedFeatures,
        source: PairSource,
        student: ClipModel,
        config: RunConfig,
        start_step: int,
        steps: int,
    ) -> None:
        train = config.train
        self.features, self.source, self.student, self.caption = features, source, student, train.caption
        self.start_step, self.steps = start_step, steps
        self.sampler = StepSampler(len(source), train.batch_size, train.seed, rank(), world_size())

    def __len__(self) -> int:
        return self.steps - self.start_step

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.start_step, self.steps):
            yield self._batch(step)

    def _batch(self, step: int) -> Batch:
        epoch, features = self.sampler.epoch(step), self.features
        kept: list[tuple[int, int, str]] = []
        problems: list[tuple[str, str]] = []
        for index in self.sampler.indices(step).tolist():
            captions = one_or_several(self.source.captions(index))
            drawn = int(sample_generator(self.sampler.seed, epoch, index).integers(len(captions)))
            chosen = drawn if self.caption == "random" else 0
            if index in features.problems:
                problems.append((self.source.key(index), features.problems[index]))
            else:
                kept.append((index, chosen, captions[chosen]))
        indices = torch.tensor([index for index, *_ in kept], dtype=torch.int64)
        places = torch.tensor([chosen for _, chosen, _ in kept], dtype=torch.int64)
        texts = [caption for *_, caption in kept]
        if features.text is None:
            (tokens,) = self.student.shorten(self.student.tokenizer(texts))
        else:
            tokens = features.text[
                torch.tensor([features.first[i] for i in indices.tolist()], dtype=torch.int64) + places
            ]
        return Batch(
            indices=indices,
            keys=[self.source.key(index) for index, *_ in kept],
            caption_indices=places,
            student_images=features.image[indices],
            student_tokens=tokens,
            teacher_images=None,
            teacher_tokens=None,
            captions=texts,
            problems=problems,
            truncated_student=truncated(self.student.tokenizer, texts),
            views=[EVALUATION_VIEW] * len(kept),
            step=step,
            epoch=epoch,
        )
