"""What training a meta-teacher is apart from the loop: its parts, the samples of a step, a step's loss, its measure.

The recipe's `meta_teacher:` part makes a run train this network instead of a student:

    clipdistill train --recipe dclip-teacher --teacher ViT-B-16/openai --data D --out runs/teacher regions.boxes=B

The CLIP is frozen and regions are embedded once, so a step is a small network and the text tower's forward pass.
Which samples and captions a step sees is a function of (seed, step), as in the training of a student.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clipdistill.config import as_dict
from clipdistill.data.pairs import PairSource, Subset
from clipdistill.data.sampler import StepSampler, sample_generator
from clipdistill.errors import InputError
from clipdistill.models import load_model
from clipdistill.objective import Embeddings
from clipdistill.objective.config import ObjectiveConfig
from clipdistill.regions.config import MetaTeacherConfig, RegionsConfig
from clipdistill.regions.measure import Measured, measure
from clipdistill.regions.meta_teacher import MetaTeacher
from clipdistill.regions.store import RegionStore
from clipdistill.regions.teacher import open_store

MEASURED = "measured.json"
"""The measure of a finished training, in its run folder."""


@dataclass
class RegionTask:
    """The parts of one training, on `device`.

    source: the pairs; store: their regions; samples: those of `source` whose image could be read; sampler: over
    `samples`; validation: pairs to measure on and their regions; scale: the multiplier of similarities;
    caption: "random" or "first" of an image's captions.
    """

    teacher: MetaTeacher
    source: PairSource
    store: RegionStore
    samples: Subset
    sampler: StepSampler
    validation: tuple[PairSource, RegionStore] | None
    scale: float
    caption: str
    device: torch.device

    def batch(self, step: int) -> tuple[list[int], list[str]]:
        """Sample indices (of the store) and captions of this rank's share of a step."""
        indices, epoch = self.sampler.indices(step).tolist(), self.sampler.epoch(step)
        captions = []
        for index in indices:
            known = self.samples.captions(index)
            drawn = int(sample_generator(self.sampler.seed, epoch, index).integers(len(known)))
            captions.append(known[drawn if self.caption == "random" else 0])
        return [int(self.samples.indices[i]) for i in indices], captions

    def embeddings(self, indices: Sequence[int], captions: Sequence[str]) -> Embeddings:
        """What the objective takes: image rows (B, D) with a graph, the frozen CLIP's sentence rows (B, D)."""
        with torch.no_grad():
            sentence, states, mask = self.teacher.text(captions)
        image = self.teacher.image(self.store.read(indices).to(self.device), states, mask)
        return Embeddings(image, sentence, self.scale)

    def measured(self) -> Measured | None:
        """The teacher on the validation set: with its own caption, without it, and the plain CLIP beside it."""
        if self.validation is None:
            return None
        self.teacher.network.eval()
        return measure(self.teacher, *self.validation, device=self.device)

    @property
    def parameters(self) -> int:
        """Numbers that train."""
        return sum(p.numel() for p in self.teacher.network.parameters())

    def notes(self) -> list[str]:
        """What is trained on what, for the terminal."""
        found = [
            f"{self.source.name}, {len(self.samples)} images, {self.store.counts().float().mean():.1f} regions each "
            f"({self.store.manifest.without_boxes} images without boxes); frozen CLIP {self.teacher.clip.name}; "
            f"{self.parameters / 1e6:.2f} M parameters train"
        ]
        if self.source.problems.total:
            found.append(f"left out when opening the data: {self.source.problems.summary()}")
        if not self.teacher.config.caption_free:
            found.append("the image embeddings contain the caption (the published form): see docs/dclip.md")
        return found

    def facts(self) -> dict[str, Any]:
        """What run.json says of a region teacher beside the facts of every run."""
        return {
            "kind": "region teacher",
            "teacher": self.teacher.clip.name,
            "student": self.teacher.name,
            "boxes": self.store.manifest.boxes,
            "regions": int(self.store.counts().sum()),
            "parameters": {"total": self.parameters},
            "teacher_parameters": self.teacher.clip.parameter_counts(),
            "meta_teacher": as_dict(self.teacher.config),
            "bad_samples": int((~self.store.readable()).sum()),
        }


def check_settings(teachers: Sequence[str], regions: RegionsConfig | None, objective: ObjectiveConfig) -> None:
    """Raises InputError for settings that a meta-teacher's training needs or cannot follow."""
    if len(teachers) != 1:
        raise InputError("meta_teacher: name the CLIP to freeze, for example  --teacher ViT-B-16/openai")
    if regions is None:
        raise InputError(
            "meta_teacher: name the boxes of the images, a file or a detector, for example  "
            "regions.boxes=boxes.parquet  or  regions.boxes=grid:1+2"
        )
    if objective.needs_teacher:
        raise InputError(
            f"meta_teacher: is trained without a teacher of its own; its terms ({', '.join(objective.weights)}) "
            "need one: use objective.weights.task=1"
        )


def build_task(
    clip: str,
    settings: MetaTeacherConfig,
    regions: RegionsConfig,
    source: PairSource,
    validation: PairSource | None,
    out: Path,
    device: torch.device,
    *,
    batch_size: int,
    seed: int,
    caption: str = "random",
    fixed_logit_scale: float | None = None,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = lambda _: None,
) -> RegionTask:
    """The frozen CLIP called `clip`, a new network, and the regions of both sets, made where they are not there.

    out: the run's folder, where regions are kept if `regions` names no other place. Raises InputError for unusable
    input; the validation set's boxes are looked at before training, not after.
    """
    teacher = MetaTeacher.start(load_model(clip, teacher=True), settings, seed).to(device)

    def stored(pairs: PairSource, boxes: str) -> RegionStore:
        named = regions.model_copy(update={"boxes": boxes})
        return open_store(named, pairs, teacher.clip, teacher.config, out, device, say)

    store = stored(source, regions.boxes)
    measured_on = None
    if validation is not None:
        measured_on = validation, stored(validation, regions.validation_boxes or regions.boxes)
    readable = torch.nonzero(store.readable()).flatten().tolist()
    if len(readable) < 2:
        raise InputError(f"data '{source.name}': {len(readable)} readable images; training needs at least 2")
    samples = Subset(source, indices=readable)
    own = float(teacher.clip.module.logit_scale.detach().float().exp())
    return RegionTask(
        teacher,
        source,
        store,
        samples,
        StepSampler(len(samples), batch_size, seed, rank, world),
        measured_on,
        own if fixed_logit_scale is None else fixed_logit_scale,
        caption,
        device,
    )
