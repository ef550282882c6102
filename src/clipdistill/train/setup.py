"""Everything a run needs before its first step, built from the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from clipdistill.data.loader import Batch, PairLoader, StoredTeacher
from clipdistill.data.memory import KeptInMemory
from clipdistill.data.pairs import PairSource, open_pairs
from clipdistill.data.sampler import steps_per_epoch
from clipdistill.data.views import ViewPolicy
from clipdistill.errors import InputError
from clipdistill.models import ClipModel, Tokenizer, build_student, load_model
from clipdistill.models.parameters import freeze
from clipdistill.models.students import needs_vocabulary
from clipdistill.objective import Embeddings, Objective
from clipdistill.train.config import RunConfig
from clipdistill.train.distributed import broadcast_module, rank, world_size
from clipdistill.train.optimiser import build_optimiser
from clipdistill.train.step import Towers
from clipdistill.train.teacher import open_teacher


class Teacher(Protocol):
    """Whatever can give the teacher's embeddings of a batch: live models, or a cache of them."""

    @property
    def name(self) -> str: ...

    @property
    def blocks(self) -> tuple[int, ...]:
        """Embedding width of each teacher."""
        ...

    @property
    def notes(self) -> list[str]:
        """What was found when it was opened, for the terminal."""
        ...

    def __call__(self, batch: Batch) -> Embeddings: ...

    @property
    def model(self) -> ClipModel | None:
        """The model that batches are prepared for; None for stored embeddings."""
        ...

    @property
    def stored(self) -> StoredTeacher | None:
        """What the loader reads embeddings and views from; None for a live teacher."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclass
class Setup:
    """The parts of a run, on their device."""

    config: RunConfig
    device: torch.device
    source: PairSource
    validation: PairSource | None
    student: ClipModel
    teacher: Teacher | None
    objective: Objective
    towers: nn.Module
    optimiser: torch.optim.AdamW
    total_steps: int
    steps_per_epoch: int

    @property
    def bare_towers(self) -> Towers:
        wrapped = self.towers.module if isinstance(self.towers, DistributedDataParallel) else self.towers
        assert isinstance(wrapped, Towers)
        return wrapped

    def loader(self, start_step: int, steps: int | None = None) -> PairLoader:
        """Batches of this rank from optimiser step `start_step` on."""
        train = self.config.train
        return PairLoader(
            self.source,
            batch_size=train.batch_size,
            student=self.student,
            teacher=None if self.teacher is None else self.teacher.model,
            stored=None if self.teacher is None else self.teacher.stored,
            view=ViewPolicy() if train.views == "fixed" else train.view,
            caption=train.caption,
            seed=train.seed,
            rank=rank(),
            world=world_size(),
            workers=train.workers,
            start_step=start_step,
            steps=self.total_steps if steps is None else steps,
        )


def build(config: RunConfig, device: torch.device) -> Setup:
    """Open the data, load teacher and student, make objective and optimiser. Raises InputError for unusable input."""
    train = config.train
    source = open_pairs(config.data, default_split="train")
    if train.keep_in_memory:
        source = KeptInMemory(source)
    if len(source) < 2:
        raise InputError(f"data '{config.data.path}': {len(source)} usable pairs; training needs at least 2")
    validation = None if config.validation is None else open_pairs(config.validation, default_split="val")
    teacher: Teacher | None = None
    if config.objective.needs_teacher:
        teacher = open_teacher(config, source, device)
    student = _student(config, source, teacher)
    per_epoch = steps_per_epoch(len(source), train.batch_size)
    total = train.steps if train.steps is not None else max(round((train.epochs or 0) * per_epoch), 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        objective = config.objective.build(
            student.embed_dim,
            student.embed_dim if teacher is None else sum(teacher.blocks),
            teacher_blocks=None if teacher is None or len(teacher.blocks) == 1 else teacher.blocks,
        )
    freeze(student.module, train.freeze)
    student.module.to(device).train()
    objective.to(device)
    towers: nn.Module = Towers(student.module, train.fixed_logit_scale, train.mask_ratio)
    broadcast_module(towers)
    broadcast_module(objective)
    if train.compile:
        student.module.encode_image = torch.compile(student.module.encode_image)
        student.module.encode_text = torch.compile(student.module.encode_text)
    if world_size() > 1:
        towers = DistributedDataParallel(towers, device_ids=[device] if device.type == "cuda" else None)
    optimiser = build_optimiser(student.module, objective, train)
    return Setup(config, device, source, validation, student, teacher, objective, towers, optimiser, total, per_epoch)


def _student(config: RunConfig, source: PairSource, teacher: Teacher | None) -> ClipModel:
    """The student: a named architecture under the run's seed, or given weights to go on from."""
    train = config.train
    if config.student_weights is not None:
        student = load_model(config.student_weights)
    else:
        # a student whose vocabulary is made from words shares the teacher's, so that both read the same captions
        shared = teacher.tokenizer if teacher is not None else None
        student = build_student(
            config.student,
            seed=train.seed,
            tokenizer=shared if needs_vocabulary(config.student) else None,
            captions=(caption for i in range(len(source)) for caption in source.captions(i)),
        )
    with torch.no_grad():
        if train.logit_scale_init is not None:
            student.module.logit_scale.fill_(torch.tensor(train.logit_scale_init).log())
        if train.logit_bias_init is not None:
            if getattr(student.module, "logit_bias", None) is None:
                student.module.logit_bias = nn.Parameter(torch.zeros(()))
            student.module.logit_bias.fill_(train.logit_bias_init)
    return student
